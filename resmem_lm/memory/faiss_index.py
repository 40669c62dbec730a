"""faiss: lists of near keys and 4-bit product codes, compared in registers (André et al. 2017), propose candidates.

A code is of three dimensions of a key's difference from the center of its list, with as many bits everywhere. So keys are rotated
at random first, which spreads what they have over all dimensions and changes no distance.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from etils import epy
from jaxtyping import Float, Int

from resmem_lm.memory.datastore import Datastore
from resmem_lm.memory.index import SMALL, Tree
from resmem_lm.workdir.storage import Record

with epy.lazy_imports():
    import faiss

FILE = "index.faiss"
BLOCK = 2**13  # keys added at a time, few enough that memory is used again; a multiple of 8, as bits are packed
CODE_DIMENSIONS, CODE_BITS = 3, 4  # of one code
SEED = 1  # of the rotation
SAMPLE_OF_LIST = 64  # rows for each list: k-means finds no better ones with more
NEIGHBORS, COVERED = 50, 0.99  # the share of a query's neighbors that are to be in the lists which it looks through
RADIUS_QUERIES = 1000  # that stand for queries when this is learned


def tree(rows: int, dimensions: int, training_rows: int) -> Tree:
    """Lists, the most that a query looks through (more find little more), and the rows from which they are learned.

    The latter are at least as many as lists and values of a code.
    """
    lists = max(1, math.isqrt(rows) // 2)
    sample = max(min(training_rows, SAMPLE_OF_LIST * lists), lists, 2**CODE_BITS)
    return Tree(lists, min(lists, max(16, lists // 40)), min(rows, sample), rounds=10)


def learn(sample: Float[np.ndarray, "rows emb"], lists: int) -> "faiss.IndexPreTransform":
    """An empty index with the lists and codes that a sample of at least 16 keys gives; always the same ones for the same sample."""
    dimensions, rotated = sample.shape[1], _whole(sample.shape[1])
    index = faiss.IndexIVFPQFastScan(faiss.IndexFlatL2(rotated), rotated, lists, rotated // CODE_DIMENSIONS, CODE_BITS)
    index.by_residual = True
    # faiss warns below 39 points for each center.
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1
    rotation = faiss.RandomRotationMatrix(dimensions, rotated)
    rotation.init(SEED)
    whole = faiss.IndexPreTransform(rotation, index)
    whole.train(sample)
    return whole


def probe_radius(index: "faiss.IndexPreTransform", sample: Float[np.ndarray, "rows emb"], neighbors: int) -> float:
    """How far the center of a list may be, over the distance of the nearest one, for COVERED of the neighbors to be in such lists.

    Rows of the sample stand for queries, and `neighbors` is how many of a query's neighbors the sample has on average.
    """
    rotation, ivf = parts(index)
    centers, rotated = ivf.quantizer, rotation.apply(sample)
    queries = rotated[:: -(-len(rotated) // RADIUS_QUERIES)]
    near = faiss.knn(queries, rotated, 1 + min(neighbors, len(rotated) - 1))[1][:, 1:]  # but for the query itself
    of_lists = centers.reconstruct_batch(centers.search(rotated, 1)[1][near.ravel(), 0]).reshape(*near.shape, -1)
    theirs = np.sum(np.square(queries[:, None] - of_lists), axis=-1, dtype=np.float64)
    nearest = np.maximum(centers.search(queries, 1)[0], 1e-9)  # 0 where rows are equal and the only ones of their list
    return max(1.0, float(np.sqrt(np.quantile(theirs / nearest, COVERED)).round(3)))


def _whole(dimensions: int) -> int:
    """As many as fill the codes."""
    return dimensions + -dimensions % CODE_DIMENSIONS


def add(index: "faiss.IndexPreTransform", blocks: Iterable[Float[np.ndarray, "rows emb"]]) -> None:
    """Adds keys, some BLOCK at a time."""
    parts(index)[1].pq.sync_transposed_centroids()  # with which codes of three dimensions are found in three fifths of the time
    for keys in blocks:
        index.add(keys)


def write(index: "faiss.IndexPreTransform", folder: Path) -> None:
    """Writes index.faiss; OSError where the disk is full, which faiss's own writer tells otherwise."""
    with (folder / FILE).open("wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def build(datastore: Datastore, folder: Path, settings: Record) -> Record:
    """Writes the index of some shards of a datastore; returns the tree's parameters. Nothing below `SMALL` rows: all are compared."""
    rows = datastore.rows
    if rows < SMALL:
        return {}
    found = tree(rows, datastore.array("quantized_keys").shape[1], settings["training_rows"])
    sample = datastore.keys(np.arange(found.sample) * rows // found.sample)
    index = learn(sample, found.leaves)
    probe_radius = probe_radius(index, sample, max(1, round(NEIGHBORS * found.sample / rows)))
    starts = ((shard, start) for shard, record in enumerate(datastore.shards) for start in range(0, record["rows"], BLOCK))
    add(index, (datastore.shard_keys(shard, slice(start, start + BLOCK)) for shard, start in starts))
    write(index, folder)
    return {"leaves": found.leaves, "leaves_to_search": found.searched, "probe_radius": probe_radius}


def parts(index: "faiss.IndexPreTransform") -> "tuple[faiss.VectorTransform, faiss.IndexIVFPQFastScan]":
    """What turns keys, and the lists; both are gone when the index is."""
    return index.chain.at(0), faiss.downcast_index(index.index)


def nearest_codes(
    ivf: "faiss.IndexIVFPQFastScan",
    rotated: Float[np.ndarray, "queries whole"],
    lists: Int[np.ndarray, "queries lists"],
    squared: Float[np.ndarray, "queries lists"],
    wanted: int,
    selector: "faiss.IDSelector | None" = None,
) -> Int[np.ndarray, "queries wanted"]:
    """The rows whose codes are nearest in each query's lists, of those that are selected; -1 where there are fewer.

    Args:
        ivf: the index without what turns keys.
        rotated: queries, rotated as the keys are.
        lists, squared: to look through, and the squared distances of their centers.
        wanted: rows for each query.
        selector: all rows, if there is none.
    """
    # Told the lists, faiss does not look for them once more: for few queries that would be without a matrix product. What it has in
    # Python for this takes the number of lists from the index, which threads share; what is in C takes it as here.
    chosen = {} if selector is None else {"sel": selector}
    within = faiss.SearchParametersIVF(nprobe=lists.shape[1], **chosen)
    lists, squared = np.ascontiguousarray(lists), np.ascontiguousarray(squared)
    rows, distances = np.empty((len(rotated), wanted), np.int64), np.empty((len(rotated), wanted), np.float32)
    pointers = [faiss.swig_ptr(array) for array in (lists, squared, distances, rows)]
    ivf.search_preassigned_c(len(rotated), faiss.swig_ptr(rotated), wanted, *pointers, False, within)
    return rows


class Searcher:
    """index.faiss, read into memory. See `resmem_lm.index.Proposer`."""

    def __init__(self, datastore: Datastore, folder: Path, record: Record) -> None:
        self._index = faiss.read_index(str(folder / FILE))
        self.rotation, self._ivf = parts(self._index)
        self._most, self._farther = record["leaves_to_search"], record["probe_radius"]
        self._live = None
        if datastore.live_rows < datastore.rows:
            blocks = (np.arange(start, min(start + BLOCK, datastore.rows)) for start in range(0, datastore.rows, BLOCK))
            bits = np.concatenate([np.packbits(~datastore.is_deleted(rows), bitorder="little") for rows in blocks])
            self._live = faiss.IDSelectorBitmap(bits)

    def lists(
        self, rotated: Float[np.ndarray, "queries whole"]
    ) -> tuple[Int[np.ndarray, "queries most"], Float[np.ndarray, "queries most"], Int[np.ndarray, " queries"]]:
        """The lists with the nearest centers, squared distances to these, and how many of them each query looks through: a power of two,
        so that many queries have the same, or the most.
        """
        squared, lists = self._ivf.quantizer.search(rotated, self._most)
        near = np.sum(squared <= self._farther**2 * squared[:, :1], axis=1)
        return lists, squared, np.minimum(self._most, 2 ** np.ceil(np.log2(near)).astype(np.int64))

    def propose(self, queries: Float[np.ndarray, "queries emb"], wanted: int, needed: int) -> Int[np.ndarray, "queries wanted"]:
        """See `resmem_lm.index.Proposer`. More lists are looked through for a query that found too few rows."""
        faiss.omp_set_num_threads(1)  # of the calling thread, beside which others search
        rotated = self.rotation.apply(queries)
        lists, squared, counts = self.lists(rotated)
        rows, asked = np.full((len(queries), wanted), -1, np.int64), np.arange(len(queries))
        while len(asked):
            for count in np.unique(counts):
                some = np.flatnonzero(counts == count)
                theirs = rotated[asked[some]], lists[some, :count], squared[some, :count]
                rows[asked[some]] = nearest_codes(self._ivf, *theirs, wanted, self._live)
            few = (rows[asked, needed - 1] < 0) & (counts < self._ivf.nlist)
            asked, counts = asked[few], np.minimum(self._ivf.nlist, 4 * counts[few])
            if len(asked):
                squared, lists = self._ivf.quantizer.search(rotated[asked], int(counts.max()))
        return rows


def _code_bytes(dimensions: int) -> int:
    """Of a row: faiss stores an even number of codes, two in a byte."""
    return -(-dimensions // (2 * CODE_DIMENSIONS))


def index_bytes(rows: int, dimensions: int) -> int:
    """Of index.faiss: codes and number of every row, centers of lists and codes; lists are filled up to 32 rows."""
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
    """That the build takes: the sample and what k-means makes of it, lists that grow by half, and the larger of a block of keys, rotated and
    as differences, and of the sample's neighbors that `reach` compares, which are most for the fewest rows.
    """
    sample, whole = tree(rows, dimensions, training_rows).sample, _whole(dimensions)
    compared = RADIUS_QUERIES * NEIGHBORS * tree(SMALL, dimensions, training_rows).sample // SMALL
    return 2 * rows * (8 + _code_bytes(dimensions)) + 8 * sample * whole + 12 * max(BLOCK, compared) * whole
