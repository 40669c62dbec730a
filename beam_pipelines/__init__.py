"""Apache Beam pipelines: the steps of resmem_lm that run over more text than one process can take."""
