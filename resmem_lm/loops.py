"""What neither NumPy nor XLA does in one pass over memory: distances to scattered rows, and the entries of a row that matter.

Numba compiles each when it is first called. Threads run them side by side: they hold no lock of Python's.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from jaxtyping import Float, Int, Int8, Integer, UInt8, UInt16

FLOAT16 = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)  # which Numba does not know


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # What checks shapes in tests wraps a function in one of Python's, which is no matter for Numba.
    # Sums may be taken in any order, so that they stay in registers; nothing is assumed of NaN and infinity.
    compiled: Callable[..., Any] = numba.njit(nogil=True, fastmath={"contract", "reassoc"})(inspect.unwrap(function))
    return compiled


@_compiled
def distances(
    queries: Float[np.ndarray, "queries emb"],
    codes: Sequence[Int8[np.ndarray, "_ emb"]],
    scales: Sequence[UInt16[np.ndarray, "_"]],
    offsets: Int[np.ndarray, " ends"],
    rows: Int[np.ndarray, "queries n"],
) -> Float[np.ndarray, "queries n"]:
    """L2 distances of each query to its rows, infinite where a row is negative.

    Args:
        queries: keys.
        codes, scales: those of the datastore's keys by shard, each a `numba.typed.List`; scales are the bits of float16.
        offsets: the shards' first rows, and the number of all.
        rows: numbers through all shards, ascending.
    """
    found = np.empty(rows.shape, np.float32)
    for query in range(len(rows)):
        key, shard, some_codes, some_scales = queries[query], 0, codes[0], scales[0]
        for place in range(rows.shape[1]):
            row = rows[query, place]
            if row < 0:
                found[query, place] = np.inf
                continue
            if row >= offsets[shard + 1]:
                while row >= offsets[shard + 1]:
                    shard += 1
                some_codes, some_scales = codes[shard], scales[shard]
            code, scale = some_codes[row - offsets[shard]], FLOAT16[some_scales[row - offsets[shard]]]
            total = np.float32(0)
            for dimension in range(len(key)):
                difference = key[dimension] - scale * np.float32(code[dimension])
                total += difference * difference
            found[query, place] = np.sqrt(total)
    return found


@_compiled
def codes_at(
    candidates: Int[np.ndarray, "queries candidates"],
    ids: Integer[np.ndarray, "queries k others"],
    codes: UInt8[np.ndarray, "queries k others"],
    vocabulary: int,
) -> UInt8[np.ndarray, "queries k candidates"]:
    """The code of each row's probability of each candidate, zero where it stores none. All ids are below `vocabulary`.

    A table of the vocabulary, which stays in the cache, tells where an entry belongs. For most that is a place which nobody reads: cheaper
    than to ask of each.
    """
    (queries, k, others), count = ids.shape, candidates.shape[1]
    place = np.full(vocabulary, count, np.uint16)
    row = np.empty(count + 1, np.uint8)
    found = np.empty((queries, k, count), np.uint8)
    for query in range(queries):
        for number in range(count):
            place[candidates[query, number]] = number
        for neighbor in range(k):
            row[:] = 0
            for entry in range(others):
                row[place[ids[query, neighbor, entry]]] = codes[query, neighbor, entry]
            found[query, neighbor] = row[:count]
        # A token may stand twice among the candidates; the table has the last of its places.
        for number in range(count):
            last = place[candidates[query, number]]
            if last != number:
                found[query, :, number] = found[query, :, last]
        for number in range(count):
            place[candidates[query, number]] = count
    return found
