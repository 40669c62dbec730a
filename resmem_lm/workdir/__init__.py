"""Work directories: paths, stages, artifacts, storage, locks and progress."""
