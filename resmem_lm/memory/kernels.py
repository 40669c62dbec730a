"""Compile loops over scattered rows with Numba, because neither NumPy nor XLA computes them in one pass over memory.

Numba compiles each function at its first call and caches the result on disk. The loops release the GIL, so threads run in parallel.
"""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from jaxtyping import Float, Int, Int8, Integer, UInt8, UInt16
from llvmlite import ir  # a dependency of Numba
from numba.extending import intrinsic

AHEAD = 4  # distance in rows between the row that is read and the row that is prefetched
LINE = 64  # bytes of a cache line
FLOAT16 = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)  # Numba has no float16 on a CPU


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function with Numba."""
    # `unwrap` removes the shape checks of tests, which Numba cannot compile. `reassoc` lets sums vectorize and respects NaN and infinity.
    compiled: Callable[..., Any] = numba.njit(nogil=True, fastmath={"contract", "reassoc"})(inspect.unwrap(function))
    with contextlib.suppress(RuntimeError):  # no folder for the cache is writable
        compiled.enable_caching()  # type: ignore[attr-defined]
    return compiled


@intrinsic
def _prefetch(typing_context: Any, address: Any) -> Any:
    """Prefetch the cache line at an address. An invalid address is allowed."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, pointer = ir.IntType(32), ir.PointerType(ir.IntType(8))
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        builder.call(prefetch, [builder.inttoptr(arguments[0], pointer), number(0), number(3), number(1)])  # read, keep, data
        return context.get_dummy_value()

    return numba.types.void(numba.types.intp), generate


@compiled
def distances(
    queries: Float[np.ndarray, "queries emb"],
    quantized_keys: Sequence[Int8[np.ndarray, "_ emb"]],
    scales: Sequence[UInt16[np.ndarray, "_"]],
    offsets: Int[np.ndarray, " ends"],
    rows: Int[np.ndarray, "queries n"],
) -> Float[np.ndarray, "queries n"]:
    """Return the L2 distances of each query to its rows, which must be ascending. The distance of a negative row is infinite.

    `quantized_keys` and `scales` are `numba.typed.List` of one array per shard; scales are the bits of float16. `offsets` has the first row
    of each shard and, last, the number of rows.
    """
    found = np.empty(rows.shape, np.float32)
    for query in range(len(rows)):
        key, shard, shard_keys, shard_scales = queries[query], 0, quantized_keys[0], scales[0]
        for place in range(rows.shape[1]):
            row = rows[query, place]
            if row < 0:
                found[query, place] = np.inf
                continue
            if row >= offsets[shard + 1]:
                while row >= offsets[shard + 1]:
                    shard += 1
                shard_keys, shard_scales = quantized_keys[shard], scales[shard]
            if place + AHEAD < rows.shape[1]:  # wrong but harmless if that row is in a later shard
                ahead = rows[query, place + AHEAD] - offsets[shard]
                for byte in range(0, len(key) + LINE - 1, LINE):
                    _prefetch(shard_keys.ctypes.data + ahead * len(key) + byte)  # type: ignore[call-arg]
                _prefetch(shard_scales.ctypes.data + ahead * shard_scales.itemsize)  # type: ignore[call-arg]
            quantized, scale = shard_keys[row - offsets[shard]], FLOAT16[shard_scales[row - offsets[shard]]]
            total = np.float32(0)
            for dimension in range(len(key)):
                difference = key[dimension] - scale * np.float32(quantized[dimension])
                total += difference * difference
            found[query, place] = np.sqrt(total)
    return found


@compiled
def quantized_at(
    candidates: Int[np.ndarray, "queries candidates"],
    ids: Integer[np.ndarray, "queries k others"],
    quantized: UInt8[np.ndarray, "queries k others"],
    vocabulary: int,
) -> UInt8[np.ndarray, "queries k candidates"]:
    """Return the quantized probability of each candidate token in the row of each neighbor, or 0 if the row does not store the token.

    A table over the vocabulary, which stays in the cache, maps each id to its candidate. All other ids map to an unused place, which costs
    less than a branch. `ids` and `quantized` are the tokens and probabilities that each row stores; ids are below `vocabulary`.
    """
    (queries, k, others), count = ids.shape, candidates.shape[1]
    place = np.full(vocabulary, count, np.uint16)
    row = np.empty(count + 1, np.uint8)
    repeated = np.empty((count, 2), np.int64)
    found = np.empty((queries, k, count), np.uint8)
    for query in range(queries):
        for number in range(count):
            place[candidates[query, number]] = number
        # If a candidate occurs more than once, the table has its last place. `repeated` pairs each other place with the last one.
        pairs = 0
        for number in range(count):
            last = place[candidates[query, number]]
            if last != number:
                repeated[pairs, 0], repeated[pairs, 1] = number, last
                pairs += 1
        for neighbor in range(k):
            row[:] = 0
            for entry in range(others):
                row[place[ids[query, neighbor, entry]]] = quantized[query, neighbor, entry]
            for pair in range(pairs):
                row[repeated[pair, 0]] = row[repeated[pair, 1]]
            for number in range(count):
                found[query, neighbor, number] = row[number]
        for number in range(count):
            place[candidates[query, number]] = count
    return found
