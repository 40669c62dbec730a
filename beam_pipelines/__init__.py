"""Apache Beam pipelines, for text and datastores that are too large for one process."""
