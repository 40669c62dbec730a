"""Count how many tokens before a row equal the tokens before a query."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int, Integer, UInt8

LONGEST = 32  # longer matches count as 32


def match_lengths(
    rows: Int[np.ndarray, "queries k"],
    token_of: Callable[[Int[np.ndarray, " some"]], Integer[np.ndarray, " some"]],
    tokens: Integer[np.ndarray, " queries"],
    positions: Int[np.ndarray, " queries"],
) -> UInt8[np.ndarray, "queries k"]:
    """Return the number of tokens before each row that equal the tokens before its query, at most LONGEST.

    A match stays inside both documents, because each document ends with a token that no context contains.

    Args:
        rows: rows of each query; a negative row has no match.
        token_of: returns the tokens of rows.
        tokens: the queries' tokens, in order.
        positions: the positions of the queries in their documents.
    """
    lengths = np.zeros(rows.size, np.uint8)
    flat, queries = rows.reshape(-1), np.repeat(np.arange(len(rows)), rows.shape[1])
    equal = np.flatnonzero(flat >= 0)  # pairs whose tokens are equal so far
    for back in range(1, LONGEST + 1):
        equal = equal[(positions[queries[equal]] >= back) & (flat[equal] >= back)]
        equal = equal[token_of(flat[equal] - back) == tokens[queries[equal] - back]]
        lengths[equal] = back
    return lengths.reshape(rows.shape)
