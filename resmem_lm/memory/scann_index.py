"""Build and search the ScaNN index (Guo et al. 2020), which the paper uses: a tree and 4-bit anisotropic product quantization."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from resmem_lm.errors import UserError
from resmem_lm.memory.datastore import Datastore
from resmem_lm.memory.index import SMALL, Tree
from resmem_lm.workdir.storage import Record


class Searcher:
    """A `Proposer` that holds ScaNN's index in memory."""

    def __init__(self, datastore: Datastore, folder: Path, record: Record) -> None:
        self.datastore = datastore
        self._searcher = _scann().load_searcher(str(folder))

    def propose(self, queries: Float[np.ndarray, "queries emb"], wanted: int, needed: int) -> Int[np.ndarray, "queries n"]:
        """Propose rows as `Proposer.propose` specifies. Repeat a query for twice as many rows if too many of its rows are deleted."""
        rows, live = self.datastore.rows, max(1, self.datastore.live_rows)
        result = np.full((len(queries), min(wanted, rows)), -1, np.int64)
        count = min(rows, -(-wanted * rows // live))  # on average, `wanted` of these rows are live
        pending = np.arange(len(queries))
        while len(pending):
            found, scores = self._searcher.search_batched_parallel(queries[pending], final_num_neighbors=count)
            # If the probed leaves have too few rows, ScaNN returns row 0 with a score of NaN.
            found = np.where(np.isnan(scores), -1, found.astype(np.int64))
            exhausted = (found < 0).any(axis=1)
            found[self.datastore.is_deleted(found)] = -1
            order = np.argsort(found < 0, axis=1, kind="stable")[:, : result.shape[1]]
            result[pending] = np.take_along_axis(found, order, axis=1)
            pending = pending[(result[pending] < 0).any(axis=1) & ~exhausted] if count < rows else pending[:0]
            count = min(rows, 2 * count)
        return result


def _scann() -> Any:
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except ImportError as error:
        raise UserError(
            f"ScaNN cannot be imported here ({error}): pip install 'resmem_lm[scann]', or set build_index.kind = 'faiss'"
        ) from None
    return scann_ops_pybind


def tree(rows: int, dimensions: int, training_rows: int) -> Tree:
    """Return the number of leaves, of probed leaves, of training rows, and of k-means rounds (ScaNN's default)."""
    leaves = int(np.clip(np.sqrt(rows), 16, rows))
    return Tree(leaves, min(leaves, max(40, leaves // 16)), min(rows, training_rows), rounds=12)


def block(dimensions: int) -> int:
    """Return the number of dimensions per code. ScaNN's fast path accepts at most 256 codes per key."""
    return max(2, -(-dimensions // 256))


def build(datastore: Datastore, folder: Path, settings: Record) -> Record:
    """Write the ScaNN index of part of a datastore, and return its distance measure and the parameters of its tree."""
    keys = np.empty((datastore.rows, datastore.array("quantized_keys").shape[1]), np.float32)
    for shard, begin in enumerate(datastore.offsets[:-1]):
        keys[begin : datastore.offsets[shard + 1]] = datastore.shard_keys(shard)
    norms = np.linalg.norm(keys[:: max(1, len(keys) // 100_000)], axis=1)
    # A search by inner products is three times faster. If all keys have the same norm, it has the same result.
    facts: Record = {"measure": "dot_product" if norms.std() < 0.02 * norms.mean() else "squared_l2"}
    builder = _scann().builder(keys, settings["candidates"], facts["measure"]).set_n_training_threads(settings["threads"])
    if datastore.rows < SMALL:
        builder = builder.score_brute_force()
    else:
        leaves, probed, sample, _ = tree(*keys.shape, settings["training_rows"])
        facts |= {"leaves": leaves, "leaves_to_search": probed, "block": block(keys.shape[1])}
        # Random centers are not reproducible. k-means++ is, because ScaNN fixes its seed.
        builder = builder.tree(num_leaves=leaves, num_leaves_to_search=probed, training_sample_size=sample, random_init=False)
        builder = builder.score_ah(facts["block"], anisotropic_quantization_threshold=0.2, training_sample_size=sample)
    builder.build().serialize(str(folder), relative_path=True)
    return facts


def index_bytes(rows: int, dimensions: int) -> int:
    """Return the size of ScaNN's files in bytes: the codes and leaf of each row and the centers, or all keys if there are few."""
    if rows < SMALL:
        return rows * dimensions * 4 + 400
    codes = -(-dimensions // block(dimensions))
    return rows * (4 + codes) + tree(rows, dimensions, rows).leaves * (8 * dimensions + 20) + 112 * dimensions + 1000


def index_memory(rows: int, dimensions: int, training_rows: int) -> int:
    """Return the peak memory of an index build in bytes: two copies of the keys in float32, ScaNN's files, two copies of the sample."""
    return 8 * rows * dimensions + index_bytes(rows, dimensions) + 8 * min(rows, training_rows) * dimensions
