"""The memory: quantized rows, the datastore, and the index of its keys."""
