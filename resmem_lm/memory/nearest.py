"""Merge the nearest neighbors from several index shards."""

import numpy as np
from jaxtyping import Float, Int

from resmem_lm.memory.index import Index, Nearest

SEARCH_BLOCK = 4096  # queries searched at a time


def merge_nearest(found: list[tuple[Int[np.ndarray, "queries n"], Float[np.ndarray, "queries n"]]], k: int) -> Nearest:
    """Return the k nearest of the neighbors found in several index shards, ties by row."""
    rows, distances = (np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True))
    order = np.lexsort((rows, distances), axis=1)[:, :k]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(distances, order, axis=1)


def no_neighbors(queries: int, k: int) -> Nearest:
    """Return empty results: row -1 at an infinite distance."""
    return np.full((queries, k), -1, np.int64), np.full((queries, k), np.inf, np.float32)


def add_neighbors(nearest: Nearest, index: Index, queries: Float[np.ndarray, "queries emb"], first_row: int) -> None:
    """Search an index shard and merge its neighbors into `nearest`. Row 0 of the shard is the datastore's `first_row`."""
    k = nearest[0].shape[1]
    for start in range(0, len(queries), SEARCH_BLOCK):
        some = slice(start, start + SEARCH_BLOCK)
        rows, distances = index.search(queries[some], k)
        found = (np.where(rows < 0, -1, rows + first_row), distances)
        nearest[0][some], nearest[1][some] = merge_nearest([(nearest[0][some], nearest[1][some]), found], k)


def merge_parts(parts: list[Nearest], k: int) -> Nearest:
    """Return the k nearest of the neighbors from several groups of index shards."""
    merged = no_neighbors(len(parts[0][0]), k)
    for start in range(0, len(merged[0]), SEARCH_BLOCK):
        some = slice(start, start + SEARCH_BLOCK)
        merged[0][some], merged[1][some] = merge_nearest([(rows[some], distances[some]) for rows, distances in parts], k)
    return merged
