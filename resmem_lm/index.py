"""Datastore -> index of its keys: faiss or ScaNN (approximate) or exact, behind one `search`; in shards that each fit a worker's memory.

All return neighbours by true L2 distance between the query and the stored key: faiss and ScaNN only propose candidates, whose
distances are then computed from the datastore itself. What belongs to one library is in `faiss_index.py` and `scann_index.py`.
"""

import functools
import importlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from resmem_lm.datastore import Datastore
from resmem_lm.errors import UserError
from resmem_lm.published import Record, damaged_files, folder_of
from resmem_lm.resmem import largest
from resmem_lm.storage import AnyPath, local_path, read_json

EXACT_BLOCK = 2**16  # keys in one matrix product
QUERY_BLOCK = 1024  # queries that a thread looks up at a time, at most
SPARE = 16  # more than k, for the order of inner products is that of distances only as far as float32 tells
SEARCH_BLOCK = 4096  # queries looked up before what they found is merged
SMALL = 20_000  # rows below which everything is compared: a tree would cost recall and save nothing


@runtime_checkable
class Index(Protocol):
    """The index seam: some shards of a datastore, whose rows count from 0."""

    datastore: Datastore

    def search(
        self, queries: Float[np.ndarray, "queries emb"], k: int
    ) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
        """Rows and L2 distances of the k nearest keys of each query, nearest first; row -1, infinitely far, where there are fewer.

        Rows of forgotten documents are never among them.
        """


@runtime_checkable
class Proposer(Protocol):
    """What a library's files say of some shards of a datastore."""

    def propose(self, queries: Float[np.ndarray, "queries emb"], wanted: int, needed: int) -> Int[np.ndarray, "queries n"]:
        """Up to `wanted` rows for each query that may be its nearest, -1 where there are fewer; none is forgotten.

        At least `needed`, where so many are remembered and the library can find them. Each core has a thread that calls this.
        """


class Tree(NamedTuple):
    """How an index is divided: leaves, those that a query looks through, rows they are learned from, and in how many rounds."""

    leaves: int
    searched: int
    sample: int
    rounds: int


def nearest(
    datastore: Datastore, queries: Float[np.ndarray, "queries emb"], candidates: Int[np.ndarray, "queries n"], k: int
) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
    """The k nearest of each query's candidate rows (-1 is none), by true L2, equal ones by row."""
    from resmem_lm import loops  # not at the top: Numba takes a quarter of a second, and every command imports every stage

    rows = np.sort(np.pad(candidates, ((0, 0), (0, max(0, k - candidates.shape[1]))), constant_values=-1), axis=1)
    found = loops.distances(queries, *datastore.key_parts, datastore.offsets, rows)
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


class ExactIndex:
    """Compares every query with every key, in JAX: for small datastores, for GPUs, and to measure recall."""

    def __init__(self, datastore: Datastore) -> None:
        self.datastore = datastore

    def search(
        self, queries: Float[np.ndarray, "queries emb"], k: int
    ) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
        """See `Index.search`."""
        most = k + SPARE
        best_rows = np.full((len(queries), 2 * most), -1, np.int64)
        best_scores = np.full((len(queries), 2 * most), -np.inf, np.float32)
        for shard, record in enumerate(self.datastore.shards):
            for start in range(0, record["rows"], EXACT_BLOCK):
                some_keys = self.datastore.shard_keys(shard, slice(start, start + EXACT_BLOCK))
                # Each shape is compiled: blocks are filled up to a power of two, with rows that cannot be found.
                padding = (1 << (len(some_keys) - 1).bit_length()) - len(some_keys)
                block = jnp.asarray(np.pad(some_keys, ((0, padding), (0, 0))))
                rows = self.datastore.offsets[shard] + start + np.arange(len(some_keys))
                remembered = jnp.asarray(np.pad(~self.datastore.is_forgotten(rows), (0, padding)))
                count = min(most, len(block))
                for begin in range(0, len(queries), QUERY_BLOCK):
                    some = slice(begin, begin + QUERY_BLOCK)
                    scores, places = _block_search(jnp.asarray(queries[some]), block, remembered, count)
                    best_scores[some, most : most + count] = scores
                    best_rows[some, most : most + count] = np.asarray(places) + self.datastore.offsets[shard] + start
                order = np.argsort(-best_scores, axis=1, kind="stable")
                best_scores[:, :most] = np.take_along_axis(best_scores, order[:, :most], axis=1)
                best_rows[:, :most] = np.take_along_axis(best_rows, order[:, :most], axis=1)
                best_scores[:, most:], best_rows[:, most:] = -np.inf, -1
        best_rows[np.isneginf(best_scores)] = -1  # forgotten
        return in_threads(lambda q, rows: nearest(self.datastore, q, rows, k), queries, best_rows[:, :most])


@functools.partial(jax.jit, static_argnames="k")
def _block_search(
    queries: Float[Array, "queries emb"], keys: Float[Array, "keys emb"], remembered: Bool[Array, " keys"], k: int
) -> tuple[Array, Array]:
    # For one query, the order of q.z - |z|^2 / 2 is that of the distance.
    offsets = jnp.where(remembered, -jnp.sum(jnp.square(keys), axis=-1) / 2, -jnp.inf)
    return largest(queries @ keys.T + offsets, k)


class ApproximateIndex:
    """The nearest of what a library proposes, by true distance."""

    def __init__(self, datastore: Datastore, proposer: Proposer, candidates: int) -> None:
        self.datastore, self.proposer, self.candidates = datastore, proposer, candidates

    def search(
        self, queries: Float[np.ndarray, "queries emb"], k: int
    ) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
        """See `Index.search`."""
        wanted = max(self.candidates, k)
        return in_threads(lambda some: nearest(self.datastore, some, self.proposer.propose(some, wanted, k), k), queries)


def library(kind: str) -> Any:
    """The module of a kind of index, with `tree`, `build`, `Searcher`, `index_bytes` and `index_memory`; faiss's for an exact one, whose
    search is shared among workers likewise.
    """
    return importlib.import_module("resmem_lm.scann_index" if kind == "scann" else "resmem_lm.faiss_index")


def group_shards(shard_rows: list[int], most: int) -> list[tuple[int, int]]:
    """(first, number) of consecutive shards of the datastore that together have at most `most` rows; a larger shard stands alone.

    Shards that are added later do not change the groups before the last.
    """
    groups: list[tuple[int, int]] = []
    room = 0
    for shard, rows in enumerate(shard_rows):
        if groups and rows <= room:
            groups[-1] = (groups[-1][0], groups[-1][1] + 1)
            room -= rows
        else:
            groups.append((shard, 1))
            room = most - rows
    return groups


def index_bytes(kind: str, rows: int, dimensions: int) -> int:
    """Of the files of an index."""
    return 0 if kind == "exact" else int(library(kind).index_bytes(rows, dimensions))


def index_memory(kind: str, rows: int, dimensions: int, training_rows: int) -> int:
    """That the build of an index takes."""
    return int(library(kind).index_memory(rows, dimensions, training_rows))


def largest_index(kind: str, memory: int, dimensions: int, training_rows: int) -> int:
    """The most rows whose index is built within `memory`; 0 if none."""
    low, high = 0, max(0, memory) + 1  # a row takes more than a byte
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if index_memory(kind, middle, dimensions, training_rows) <= memory else (low, middle)
    return low


def index_manifest(workdir: AnyPath, datastore: Datastore) -> Record:
    """What stands in index.json; UserError if the index was made from another datastore or is damaged."""
    folder = workdir / "index"
    facts = read_json(folder / "index.json")
    if [shard["folder"] for shard in datastore.shards] != [name for shard in facts["shards"] for name in shard["made_from"]["folders"]]:
        raise UserError(
            f"{folder} was made from another datastore: run `resmem index`; if that changes nothing, "
            f"delete {folder} and {workdir / 'stages' / 'index.json'} first"
        )
    for shard in facts["shards"]:
        for problem in damaged_files(folder, shard):
            raise UserError(f"{problem}: {_mend(workdir)}")
    return facts


def _mend(workdir: AnyPath) -> str:
    return f"delete {workdir / 'index'} and {workdir / 'stages' / 'index.json'}, and run `resmem index`"


def open_index(workdir: AnyPath, datastore: Datastore, manifest: Record, shard: int) -> tuple[Index, int]:
    """One shard of the index, and the datastore's row that is its row 0. UserError if it cannot be read."""
    counts = [len(record["made_from"]["folders"]) for record in manifest["shards"]]
    first = sum(counts[:shard])
    part, record = datastore.part(first, counts[shard]), manifest["shards"][shard]
    if not record["files"]:  # an exact one, or of few rows
        return ExactIndex(part), int(datastore.offsets[first])
    folder = folder_of(workdir / "index", record)
    try:
        proposer = library(manifest["kind"]).Searcher(part, local_path(folder), record)
        return ApproximateIndex(part, proposer, manifest["candidates"]), int(datastore.offsets[first])
    except (RuntimeError, ValueError, OSError, KeyError) as error:  # KeyError: of a version that recorded less
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} cannot be read ({reason}): {_mend(workdir)}") from None


def merge_nearest(
    found: list[tuple[Int[np.ndarray, "queries n"], Float[np.ndarray, "queries n"]]], k: int
) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
    """The k nearest of what several shards of the index found, equal ones by row; -1, infinitely far, where there are fewer."""
    rows, distances = (np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True))
    order = np.lexsort((rows, distances), axis=1)[:, :k]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(distances, order, axis=1)


def search_shards(
    workdir: AnyPath, datastore: Datastore, queries: Float[np.ndarray, "queries emb"], k: int
) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
    """Rows and distances of the k nearest in all shards of WORKDIR/index, one shard in memory at a time.

    Args:
        workdir: of a finished index.
        datastore: from which the index was made; rows that it calls forgotten are passed over.
        queries: keys.
        k: neighbours of each query.

    Raises:
        UserError: the index was made from another datastore or is damaged.
    """
    rows, distances = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), np.inf, np.float32)
    manifest = index_manifest(workdir, datastore)
    for shard in range(len(manifest["shards"])):
        index, first = open_index(workdir, datastore, manifest, shard)
        for start in range(0, len(queries), SEARCH_BLOCK):
            some = slice(start, start + SEARCH_BLOCK)
            found, its = index.search(queries[some], k)
            both = [(rows[some], distances[some]), (np.where(found < 0, -1, found + first), its)]
            rows[some], distances[some] = merge_nearest(both, k)
        del index  # its memory, before the next is loaded
    return rows, distances
