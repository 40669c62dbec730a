"""Keep examples with a key and a residual each, and find the nearest ones."""

from typing import Any, NamedTuple

import faiss
import numpy as np
from jaxtyping import Float, Float32, Int, Int32
from sklearn.neighbors import NearestNeighbors

from resmem_lm.memory.exact_index import SPARE
from resmem_lm.memory.index import SMALL

LEAF = 100  # examples in a leaf of an approximate index
KINDS = ("exact", "faiss")

Keys = Float32[np.ndarray, "examples dimensions"]


class Residuals(NamedTuple):
    """The residuals of examples. Without `ids` column i is output i; otherwise a row has its entries of largest magnitude only."""

    values: Float32[np.ndarray, "examples entries"]
    ids: Int32[np.ndarray, "examples entries"] | None

    def map(self, function: Any) -> "Residuals":
        """Apply a function to each array."""
        return Residuals(function(self.values), None if self.ids is None else function(self.ids))


def store(residuals: Float[np.ndarray, "examples outputs"], entries: int) -> Residuals:
    """Return residuals with at most `entries` entries a row: those of largest magnitude (paper, appendix C)."""
    if residuals.shape[1] <= entries:
        return Residuals(residuals.astype(np.float32), None)
    ids = np.argpartition(-np.abs(residuals), entries - 1, axis=1)[:, :entries].astype(np.int32)
    return Residuals(np.take_along_axis(residuals, ids, axis=1).astype(np.float32), ids)


def join(parts: list[Residuals]) -> Residuals:
    """Return the residuals of all parts."""
    ids = [part.ids for part in parts if part.ids is not None]
    return Residuals(np.concatenate([part.values for part in parts]), np.concatenate(ids) if ids else None)


class Examples:
    """Examples in the order in which they were remembered. Their numbers are their places in this order."""

    def __init__(self, keys: Keys, residuals: Residuals, kind: str) -> None:
        self.keys, self.residuals, self.kind = keys, residuals, kind
        self.index = self._build()

    def _build(self) -> Any:
        """Return a tree over quantized keys, or scikit-learn's exact search."""
        examples, dimensions = self.keys.shape
        if self.kind == "exact" or examples < SMALL:
            return NearestNeighbors(algorithm="brute").fit(self.keys)
        leaves = examples // LEAF
        index = faiss.index_factory(dimensions, f"IVF{leaves},SQ8")
        index.nprobe = max(1, round(leaves**0.5))
        index.cp.min_points_per_centroid = 1
        sample = np.random.default_rng(0).choice(examples, min(examples, 32 * leaves), replace=False)
        index.train(self.keys[sample])
        index.add(self.keys)
        return index

    def remember(self, keys: Keys, residuals: Residuals) -> None:
        """Add examples."""
        self.keys, self.residuals = np.concatenate([self.keys, keys]), join([self.residuals, residuals])
        if isinstance(self.index, NearestNeighbors):
            self.index = self._build()
        else:
            self.index.add(keys)

    def delete(self, numbers: Int[np.ndarray, " some"]) -> None:
        """Delete examples and build the index again. Later examples get smaller numbers, as with `numpy.delete`."""
        self.keys = np.delete(self.keys, numbers, axis=0)
        self.residuals = self.residuals.map(lambda array: np.delete(array, numbers, axis=0))
        self.index = self._build()

    def nearest(
        self, queries: Float32[np.ndarray, "queries dimensions"], k: int
    ) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
        """Return the numbers of the k nearest examples of each query and their L2 distances, nearest first, ties by number.

        A missing example is number -1 at an infinite distance.
        """
        if isinstance(self.index, NearestNeighbors):
            found = self.index.kneighbors(queries, min(k + SPARE, len(self.keys)), return_distance=False)
        else:
            _, found = self.index.search(queries, 2 * k + SPARE)
        distances = np.linalg.norm(self.keys[found].astype(np.float64) - queries[:, None], axis=-1)
        distances[found < 0] = np.inf
        order = np.lexsort((found, distances), axis=1)[:, :k]
        found, distances = np.take_along_axis(found, order, axis=1), np.take_along_axis(distances, order, axis=1)
        missing = ((0, 0), (0, k - found.shape[1]))
        return np.pad(found, missing, constant_values=-1), np.pad(distances, missing, constant_values=np.inf)
