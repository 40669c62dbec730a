"""What neither NumPy nor XLA does in one pass over memory: distances to scattered rows, and the entries of a row that matter.

Numba compiles each when it is first called. Threads run them side by side: they hold no lock of Python's.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from jaxtyping import Float, Int, Int8, Integer, UInt8, UInt16
from llvmlite import ir  # which Numba brings
from numba.extending import intrinsic

AHEAD = 4  # rows between the one that is read and the one that is fetched into the cache
LINE = 64  # bytes that the cache fetches at once
FLOAT16 = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)  # which Numba does not know


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # What checks shapes in tests wraps a function in one of Python's, which is no matter for Numba.
    # Sums may be taken in any order, so that they stay in registers; nothing is assumed of NaN and infinity.
    compiled: Callable[..., Any] = numba.njit(nogil=True, fastmath={"contract", "reassoc"})(inspect.unwrap(function))
    return compiled


@intrinsic
def _prefetch(typing_context: Any, address: Any) -> Any:
    """Fetches what is at an address into the cache, without waiting for it; no harm if there is nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, pointer = ir.IntType(32), ir.PointerType(ir.IntType(8))
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        builder.call(prefetch, [builder.inttoptr(arguments[0], pointer), number(0), number(3), number(1)])  # to read, to keep, data
        return context.get_dummy_value()

    return numba.types.void(numba.types.intp), generate


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
            if place + AHEAD < rows.shape[1]:  # memory is slow, but answers many at once; beyond the shard, the guess is wrong
                ahead = rows[query, place + AHEAD] - offsets[shard]
                for byte in range(0, len(key) + LINE - 1, LINE):
                    _prefetch(some_codes.ctypes.data + ahead * len(key) + byte)  # type: ignore[call-arg]
                _prefetch(some_scales.ctypes.data + ahead * some_scales.itemsize)  # type: ignore[call-arg]
            code, scale = some_codes[row - offsets[shard]], FLOAT16[some_scales[row - offsets[shard]]]
            total = np.float32(0)
            for dimension in range(len(key)):
                difference = key[dimension] - scale * np.float32(code[dimension])
                total += difference * difference
            found[query, place] = np.sqrt(total)
    return found


@_compiled
def quantized_at(
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
    twice = np.empty((count, 2), np.int64)
    found = np.empty((queries, k, count), np.uint8)
    for query in range(queries):
        for number in range(count):
            place[candidates[query, number]] = number
        # A token may stand twice among the candidates; the table has the last of its places.
        pairs = 0
        for number in range(count):
            last = place[candidates[query, number]]
            if last != number:
                twice[pairs, 0], twice[pairs, 1] = number, last
                pairs += 1
        for neighbor in range(k):
            row[:] = 0
            for entry in range(others):
                row[place[ids[query, neighbor, entry]]] = codes[query, neighbor, entry]
            for pair in range(pairs):
                row[twice[pair, 0]] = row[twice[pair, 1]]
            for number in range(count):
                found[query, neighbor, number] = row[number]
        for number in range(count):
            place[candidates[query, number]] = count
    return found
