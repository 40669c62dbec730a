"""The kinds of index, and their sizes: how many rows one shard of an index may have."""

from typing import Any

from resmem_lm.memory import faiss_index, scann_index

# Each module has `tree`, `build`, `Searcher`, `index_bytes` and `index_memory`. An exact search is divided among workers as faiss's is.
LIBRARIES: dict[str, Any] = {"faiss": faiss_index, "scann": scann_index, "exact": faiss_index}
PROCESS_BYTES = 2**30  # memory of a worker process for libraries and compiled programs


def library(kind: str) -> Any:
    """Return the module of a kind of index."""
    return LIBRARIES[kind]


def index_bytes(kind: str, rows: int, dimensions: int) -> int:
    """Return the size of the files of an index."""
    return 0 if kind == "exact" else int(library(kind).index_bytes(rows, dimensions))


def index_memory(kind: str, rows: int, dimensions: int, training_rows: int) -> int:
    """Return the peak memory of an index build in bytes."""
    return int(library(kind).index_memory(rows, dimensions, training_rows))


def largest_index(kind: str, memory: int, dimensions: int, training_rows: int) -> int:
    """Return the most rows whose index can be built within `memory` bytes; 0 if none."""
    low, high = 0, max(0, memory) + 1  # a row takes more than a byte
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if index_memory(kind, middle, dimensions, training_rows) <= memory else (low, middle)
    return low


def group_shards(shard_rows: list[int], most: int) -> list[tuple[int, int]]:
    """Group consecutive shards of a datastore into shards of an index. New shards of the datastore change only the last group.

    Args:
        shard_rows: rows of each shard of the datastore.
        most: rows of a group; a larger shard is a group of its own.

    Returns:
        The first shard and the number of shards of each group.
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
