"""Row-aligned arrays that lie in several files, as one."""

import threading

import numpy as np
from jaxtyping import Int, Shaped

from resmem_lm.storage import AnyPath, local_path

# NumPy parses the header with ast, in which threads of Python 3.11 disturb each other ("AST constructor recursion depth mismatch").
_parsing = threading.Lock()


def load_array(path: AnyPath) -> Shaped[np.ndarray, "_ ..."]:
    """A .npy file, mapped where it can be."""
    here = local_path(path)
    with _parsing:
        try:
            loaded: np.ndarray = np.load(here, mmap_mode="r", allow_pickle=False)
        except ValueError:  # an array without rows cannot be mapped
            loaded = np.load(here, allow_pickle=False)
    return loaded


class ShardedArray:
    """The arrays of several shards one after another. Nothing is read before it is asked for."""

    def __init__(self, parts: list[Shaped[np.ndarray, "_ ..."]]) -> None:
        self.parts = parts
        self.offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """As of one array."""
        return (len(self), *self.parts[0].shape[1:])

    def __getitem__(self, rows: Int[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        flat = rows.reshape(-1)
        found = np.empty((len(flat), *self.parts[0].shape[1:]), self.parts[0].dtype)
        shards = np.searchsorted(self.offsets, flat, side="right") - 1
        for shard in np.unique(shards):
            mine = np.flatnonzero(shards == shard)
            found[mine] = self.parts[shard][flat[mine] - self.offsets[shard]]
        return found.reshape(*rows.shape, *found.shape[1:])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> Shaped[np.ndarray, "_ ..."]:
        whole = np.concatenate(self.parts)
        return whole if dtype is None else whole.astype(dtype)
