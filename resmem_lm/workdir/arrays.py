"""Publish .npy files, and read the files of several shards as one array."""

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, Shaped

from resmem_lm.errors import UserError
from resmem_lm.workdir.artifacts import folder_of, publish, require_record
from resmem_lm.workdir.stages import disk_errors
from resmem_lm.workdir.storage import AnyPath, Record, drop_copy, local_path

# NumPy parses headers with `ast`, which is not thread-safe in Python 3.11 ("AST constructor recursion depth mismatch").
_parsing = threading.Lock()


def load_array(path: AnyPath) -> Shaped[np.ndarray, "_ ..."]:
    """Return a .npy file as an array, memory-mapped unless it has no rows. Raise UserError if it is not a .npy file."""
    local = local_path(path)
    with _parsing:
        try:
            loaded: np.ndarray = np.load(local, mmap_mode="r", allow_pickle=False)
        except ValueError:  # an array without rows cannot be mapped
            try:
                loaded = np.load(local, allow_pickle=False)
            except (ValueError, EOFError, OSError) as error:
                raise UserError(f"{path} is not an array ({error}): run `resmem verify` to see how to restore it") from None
    return loaded


class ShardedArray:
    """The arrays of several shards as one array. Indexing reads only the requested rows."""

    def __init__(self, parts: list[Shaped[np.ndarray, "_ ..."]]) -> None:
        self.parts = parts
        self.offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the concatenated array."""
        return (len(self), *self.parts[0].shape[1:])

    def __getitem__(self, rows: Int[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        flat = rows.reshape(-1)
        found = np.empty((len(flat), *self.parts[0].shape[1:]), self.parts[0].dtype)
        # Sorted rows are grouped by shard and read from the disk in order.
        order = np.argsort(flat, kind="stable")
        cuts = np.searchsorted(flat[order], self.offsets)
        for part, offset, begin, end in zip(self.parts, self.offsets, cuts, cuts[1:], strict=False):
            if end > begin:
                found[order[begin:end]] = part[flat[order[begin:end]] - offset]
        return found.reshape(*rows.shape, *found.shape[1:])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> Shaped[np.ndarray, "_ ..."]:
        whole = np.concatenate(self.parts)
        return whole if dtype is None else whole.astype(dtype)


def array_files(*names: str) -> list[str]:
    """Return the file names of arrays."""
    return [f"{name}.npy" for name in names]


def publish_arrays(parent: AnyPath, name: str, provenance: Record, arrays: dict[str, np.ndarray], facts: Record | None = None) -> None:
    """Publish arrays as one artifact, and add `facts` to its record."""
    with disk_errors(parent), publish(parent, name, provenance, array_files(*arrays)) as attempt:
        for array, content in arrays.items():
            np.save(attempt.folder / f"{array}.npy", content)
        attempt.facts |= facts or {}


@contextlib.contextmanager
def published_arrays(parent: AnyPath, name: str, provenance: Record, *arrays: str) -> Iterator[list[np.ndarray]]:
    """Yield published arrays, memory-mapped where possible. Raise UserError if they are missing or have another provenance."""
    folder = folder_of(parent, require_record(parent, name, provenance))
    paths = [folder / file for file in array_files(*arrays)]
    try:
        yield [load_array(path) for path in paths]
    finally:
        for path in paths:
            drop_copy(path)
