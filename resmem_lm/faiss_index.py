"""faiss: lists of near keys and 4-bit product codes, compared in registers (André et al. 2017), propose candidates.

A code is of three dimensions of a key's difference from the centre of its list, with as many bits everywhere. So keys are turned
at random first, which spreads what they have over all dimensions and changes no distance.
"""

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
CODE_DIMENSIONS, CODE_BITS = 3, 4  # of one code
SEED = 1  # of the rotation
SAMPLE_OF_LIST = 64  # rows for each list: k-means finds no better ones with more


def tree(rows: int, dimensions: int, training_rows: int) -> Tree:
    """Lists, how many a query looks through (more find little more), and the rows from which they are learned.

    The latter are at least as many as lists and values of a code.
    """
    lists = max(1, math.isqrt(rows) // 2)
    sample = max(min(training_rows, SAMPLE_OF_LIST * lists), lists, 2**CODE_BITS)
    return Tree(lists, min(lists, max(12, lists // 40)), min(rows, sample), rounds=10)


def learn(sample: Float[np.ndarray, "rows emb"], lists: int) -> faiss.IndexPreTransform:
    """An empty index with the lists and codes that a sample of at least 16 keys gives; always the same ones for the same sample."""
    dimensions, turned = sample.shape[1], _whole(sample.shape[1])
    index = faiss.IndexIVFPQFastScan(faiss.IndexFlatL2(turned), turned, lists, turned // CODE_DIMENSIONS, CODE_BITS)
    index.by_residual = True
    # faiss warns below 39 points for each centre.
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1
    rotation = faiss.RandomRotationMatrix(dimensions, turned)
    rotation.init(SEED)
    whole = faiss.IndexPreTransform(rotation, index)
    whole.train(sample)
    return whole


def _whole(dimensions: int) -> int:
    """As many as fill the codes."""
    return dimensions + -dimensions % CODE_DIMENSIONS


def write(index: faiss.IndexPreTransform, folder: Path) -> None:
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
            index.add(datastore.shard_keys(shard, slice(start, start + BLOCK)))
    write(index, folder)
    return {"leaves": found.leaves, "leaves_to_search": found.searched}


def propose(
    index: faiss.IndexPreTransform,
    queries: Float[np.ndarray, "queries emb"],
    wanted: int,
    probed: int,
    selector: faiss.IDSelector | None = None,
) -> Int[np.ndarray, "queries wanted"]:
    """The rows whose codes are nearest in so many lists, of those that are selected; -1 where there are fewer."""
    chosen = {} if selector is None else {"sel": selector}
    within = faiss.SearchParametersIVF(nprobe=probed, **chosen)
    rows: np.ndarray = index.search(queries, wanted, params=faiss.SearchParametersPreTransform(index_params=within))[1]
    return rows


class Searcher:
    """index.faiss, read into memory. See `resmem_lm.index.Proposer`."""

    def __init__(self, datastore: Datastore, folder: Path, record: Record) -> None:
        self._index, self._probed = faiss.read_index(str(folder / FILE)), record["leaves_to_search"]
        self._lists = faiss.extract_index_ivf(self._index).nlist
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
            asked = asked[rows[asked, needed - 1] < 0] if probed < self._lists else asked[:0]
            probed = min(self._lists, 4 * probed)
        return rows


def _code_bytes(dimensions: int) -> int:
    """Of a row: faiss stores an even number of codes, two in a byte."""
    return -(-dimensions // (2 * CODE_DIMENSIONS))


def index_bytes(rows: int, dimensions: int) -> int:
    """Of index.faiss: codes and number of every row, centres of lists and codes; lists are filled up to 32 rows."""
    if rows < SMALL:
        return 0
    lists, whole = tree(rows, dimensions, rows).leaves, _whole(dimensions)
    return (
        rows * (8 + _code_bytes(dimensions))
        + lists * (16 * _code_bytes(dimensions) + 4 * whole + 16)
        + 4 * (2**CODE_BITS + dimensions) * whole
        + 350
    )


def index_memory(rows: int, dimensions: int, training_rows: int) -> int:
    """That the build takes: the sample and what k-means makes of it, a block of keys with their codes, and lists that grow by half."""
    sample = tree(rows, dimensions, training_rows).sample
    return 2 * rows * (8 + _code_bytes(dimensions)) + 8 * (sample + min(rows, BLOCK)) * dimensions
