"""faiss: lists of near keys and 4-bit product codes, compared in registers (André et al. 2017), propose candidates."""

import math
from pathlib import Path

import faiss
import numpy as np
from jaxtyping import Float, Int

from resmem_lm.datastore import Datastore
from resmem_lm.index import SMALL, Tree
from resmem_lm.published import Record

FILE = "index.faiss"
BLOCK = 2**16  # keys added at a time; a multiple of 8, as bits are packed
CODE_DIMENSIONS, CODE_BITS = 2, 4  # of one code
SAMPLE_OF_LIST = 64  # rows for each list: k-means finds no better ones with more


def tree(rows: int, dimensions: int, training_rows: int) -> Tree:
    """Lists, how many a query looks through (more find hardly more), and the rows from which they are learned.

    The latter are at least as many as lists and values of a code.
    """
    lists = max(1, math.isqrt(rows))
    sample = max(min(training_rows, SAMPLE_OF_LIST * lists), lists, 2**CODE_BITS)
    return Tree(lists, min(lists, max(32, lists // 32)), min(rows, sample), rounds=10)


def _even(keys: Float[np.ndarray, "rows emb"]) -> Float[np.ndarray, "rows even"]:
    """With a column of zeros where their number is odd, which changes no distance: a code has two dimensions."""
    return np.pad(keys, ((0, 0), (0, keys.shape[1] % CODE_DIMENSIONS))) if keys.shape[1] % CODE_DIMENSIONS else keys


def learn(sample: Float[np.ndarray, "rows emb"], lists: int) -> faiss.IndexIVFPQFastScan:
    """An empty index with the lists and codes that a sample of at least 16 keys gives; always the same ones for the same sample."""
    sample = _even(sample)
    dimensions = sample.shape[1]
    # Codes of the keys themselves: those of their differences from a list's centre need a table for each list, and three times as long.
    index = faiss.IndexIVFPQFastScan(faiss.IndexFlatL2(dimensions), dimensions, lists, dimensions // CODE_DIMENSIONS, CODE_BITS)
    index.by_residual = False
    # faiss warns below 39 points for each centre.
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1
    index.train(sample)
    return index


def add(index: faiss.IndexIVFPQFastScan, keys: Float[np.ndarray, "rows emb"]) -> None:
    """Adds keys, which get the next rows' numbers."""
    index.add(_even(keys))


def write(index: faiss.IndexIVFPQFastScan, folder: Path) -> None:
    """Writes index.faiss; OSError where the disk is full, which faiss's own writer tells otherwise."""
    with (folder / FILE).open("wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def build(datastore: Datastore, folder: Path, settings: Record) -> Record:
    """Writes the index of some shards of a datastore; returns the tree's parameters. Nothing below `SMALL` rows: all are compared."""
    rows = datastore.rows
    if rows < SMALL:
        return {}
    found = tree(rows, datastore.array("key_codes").shape[1], settings["training_rows"])
    index = learn(datastore.keys(np.arange(found.sample) * rows // found.sample), found.leaves)
    for shard, record in enumerate(datastore.shards):
        for start in range(0, record["rows"], BLOCK):
            add(index, datastore.shard_keys(shard, slice(start, start + BLOCK)))
    write(index, folder)
    return {"leaves": found.leaves, "leaves_to_search": found.searched}


def propose(
    index: faiss.IndexIVFPQFastScan,
    queries: Float[np.ndarray, "queries emb"],
    wanted: int,
    probed: int,
    selector: faiss.IDSelector | None = None,
) -> Int[np.ndarray, "queries wanted"]:
    """The rows whose codes are nearest in so many lists, of those that are selected; -1 where there are fewer."""
    chosen = {} if selector is None else {"sel": selector}
    rows: np.ndarray = index.search(_even(queries), wanted, params=faiss.SearchParametersIVF(nprobe=probed, **chosen))[1]
    return rows


class Searcher:
    """index.faiss, read into memory. See `resmem_lm.index.Proposer`."""

    def __init__(self, datastore: Datastore, folder: Path, record: Record) -> None:
        self._index, self._probed = faiss.read_index(str(folder / FILE)), record["leaves_to_search"]
        self._remembered = None
        if datastore.remembered_rows < datastore.rows:
            blocks = (np.arange(start, min(start + BLOCK, datastore.rows)) for start in range(0, datastore.rows, BLOCK))
            bits = np.concatenate([np.packbits(~datastore.is_forgotten(rows), bitorder="little") for rows in blocks])
            self._remembered = faiss.IDSelectorBitmap(bits)

    def propose(self, queries: Float[np.ndarray, "queries emb"], wanted: int, needed: int) -> Int[np.ndarray, "queries wanted"]:
        """See `resmem_lm.index.Proposer`. More lists are looked through for a query that found too few rows."""
        rows = np.full((len(queries), wanted), -1, np.int64)
        asked, probed = np.arange(len(queries)), self._probed
        while len(asked):
            rows[asked] = propose(self._index, queries[asked], wanted, probed, self._remembered)
            asked = asked[rows[asked, needed - 1] < 0] if probed < self._index.nlist else asked[:0]
            probed = min(self._index.nlist, 4 * probed)
        return rows


def _code_bytes(dimensions: int) -> int:
    """Of a row: faiss stores an even number of codes, two in a byte."""
    return -(-dimensions // (2 * CODE_DIMENSIONS))


def index_bytes(rows: int, dimensions: int) -> int:
    """Of index.faiss: codes and number of every row, centres of lists and codes; lists are filled up to 32 rows."""
    if rows < SMALL:
        return 0
    lists, even = tree(rows, dimensions, rows).leaves, dimensions + dimensions % CODE_DIMENSIONS
    return rows * (8 + _code_bytes(dimensions)) + lists * (16 * _code_bytes(dimensions) + 4 * even + 16) + 4 * 2**CODE_BITS * even + 250


def index_memory(rows: int, dimensions: int, training_rows: int) -> int:
    """That the build takes: the sample and what k-means makes of it, a block of keys with their codes, and lists that grow by half."""
    sample = tree(rows, dimensions, training_rows).sample
    return 2 * rows * (8 + _code_bytes(dimensions)) + 8 * (sample + min(rows, BLOCK)) * dimensions
