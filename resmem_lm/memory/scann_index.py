"""ScaNN (Guo et al. 2020), the paper's own index: a tree and 4-bit anisotropic product quantization propose candidates."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from resmem_lm.errors import UserError
from resmem_lm.memory.datastore import Datastore
from resmem_lm.memory.index import SMALL, Tree
from resmem_lm.workdir.storage import Record


class Searcher:
    """ScaNN's files, read into memory. See `resmem_lm.index.Proposer`."""

    def __init__(self, datastore: Datastore, folder: Path, record: Record) -> None:
        self.datastore = datastore
        self._searcher = _scann().load_searcher(str(folder))

    def propose(self, queries: Float[np.ndarray, "queries emb"], wanted: int, needed: int) -> Int[np.ndarray, "queries n"]:
        """See `resmem_lm.index.Proposer`. Where deleted rows are among those found, ScaNN is asked for more."""
        rows, live = self.datastore.rows, max(1, self.datastore.live_rows)
        result = np.full((len(queries), min(wanted, rows)), -1, np.int64)
        count = min(rows, -(-wanted * rows // live))  # among which there are as many live ones as are wanted, on average
        asked = np.arange(len(queries))
        while len(asked):
            found, scores = self._searcher.search_batched_parallel(queries[asked], final_num_neighbors=count)
            # Where its leaves hold too few rows, ScaNN fills up with row 0 and a score that is not a number.
            found = np.where(np.isnan(scores), -1, found.astype(np.int64))
            exhausted = (found < 0).any(axis=1)
            found[self.datastore.is_deleted(found) & (found >= 0)] = -1
            order = np.argsort(found < 0, axis=1, kind="stable")[:, : result.shape[1]]
            result[asked] = np.take_along_axis(found, order, axis=1)
            asked = asked[(result[asked] < 0).any(axis=1) & ~exhausted] if count < rows else asked[:0]
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
    """Leaves of the tree, leaves to search, and the rows from which they are learned."""
    leaves = int(np.clip(np.sqrt(rows), 16, rows))
    # So many rounds are ScaNN's own default.
    return Tree(leaves, min(leaves, max(40, leaves // 16)), min(rows, training_rows), rounds=12)


def block(dimensions: int) -> int:
    """Dimensions of a code: at most 256 codes stay on ScaNN's fast path."""
    return max(2, -(-dimensions // 256))


def build(datastore: Datastore, folder: Path, settings: Record) -> Record:
    """Writes ScaNN's files of some shards of a datastore; returns the measure and the tree's parameters."""
    keys = np.empty((datastore.rows, datastore.array("quantized_keys").shape[1]), np.float32)
    for shard, begin in enumerate(datastore.offsets[:-1]):
        keys[begin : datastore.offsets[shard + 1]] = datastore.shard_keys(shard)
    norms = np.linalg.norm(keys[:: max(1, len(keys) // 100_000)], axis=1)
    # Inner products search three times faster, and order as distances do where all keys have nearly one norm.
    facts: Record = {"measure": "dot_product" if norms.std() < 0.02 * norms.mean() else "squared_l2"}
    if datastore.rows >= SMALL:
        found = tree(*keys.shape, settings["training_rows"])
        facts |= {"leaves": found.leaves, "leaves_to_search": found.searched, "block": block(keys.shape[1])}
    chosen = {name: settings[name] for name in ("candidates", "training_rows", "threads")}
    learn(keys, facts, **chosen).serialize(str(folder), relative_path=True)
    return facts


def learn(keys: Float[np.ndarray, "rows emb"], facts: Record, candidates: int, training_rows: int, threads: int) -> Any:
    """ScaNN's searcher of some keys, with what `tree` and `block` say; without that, it compares everything."""
    builder = _scann().builder(keys, candidates, facts["measure"]).set_n_training_threads(threads)
    if "leaves" not in facts:
        return builder.score_brute_force().build()
    sample = min(training_rows, len(keys))
    # Without random centers (k-means++ draws them by a fixed seed) two builds find the same candidates.
    builder = builder.tree(
        num_leaves=facts["leaves"], num_leaves_to_search=facts["leaves_to_search"], training_sample_size=sample, random_init=False
    )
    return builder.score_ah(facts["block"], anisotropic_quantization_threshold=0.2, training_sample_size=sample).build()


def index_bytes(rows: int, dimensions: int) -> int:
    """Of ScaNN's files: codes and leaf of every row, centers of leaves and codes; or all keys where there are few."""
    if rows < SMALL:
        return rows * dimensions * 4 + 400
    codes = -(-dimensions // block(dimensions))
    return rows * (4 + codes) + tree(rows, dimensions, rows).leaves * (8 * dimensions + 20) + 112 * dimensions + 1000


def index_memory(rows: int, dimensions: int, training_rows: int) -> int:
    """That ScaNN's build takes: the keys in float32 twice, its files, and its sample twice."""
    return 8 * rows * dimensions + index_bytes(rows, dimensions) + 8 * min(rows, training_rows) * dimensions
