"""The interface of an index, and the ranking of candidates by true distance.

`Index` is what a search uses. A library (faiss, ScaNN) implements `Proposer`: it proposes candidate rows, and `ApproximateIndex` ranks them
by the L2 distance between the query and the stored key.
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

QUERY_BLOCK = 1024  # the most queries that a thread searches at a time
SMALL = 20_000  # rows below which all keys are compared: a tree would lose recall and save no time

Nearest = tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]  # rows and L2 distances, nearest first


@runtime_checkable
class Index(Protocol):
    """A searchable part of a datastore, whose rows count from 0."""

    datastore: Datastore

    def search(self, queries: Float[np.ndarray, "queries emb"], k: int) -> Nearest:
        """Return the k nearest live rows of each query; row -1 at an infinite distance where there are fewer."""


@runtime_checkable
class Proposer(Protocol):
    """A library's index of part of a datastore. It proposes candidates; their distances are computed elsewhere."""

    def propose(self, queries: Float[np.ndarray, "queries emb"], wanted: int, needed: int) -> Int[np.ndarray, "queries n"]:
        """Return candidate rows for each query, all live, -1 where there are fewer. Threads call this at the same time.

        Args:
            queries: keys.
            wanted: candidates for each query at most.
            needed: candidates for each query at least, if there are that many live rows and the library can find them.
        """


class Tree(NamedTuple):
    """The parameters of an index with a tree: leaves, probed leaves of a query, rows to learn the leaves from, and k-means rounds."""

    leaves: int
    probed: int
    sample: int
    rounds: int


class ApproximateIndex:
    """The candidates of a library, ranked by true distance. An `Index`."""

    def __init__(self, datastore: Datastore, proposer: Proposer, candidates: int) -> None:
        self.datastore, self.proposer, self.candidates = datastore, proposer, candidates

    def search(self, queries: Float[np.ndarray, "queries emb"], k: int) -> Nearest:
        """See `Index.search`."""
        wanted = max(self.candidates, k)
        return in_threads(lambda some: rank_candidates(self.datastore, some, self.proposer.propose(some, wanted, k), k), queries)


def rank_candidates(
    datastore: Datastore, queries: Float[np.ndarray, "queries emb"], candidates: Int[np.ndarray, "queries n"], k: int
) -> Nearest:
    """Return the k nearest of each query's candidate rows by true L2 distance, ties by row. Candidates of -1 are skipped."""
    rows = np.sort(np.pad(candidates, ((0, 0), (0, max(0, k - candidates.shape[1]))), constant_values=-1), axis=1)
    found = kernels.distances(queries, *datastore.key_parts, datastore.offsets, rows)
    # The bits of nonnegative floats order as the floats do. The place below them breaks ties, and rows are sorted.
    order = found.view(np.int32).astype(np.int64) << 32 | np.arange(rows.shape[1])
    order.partition(k - 1, axis=1)
    places = np.sort(order[:, :k], axis=1) & 0xFFFFFFFF
    return np.take_along_axis(rows, places, axis=1), np.take_along_axis(found, places, axis=1)


def in_threads(function: Callable[..., Nearest], *arrays: np.ndarray) -> Nearest:
    """Apply a function to blocks of rows of all arrays, one thread for each core, and concatenate the results."""
    cores = os.cpu_count() or 1
    block = int(np.clip(-(-len(arrays[0]) // cores), 1, QUERY_BLOCK))
    with ThreadPoolExecutor(cores) as threads:
        starts = range(0, max(1, len(arrays[0])), block)
        parts = list(threads.map(lambda start: function(*(array[start : start + block] for array in arrays)), starts))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
