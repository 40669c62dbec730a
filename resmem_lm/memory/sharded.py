"""Row-aligned arrays that lie in several files, as one."""

import threading

import numpy as np
from jaxtyping import Int, Shaped

from resmem_lm.errors import UserError
from resmem_lm.workdir.storage import AnyPath, local_path

# NumPy parses the header with ast, in which threads of Python 3.11 disturb each other ("AST constructor recursion depth mismatch").
_parsing = threading.Lock()


def load_array(path: AnyPath) -> Shaped[np.ndarray, "_ ..."]:
    """A .npy file, mapped where it can be."""
    here = local_path(path)
    with _parsing:
        try:
            loaded: np.ndarray = np.load(here, mmap_mode="r", allow_pickle=False)
        except ValueError:  # an array without rows cannot be mapped
            try:
                loaded = np.load(here, allow_pickle=False)
            except (ValueError, EOFError, OSError) as error:
                raise UserError(f"{path} is no array ({error}): `resmem verify` says what to do") from None
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
        # Sorted by row, those of one shard stand together, and a disk is read in one direction.
        order = np.argsort(flat, kind="stable")
        cuts = np.searchsorted(flat[order], self.offsets)
        for part, offset, begin, end in zip(self.parts, self.offsets, cuts, cuts[1:], strict=False):
            if end > begin:
                found[order[begin:end]] = part[flat[order[begin:end]] - offset]
        return found.reshape(*rows.shape, *found.shape[1:])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> Shaped[np.ndarray, "_ ..."]:
        whole = np.concatenate(self.parts)
        return whole if dtype is None else whole.astype(dtype)
