"""The memory: the datastore of residuals and the index of its keys."""
