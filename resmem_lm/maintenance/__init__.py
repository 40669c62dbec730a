"""Change or check a finished datastore: append, delete, compact, verify."""
