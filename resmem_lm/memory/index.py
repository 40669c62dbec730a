"""Datastore -> index of its keys: faiss or ScaNN (approximate) or exact, behind one `search`; in shards that each fit a worker's memory.

All return neighbors by true L2 distance between the query and the stored key: faiss and ScaNN only propose candidates, whose
distances are then computed from the datastore itself. What belongs to one library is in `faiss_index.py` and `scann_index.py`.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from etils import epy
from jaxtyping import Float, Int

from resmem_lm.memory.datastore import Datastore

with epy.lazy_imports():
    from resmem_lm.memory import kernels

QUERY_BLOCK = 1024  # queries that a thread looks up at a time, at most
SMALL = 20_000  # rows below which everything is compared: a tree would cost recall and save nothing


@runtime_checkable
class Index(Protocol):
    """The index seam: some shards of a datastore, whose rows count from 0."""

    datastore: Datastore

    def search(
        self, queries: Float[np.ndarray, "queries emb"], k: int
    ) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
        """Rows and L2 distances of the k nearest keys of each query, nearest first; row -1, infinitely far, where there are fewer.

        Rows of deleted documents are never among them.
        """


@runtime_checkable
class Proposer(Protocol):
    """What a library's files say of some shards of a datastore."""

    def propose(self, queries: Float[np.ndarray, "queries emb"], wanted: int, needed: int) -> Int[np.ndarray, "queries n"]:
        """Up to `wanted` rows for each query that may be its nearest, -1 where there are fewer; none is deleted.

        At least `needed`, where so many are live and the library can find them. Each core has a thread that calls this.
        """


class Tree(NamedTuple):
    """How an index is divided: leaves, those that a query looks through, rows they are learned from, and in how many rounds."""

    leaves: int
    searched: int
    sample: int
    rounds: int


def rank_candidates(
    datastore: Datastore, queries: Float[np.ndarray, "queries emb"], candidates: Int[np.ndarray, "queries n"], k: int
) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
    """The k nearest of each query's candidate rows (-1 is none), by true L2, equal ones by row."""
    rows = np.sort(np.pad(candidates, ((0, 0), (0, max(0, k - candidates.shape[1]))), constant_values=-1), axis=1)
    found = kernels.distances(queries, *datastore.key_parts, datastore.offsets, rows)
    # Floats from 0 on are in the order of their bits; places behind these put equal ones in the order of rows.
    order = found.view(np.int32).astype(np.int64) << 32 | np.arange(rows.shape[1])
    order.partition(k - 1, axis=1)
    places = np.sort(order[:, :k], axis=1) & 0xFFFFFFFF
    return np.take_along_axis(rows, places, axis=1), np.take_along_axis(found, places, axis=1)


def in_threads(function: Callable[..., tuple[np.ndarray, np.ndarray]], *arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the function makes of some rows of all arrays, for all rows: each core has a thread that takes a block at a time."""
    cores = os.cpu_count() or 1
    block = int(np.clip(-(-len(arrays[0]) // cores), 1, QUERY_BLOCK))
    with ThreadPoolExecutor(cores) as threads:
        starts = range(0, max(1, len(arrays[0])), block)
        parts = list(threads.map(lambda start: function(*(array[start : start + block] for array in arrays)), starts))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


class ApproximateIndex:
    """The nearest of what a library proposes, by true distance."""

    def __init__(self, datastore: Datastore, proposer: Proposer, candidates: int) -> None:
        self.datastore, self.proposer, self.candidates = datastore, proposer, candidates

    def search(
        self, queries: Float[np.ndarray, "queries emb"], k: int
    ) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
        """See `Index.search`."""
        wanted = max(self.candidates, k)
        return in_threads(lambda some: rank_candidates(self.datastore, some, self.proposer.propose(some, wanted, k), k), queries)


def merge_nearest(
    found: list[tuple[Int[np.ndarray, "queries n"], Float[np.ndarray, "queries n"]]], k: int
) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
    """The k nearest of what several shards of the index found, equal ones by row; -1, infinitely far, where there are fewer."""
    rows, distances = (np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True))
    order = np.lexsort((rows, distances), axis=1)[:, :k]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(distances, order, axis=1)
