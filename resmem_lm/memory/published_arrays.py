"""Publish arrays as .npy files in one folder, and read them back."""

import contextlib
from collections.abc import Iterator

import numpy as np

from resmem_lm.memory.sharded import load_array
from resmem_lm.workdir.artifacts import folder_of, publish, require_record
from resmem_lm.workdir.stages import disk_errors
from resmem_lm.workdir.storage import AnyPath, Record, drop_copy


def array_files(*names: str) -> list[str]:
    """Return the names of the files of some arrays."""
    return [f"{name}.npy" for name in names]


def publish_arrays(parent: AnyPath, name: str, provenance: Record, arrays: dict[str, np.ndarray], facts: Record | None = None) -> None:
    """Publish arrays under one name, with facts for the record."""
    with disk_errors(parent), publish(parent, name, provenance, array_files(*arrays)) as attempt:
        for array, content in arrays.items():
            np.save(attempt.folder / f"{array}.npy", content)
        attempt.facts |= facts or {}


@contextlib.contextmanager
def published_arrays(parent: AnyPath, name: str, provenance: Record, *arrays: str) -> Iterator[list[np.ndarray]]:
    """Yield published arrays, mapped where possible. Copies from object storage are removed at the end.

    Raises:
        UserError: nothing is published under the name, or its provenance differs.
    """
    folder = folder_of(parent, require_record(parent, name, provenance))
    paths = [folder / file for file in array_files(*arrays)]
    try:
        yield [load_array(path) for path in paths]
    finally:
        for path in paths:
            drop_copy(path)
