"""The figures and tables of the paper, and its open questions: one study per module, each a stage of a work directory."""
