"""The paper's figures and tables, and what it left open: one module a study, each a stage of a work directory."""
