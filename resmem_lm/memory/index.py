"""Define the interface of an index, and rank candidates by true distance.

A search uses an `Index`. faiss and ScaNN implement `Proposer`, which proposes candidate rows. `ApproximateIndex` ranks the candidates by
the L2 distance between the query and the stored key.
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

QUERY_BLOCK = 1024  # maximum of queries that a thread searches at a time
SMALL = 20_000  # with fewer rows, search is exact: a tree would lose recall and save no time

Nearest = tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]  # rows and L2 distances, nearest first


@runtime_checkable
class Index(Protocol):
    """A searchable part of a datastore. Its rows are numbered from 0."""

    datastore: Datastore

    def search(self, queries: Float[np.ndarray, "queries emb"], k: int) -> Nearest:
        """Return the k nearest live rows of each query. Missing neighbors are row -1 at an infinite distance."""


@runtime_checkable
class Proposer(Protocol):
    """A library's index of part of a datastore, which proposes candidates without distances."""

    def propose(self, queries: Float[np.ndarray, "queries emb"], wanted: int, needed: int) -> Int[np.ndarray, "queries n"]:
        """Return `needed` to `wanted` candidate rows of each query, all live, padded with -1. Threads call this concurrently.

        A query may have fewer than `needed` candidates if there are fewer live rows or the library cannot find them.
        """


class Tree(NamedTuple):
    """The parameters of an index with a tree: leaves, probed leaves of a query, training rows, and k-means rounds."""

    leaves: int
    probed: int
    sample: int
    rounds: int


class ApproximateIndex:
    """An `Index` that ranks the candidates of a library by true distance."""

    def __init__(self, datastore: Datastore, proposer: Proposer, candidates: int) -> None:
        self.datastore, self.proposer, self.candidates = datastore, proposer, candidates

    def search(self, queries: Float[np.ndarray, "queries emb"], k: int) -> Nearest:
        """Search as `Index.search` specifies."""
        wanted = max(self.candidates, k)
        return in_threads(lambda some: rank_candidates(self.datastore, some, self.proposer.propose(some, wanted, k), k), queries)


def rank_candidates(
    datastore: Datastore, queries: Float[np.ndarray, "queries emb"], candidates: Int[np.ndarray, "queries n"], k: int
) -> Nearest:
    """Return the k candidate rows nearest to each query by true L2 distance, ties by row. Skip candidates of -1."""
    rows = np.sort(np.pad(candidates, ((0, 0), (0, max(0, k - candidates.shape[1]))), constant_values=-1), axis=1)
    found = kernels.distances(queries, *datastore.key_parts, datastore.offsets, rows)
    # The bits of nonnegative floats have the same order as the floats. The low bits hold the place, which breaks ties by row.
    order = found.view(np.int32).astype(np.int64) << 32 | np.arange(rows.shape[1])
    order.partition(k - 1, axis=1)
    places = np.sort(order[:, :k], axis=1) & 0xFFFFFFFF
    return np.take_along_axis(rows, places, axis=1), np.take_along_axis(found, places, axis=1)


def in_threads(function: Callable[..., Nearest], *arrays: np.ndarray) -> Nearest:
    """Apply a function to blocks of rows of the arrays, in one thread per core, and concatenate the results."""
    cores = os.cpu_count() or 1
    block = int(np.clip(-(-len(arrays[0]) // cores), 1, QUERY_BLOCK))
    with ThreadPoolExecutor(cores) as threads:
        starts = range(0, max(1, len(arrays[0])), block)
        parts = list(threads.map(lambda start: function(*(array[start : start + block] for array in arrays)), starts))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
