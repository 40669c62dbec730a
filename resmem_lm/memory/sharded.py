"""Row-aligned .npy files of several shards, read as one array."""

import threading

import numpy as np
from jaxtyping import Int, Shaped

from resmem_lm.errors import UserError
from resmem_lm.workdir.storage import AnyPath, local_path

# NumPy parses headers with `ast`, which is not thread-safe in Python 3.11 ("AST constructor recursion depth mismatch").
_parsing = threading.Lock()


def load_array(path: AnyPath) -> Shaped[np.ndarray, "_ ..."]:
    """Return a .npy file as an array, memory-mapped unless it has no rows.

    Raises:
        UserError: the file is not a .npy file.
    """
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
    """The arrays of several shards, concatenated. Only the rows that are asked for are read."""

    def __init__(self, parts: list[Shaped[np.ndarray, "_ ..."]]) -> None:
        self.parts = parts
        self.offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the concatenated array."""
        return (len(self), *self.parts[0].shape[1:])

    def __getitem__(self, rows: Int[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        flat = rows.reshape(-1)
        found = np.empty((len(flat), *self.parts[0].shape[1:]), self.parts[0].dtype)
        # Sorting groups the rows by shard, and a disk is read in one direction.
        order = np.argsort(flat, kind="stable")
        cuts = np.searchsorted(flat[order], self.offsets)
        for part, offset, begin, end in zip(self.parts, self.offsets, cuts, cuts[1:], strict=False):
            if end > begin:
                found[order[begin:end]] = part[flat[order[begin:end]] - offset]
        return found.reshape(*rows.shape, *found.shape[1:])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> Shaped[np.ndarray, "_ ..."]:
        whole = np.concatenate(self.parts)
        return whole if dtype is None else whole.astype(dtype)
