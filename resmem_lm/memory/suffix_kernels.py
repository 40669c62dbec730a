"""Compile the loops of the suffix index with Numba (see `resmem_lm.memory.kernels`)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Int32, Integer, UInt

from resmem_lm.memory.kernels import compiled
from resmem_lm.memory.matches import LONGEST

SAMPLE = 1024  # occurrences of an n-gram that are counted in a shard; evenly spaced if there are more


@compiled
def _token_at(tokens: UInt[np.ndarray, " rows"], place: int) -> np.int64:
    """Return the token at a place, or -1 before the first one."""
    return np.int64(tokens[place]) if place >= 0 else np.int64(-1)


@compiled
def _first(tokens: UInt[np.ndarray, " rows"], ends: Int32[np.ndarray, " rows"], low: int, high: int, back: int, least: np.int64) -> int:
    """Return the first place of `ends` from `low` to `high` whose token `back` places before is at least `least`; `high` if none is."""
    while low < high:
        middle = (low + high) // 2
        if _token_at(tokens, ends[middle] - back) < least:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def intervals(
    tokens: UInt[np.ndarray, " rows"],
    ends: Int32[np.ndarray, " rows"],
    context: Integer[np.ndarray, " queries"],
    positions: Int[np.ndarray, " queries"],
) -> Int32[np.ndarray, "queries orders 2"]:
    """Return, for each number n of tokens before a query, the interval of `ends` whose places end with the same n tokens.

    The interval of n = 0 is the whole index. An interval is empty if these n tokens do not occur.
    """
    found = np.zeros((len(positions), LONGEST + 1, 2), np.int32)
    for query in range(len(positions)):
        low, high = 0, len(ends)
        found[query, 0, 1] = high
        for back in range(min(LONGEST, positions[query])):
            wanted = np.int64(context[query - 1 - back])
            low = _first(tokens, ends, low, high, back, wanted)
            high = _first(tokens, ends, low, high, back, wanted + 1)
            if low == high:
                break
            found[query, back + 1, 0], found[query, back + 1, 1] = low, high
    return found


@compiled
def _occurrences(found: Int32[np.ndarray, "shards queries orders 2"], query: int, order: int) -> int:
    total = 0
    for shard in range(len(found)):
        total += found[shard, query, order, 1] - found[shard, query, order, 0]
    return total


@compiled
def _count(
    tokens: Sequence[UInt[np.ndarray, "_"]],
    ends: Sequence[Int32[np.ndarray, "_"]],
    found: Int32[np.ndarray, "shards queries orders 2"],
    query: int,
    order: int,
    table: Float[np.ndarray, " vocabulary"],
    seen: Int32[np.ndarray, " vocabulary"],
) -> int:
    """Add the counts of the tokens that follow a match to `table`, and these tokens to `seen`. Return the number of distinct ones."""
    distinct = 0
    for shard in range(len(found)):
        low, high = found[shard, query, order]
        sampled = min(high - low, SAMPLE)
        shard_tokens, shard_ends = tokens[shard], ends[shard]  # a typed list counts references at every access
        for number in range(sampled):
            token = shard_tokens[shard_ends[low + number * (high - low) // sampled] + 1]
            if table[token] == 0:
                seen[distinct] = token
                distinct += 1
            table[token] += (high - low) / sampled
    return distinct


@compiled
def continuations(
    tokens: Sequence[UInt[np.ndarray, "_"]],
    ends: Sequence[Int32[np.ndarray, "_"]],
    found: Int32[np.ndarray, "shards queries orders 2"],
    count: int,
    vocabulary: int,
) -> Int32[np.ndarray, "queries count"]:
    """Return the tokens that follow the longest match most often, then those that follow shorter matches; -1 if there are fewer."""
    chosen = np.full((found.shape[1], count), -1, np.int32)
    table, seen = np.zeros(vocabulary, np.float32), np.empty(vocabulary, np.int32)
    for query in range(found.shape[1]):
        number, previous = 0, 0
        for order in range(LONGEST, 0, -1):
            size = _occurrences(found, query, order)
            if size == previous:  # the same occurrences as those of the longer match
                continue
            previous = size
            new = _count(tokens, ends, found, query, order, table, seen)
            for place in range(number):
                table[chosen[query, place]] = 0
            while number < count:
                best, often = -1, np.float32(0)
                for token in seen[:new]:  # the lowest id among equally frequent tokens, whatever the shards
                    if table[token] > often or (table[token] == often and 0 <= token < best):
                        best, often = token, table[token]
                if often == 0:
                    break
                chosen[query, number] = best
                table[best] = 0
                number += 1
            table[seen[:new]] = 0
            if number == count:
                break
    return chosen


@compiled
def smooth(
    tokens: Sequence[UInt[np.ndarray, "_"]],
    ends: Sequence[Int32[np.ndarray, "_"]],
    found: Int32[np.ndarray, "shards queries orders 2"],
    columns: Integer[np.ndarray, "queries columns"],
    probabilities: Float[np.ndarray, "queries columns"],
    vocabulary: int,
    shortest: int,
) -> Float[np.ndarray, "queries facts"]:
    """Smooth `probabilities` of the columns' tokens, in place, with the counts of every order from `shortest` to the longest match.

    Return the length of the longest match, the number of its occurrences, and the number of distinct tokens that follow it.
    """
    table, seen = np.zeros(vocabulary, np.float32), np.empty(vocabulary, np.int32)
    facts = np.zeros((found.shape[1], 3), np.float32)
    for query in range(found.shape[1]):
        previous = 0
        for order in range(1, LONGEST + 1):
            size = _occurrences(found, query, order)
            if size == 0:
                break
            facts[query, 0] = order
            if size == previous:
                continue
            previous = size
            distinct = _count(tokens, ends, found, query, order, table, seen)
            facts[query, 1], facts[query, 2] = size, distinct
            if order >= shortest:
                for column in range(columns.shape[1]):
                    seen_often = table[columns[query, column]]
                    probabilities[query, column] = (seen_often + distinct * probabilities[query, column]) / (size + distinct)
            table[seen[:distinct]] = 0
    return facts
