"""The memory: the format of a datastore row, the datastore, and the index of its keys."""
