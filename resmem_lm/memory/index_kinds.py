"""Choose the library of an index, and the number of rows of an index shard."""

import bisect
from typing import Any

from resmem_lm.memory import faiss_index, scann_index

# Each module has `tree`, `build`, `Searcher`, `index_bytes` and `index_memory`. The shards of an exact index have the sizes of faiss's.
LIBRARIES: dict[str, Any] = {"faiss": faiss_index, "scann": scann_index, "exact": faiss_index}
PROCESS_BYTES = 2**30  # memory of the libraries and compiled programs in a worker process


def library(kind: str) -> Any:
    """Return the module that implements a kind of index."""
    return LIBRARIES[kind]


def index_bytes(kind: str, rows: int, dimensions: int) -> int:
    """Return the size of an index's files in bytes."""
    return 0 if kind == "exact" else int(library(kind).index_bytes(rows, dimensions))


def index_memory(kind: str, rows: int, dimensions: int, training_rows: int) -> int:
    """Return the peak memory of an index build in bytes."""
    return int(library(kind).index_memory(rows, dimensions, training_rows))


def largest_index(kind: str, memory: int, dimensions: int, training_rows: int) -> int:
    """Return the maximum of rows for which an index can be built in `memory` bytes, or 0."""
    counts = range(1, memory + 1)  # a row needs more than a byte
    return bisect.bisect_right(counts, memory, key=lambda rows: index_memory(kind, rows, dimensions, training_rows))


def group_shards(shard_rows: list[int], most: int) -> list[tuple[int, int]]:
    """Group consecutive datastore shards into index shards of at most `most` rows; return each group's first shard and size.

    A larger datastore shard is a group of its own. Appending datastore shards changes only the last group.
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
