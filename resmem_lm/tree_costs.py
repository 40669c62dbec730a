"""What ScaNN's tree costs on this machine, for any number of rows: from a few small trees, one thing varied at a time."""

import tempfile
import time
from typing import Any, NamedTuple

import numpy as np

from resmem_lm.index import QUERY_BLOCK, SMALL, scann_parameters, scann_searcher
from resmem_lm.machine import least

KMEANS_ROUNDS = 12  # ScaNN's own default: each sampled row is compared with every leaf so often


class TreeCosts(NamedTuple):
    """Seconds of ScaNN with a tree and codes, for each of what it goes through (see `build_seconds` and `search_seconds`)."""

    row: float
    sampled_row: float
    leaf_product: float
    query: float
    compared_row: float
    query_leaf: float

    def build_seconds(self, rows: int, dimensions: int, training_rows: int) -> float:
        """Learning from a sample, then for each row its leaf, by comparison with all leaves, and its code."""
        sample, leaves = min(training_rows, rows), scann_parameters(rows, dimensions)["leaves"]
        return self.row * rows + self.sampled_row * sample + self.leaf_product * leaves * (KMEANS_ROUNDS * sample + rows)

    def search_seconds(self, rows: int, dimensions: int) -> float:
        """Of one query: comparison with all leaves, then with the codes in the searched ones."""
        parameters = scann_parameters(rows, dimensions)
        compared = rows * parameters["leaves_to_search"] / parameters["leaves"]
        return self.query + self.query_leaf * parameters["leaves"] + self.compared_row * compared


def measure_tree(emb: int, *, candidates: int, training_rows: int, threads: int) -> TreeCosts:
    """ScaNN's own costs, told apart by varying one of rows, sample and leaves at a time, on keys drawn at random."""
    block = scann_parameters(SMALL, emb)["block"]
    # The sample is as large as it will be: k-means takes more rounds in a larger one.
    few = int(np.clip(training_rows, 1.2 * SMALL, 100_000))
    many, leaves, more_leaves = 2 * few, 100, 1600
    keys = np.random.default_rng(0).normal(size=(many, emb)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    queries = keys[:QUERY_BLOCK]

    def build(rows: int, sample: int, leaves: int) -> tuple[Any, float]:
        facts = {"measure": "dot_product", "leaves": leaves, "leaves_to_search": leaves, "block": block}
        with tempfile.TemporaryDirectory(prefix="resmem-plan-") as folder:
            start = time.monotonic()
            searcher = scann_searcher(keys[:rows], facts, candidates, sample, threads)
            searcher.serialize(folder, relative_path=True)
            return searcher, time.monotonic() - start

    def query(searcher: Any, searched: int) -> float:
        def run() -> Any:
            return searcher.search_batched_parallel(queries, final_num_neighbors=candidates, leaves_to_search=searched)

        return least(run, times=4) / len(queries)

    _, sampled = build(few, few // 2, leaves)  # twice: for the first, ScaNN starts its threads
    _, sampled = build(few, few // 2, leaves)
    small, base = build(few, few, leaves)
    _, rows = build(many, few, leaves)
    leafy, leaved = build(few, few, more_leaves)
    product = max(0.0, leaved - base) / ((more_leaves - leaves) * (KMEANS_ROUNDS * few + few))
    compared, fewer = query(small, leaves * 8 // 10), query(small, leaves // 10)
    compared_row = max(0.0, compared - fewer) / (few * 0.7)
    query_leaf = max(0.0, query(leafy, more_leaves // 10) - fewer) / (more_leaves - leaves)
    return TreeCosts(
        row=max(0.0, (rows - base) / (many - few) - product * leaves),
        sampled_row=max(0.0, (base - sampled) / (few - few // 2) - product * leaves * KMEANS_ROUNDS),
        leaf_product=product,
        query=max(0.0, fewer - query_leaf * leaves - compared_row * few / 10),
        compared_row=compared_row,
        query_leaf=query_leaf,
    )
