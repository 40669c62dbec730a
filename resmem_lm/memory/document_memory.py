"""Use the earlier tokens of a query's own document as rows of a memory, which no other document sees and no datastore stores."""

import numpy as np
from jaxtyping import Float, Int

MOST_TOKENS = 2**14  # the memory of a longer document holds the most recent ones
BLOCK = 512  # queries that are compared at a time


def nearest_earlier(
    keys: Float[np.ndarray, "queries emb"], lengths: Int[np.ndarray, " documents"], k: int
) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
    """Return the k nearest earlier rows of each query's document: how many tokens before the query, and their L2 distances.

    Missing neighbors are 0 tokens before, at an infinite distance. The token of a query and all later tokens have no effect. Consecutive
    queries are the tokens of documents with these lengths.
    """
    back, distances = np.zeros((len(keys), k), np.int32), np.full((len(keys), k), np.inf, np.float32)
    first = 0
    for length in lengths.tolist() if k else []:
        for start in range(0, length, BLOCK):
            some = np.arange(start, min(start + BLOCK, length))
            oldest = max(0, start - MOST_TOKENS)
            earlier = np.arange(oldest, some[-1])
            found = min(k, len(earlier))
            if found:
                rows, near = _nearest(keys[first + some], keys[first + earlier], some[:, None] - earlier, found)
                back[first + some, :found] = rows
                distances[first + some, :found] = near
        first += length
    return back, distances


def _nearest(
    queries: Float[np.ndarray, "queries emb"],
    keys: Float[np.ndarray, "rows emb"],
    back: Int[np.ndarray, "queries rows"],
    k: int,
) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
    """Return `back` and the distances of the k nearest keys that are 1 to MOST_TOKENS tokens before each query."""
    usable = (back > 0) & (back <= MOST_TOKENS)
    squared = np.sum(keys**2, axis=1) - 2 * queries @ keys.T  # without the query's own square, which changes no order
    squared[~usable] = np.inf
    places = np.argpartition(squared, k - 1, axis=1)[:, :k]
    near = np.linalg.norm(queries[:, None] - keys[places], axis=2)
    near[~np.take_along_axis(usable, places, axis=1)] = np.inf
    order = np.argsort(near, axis=1, kind="stable")
    places, near = np.take_along_axis(places, order, axis=1), np.take_along_axis(near, order, axis=1)
    return np.where(np.isfinite(near), np.take_along_axis(back, places, axis=1), 0), near
