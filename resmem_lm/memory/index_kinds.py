"""The kinds of index, and how many rows one shard of each may have."""

from typing import Any

from resmem_lm.memory import faiss_index, scann_index


def library(kind: str) -> Any:
    """The module of a kind of index, with `tree`, `build`, `Searcher`, `index_bytes` and `index_memory`; faiss's for an exact one, whose
    search is shared among workers likewise.
    """
    return scann_index if kind == "scann" else faiss_index


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


PROCESS_BYTES = 2**30  # libraries and compiled programs
