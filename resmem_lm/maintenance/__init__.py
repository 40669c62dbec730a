"""Changes and checks of a finished datastore: append, delete, verify."""
