"""Build and search the faiss index: inverted lists with 4-bit product quantization, compared in registers (André et al. 2017).

Each code quantizes three dimensions of the difference between a key and the center of its list. Because all codes have the same number of
bits, a random rotation first spreads the variance of the keys over all dimensions. It preserves distances.
"""

import math
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
BLOCK = 2**13  # keys added at a time: few, to reuse memory, and a multiple of 8, because a bitmap packs 8 rows per byte
CODE_DIMENSIONS, CODE_BITS = 3, 4
SEED = 1  # of the rotation
SAMPLE_OF_LIST = 64  # rows per list for k-means; more rows give no better lists
NEIGHBORS, COVERED = 50, 0.99  # the probed lists must contain the share COVERED of a query's NEIGHBORS nearest rows
RADIUS_QUERIES = 1000  # rows used as queries to fit the probe radius


def tree(rows: int, dimensions: int, training_rows: int) -> Tree:
    """Return the number of lists, the maximum of probed lists (more improve recall little), and the number of rows to train on.

    k-means needs at least one row per list and per value of a code.
    """
    lists = max(1, math.isqrt(rows) // 2)
    sample = max(min(training_rows, SAMPLE_OF_LIST * lists), lists, 2**CODE_BITS)
    return Tree(lists, min(lists, max(16, lists // 40)), min(rows, sample), rounds=10)


def learn(sample: Float[np.ndarray, "rows emb"], lists: int) -> "faiss.IndexPreTransform":
    """Return an empty index trained on a sample of at least 16 keys. Training is deterministic."""
    dimensions, rotated = sample.shape[1], _rotated_dimensions(sample.shape[1])
    index = faiss.IndexIVFPQFastScan(faiss.IndexFlatL2(rotated), rotated, lists, rotated // CODE_DIMENSIONS, CODE_BITS)
    index.by_residual = True
    # This avoids a warning of faiss about fewer than 39 points per center.
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1
    rotation = faiss.RandomRotationMatrix(dimensions, rotated)
    rotation.init(SEED)
    whole = faiss.IndexPreTransform(rotation, index)
    whole.train(sample)
    return whole


def probe_radius(index: "faiss.IndexPreTransform", sample: Float[np.ndarray, "rows emb"], neighbors: int) -> float:
    """Return the probe radius: a query probes the lists whose center is within this multiple of the distance to the nearest center.

    It is the smallest radius at which the probed lists contain the share COVERED of the nearest neighbors. Rows of the sample serve as
    queries. `neighbors` is the average number of a query's nearest neighbors that are in the sample.
    """
    rotation, ivf = parts(index)
    centers, rotated = ivf.quantizer, rotation.apply(sample)
    queries = rotated[:: -(-len(rotated) // RADIUS_QUERIES)]
    near = faiss.knn(queries, rotated, 1 + min(neighbors, len(rotated) - 1))[1][:, 1:]  # without the query itself
    of_lists = centers.reconstruct_batch(centers.search(rotated, 1)[1][near.ravel(), 0]).reshape(*near.shape, -1)
    theirs = np.sum(np.square(queries[:, None] - of_lists), axis=-1, dtype=np.float64)
    nearest = np.maximum(centers.search(queries, 1)[0], 1e-9)  # the distance is 0 if all rows of a list are equal
    return max(1.0, float(np.sqrt(np.quantile(theirs / nearest, COVERED)).round(3)))


def _rotated_dimensions(dimensions: int) -> int:
    """Return the number of dimensions of rotated keys, a multiple of CODE_DIMENSIONS."""
    return dimensions + -dimensions % CODE_DIMENSIONS


def build(datastore: Datastore, folder: Path, settings: Record) -> Record:
    """Write the index of part of a datastore and return its parameters. Below `SMALL` rows, write nothing: the search is exact."""
    rows = datastore.rows
    if rows < SMALL:
        return {}
    chosen = tree(rows, datastore.array("quantized_keys").shape[1], settings["training_rows"])
    sample = datastore.keys(np.arange(chosen.sample) * rows // chosen.sample)
    index = learn(sample, chosen.leaves)
    radius = probe_radius(index, sample, max(1, round(NEIGHBORS * chosen.sample / rows)))
    parts(index)[1].pq.sync_transposed_centroids()  # reduces the time to encode to three fifths
    for shard, record in enumerate(datastore.shards):
        for start in range(0, record["rows"], BLOCK):
            index.add(datastore.shard_keys(shard, slice(start, start + BLOCK)))
    with (folder / FILE).open("wb") as file:  # faiss's own writer does not raise OSError if the disk is full
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
    return {"leaves": chosen.leaves, "leaves_to_search": chosen.probed, "probe_radius": radius}


def parts(index: "faiss.IndexPreTransform") -> "tuple[faiss.VectorTransform, faiss.IndexIVFPQFastScan]":
    """Return the rotation and the inverted lists of an index. The caller must keep the index alive."""
    return index.chain.at(0), faiss.downcast_index(index.index)


class Searcher:
    """A `Proposer` that holds index.faiss in memory."""

    def __init__(self, datastore: Datastore, folder: Path, record: Record) -> None:
        self._index = faiss.read_index(str(folder / FILE))
        self.rotation, self._ivf = parts(self._index)
        self._most, self._radius = record["leaves_to_search"], record["probe_radius"]
        self._only_live = {}
        if datastore.live_rows < datastore.rows:
            blocks = (np.arange(start, min(start + BLOCK, datastore.rows)) for start in range(0, datastore.rows, BLOCK))
            bits = np.concatenate([np.packbits(~datastore.is_deleted(rows), bitorder="little") for rows in blocks])
            self._only_live = {"sel": faiss.IDSelectorBitmap(bits)}

    def lists(
        self, rotated: Float[np.ndarray, "queries whole"]
    ) -> tuple[Int[np.ndarray, "queries most"], Float[np.ndarray, "queries most"], Int[np.ndarray, " queries"]]:
        """Return the nearest lists of rotated queries, the squared distances to their centers, and the number of lists to probe.

        This number is rounded up to a power of two, so that many queries share it, and is limited to the maximum of probed lists.
        """
        squared, lists = self._ivf.quantizer.search(rotated, self._most)
        near = np.sum(squared <= self._radius**2 * squared[:, :1], axis=1)
        return lists, squared, np.minimum(self._most, 2 ** np.ceil(np.log2(near)).astype(np.int64))

    def propose(self, queries: Float[np.ndarray, "queries emb"], wanted: int, needed: int) -> Int[np.ndarray, "queries wanted"]:
        """Propose rows as `Proposer.propose` specifies. A query with too few rows probes four times as many lists, and so on."""
        faiss.omp_set_num_threads(1)  # for the calling thread only; other threads search at the same time
        rotated = self.rotation.apply(queries)
        lists, squared, counts = self.lists(rotated)
        rows, pending = np.full((len(queries), wanted), -1, np.int64), np.arange(len(queries))
        while len(pending):
            for count in np.unique(counts):
                some = np.flatnonzero(counts == count)
                rows[pending[some]] = self._nearest_codes(rotated[pending[some]], lists[some, :count], squared[some, :count], wanted)
            few = (rows[pending, needed - 1] < 0) & (counts < self._ivf.nlist)
            pending, counts = pending[few], np.minimum(self._ivf.nlist, 4 * counts[few])
            if len(pending):
                squared, lists = self._ivf.quantizer.search(rotated[pending], int(counts.max()))
        return rows

    def _nearest_codes(
        self, rotated: Float[np.ndarray, "some whole"], lists: Int[np.ndarray, "some n"], squared: Float[np.ndarray, "some n"], wanted: int
    ) -> Int[np.ndarray, "some wanted"]:
        """Return the live rows with the nearest codes in the lists, padded with -1. `squared` has the squared distances to the centers."""
        # The lists are given, which saves a second comparison with all centers. The C function takes their number as an argument. faiss's
        # Python wrapper reads it from the index, which threads share.
        parameters = faiss.SearchParametersIVF(nprobe=lists.shape[1], **self._only_live)
        lists, squared = np.ascontiguousarray(lists), np.ascontiguousarray(squared)
        rows, distances = np.empty((len(rotated), wanted), np.int64), np.empty((len(rotated), wanted), np.float32)
        pointers = [faiss.swig_ptr(array) for array in (lists, squared, distances, rows)]
        self._ivf.search_preassigned_c(len(rotated), faiss.swig_ptr(rotated), wanted, *pointers, False, parameters)
        return rows


def _code_bytes(dimensions: int) -> int:
    """Return the size of a row's codes in bytes: two codes per byte, padded to an even number of codes."""
    return -(-dimensions // (2 * CODE_DIMENSIONS))


def index_bytes(rows: int, dimensions: int) -> int:
    """Return the size of index.faiss in bytes: the codes and the id of each row, the centers, and lists padded to 32 rows."""
    if rows < SMALL:
        return 0
    lists, rotated = tree(rows, dimensions, rows).leaves, _rotated_dimensions(dimensions)
    of_rows, of_lists = rows * (8 + _code_bytes(dimensions)), lists * (16 * _code_bytes(dimensions) + 4 * rotated + 16)
    return of_rows + of_lists + 4 * (2**CODE_BITS + dimensions) * rotated + 350


def index_memory(rows: int, dimensions: int, training_rows: int) -> int:
    """Return the peak memory of an index build in bytes.

    It is the sum of two copies of the sample (k-means copies it), the lists with room to grow, and the larger of two buffers: a block of
    rotated keys with their differences, or the neighbors that `probe_radius` compares. The second is largest for the fewest rows.
    """
    sample, rotated = tree(rows, dimensions, training_rows).sample, _rotated_dimensions(dimensions)
    compared = RADIUS_QUERIES * NEIGHBORS * tree(SMALL, dimensions, training_rows).sample // SMALL
    return 2 * rows * (8 + _code_bytes(dimensions)) + 8 * sample * rotated + 12 * max(BLOCK, compared) * rotated
