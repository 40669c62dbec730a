"""What an index with a tree costs on this machine, for any number of rows: from a few small ones, one thing varied at a time."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resmem_lm.memory.index import QUERY_BLOCK, SMALL
from resmem_lm.memory.index_kinds import library
from resmem_lm.planning.machine import least


class TreeCosts(NamedTuple):
    """Seconds of faiss or ScaNN with a tree and codes, for each of what it goes through (see `build_seconds` and `search_seconds`)."""

    kind: str
    row: float
    sampled_row: float
    leaf_product: float
    query: float
    compared_row: float
    query_leaf: float

    def build_seconds(self, rows: int, dimensions: int, training_rows: int) -> float:
        """Learning from a sample, then for each row its leaf, by comparison with all leaves, and its code."""
        tree = library(self.kind).tree(rows, dimensions, training_rows)
        compared = tree.rounds * tree.sample + rows
        return float(self.row * rows + self.sampled_row * tree.sample + self.leaf_product * tree.leaves * compared)

    def search_seconds(self, rows: int, dimensions: int) -> float:
        """Of one query, if it looks through the most leaves: comparison with all, then with the codes in these."""
        tree = library(self.kind).tree(rows, dimensions, rows)
        return float(self.query + self.query_leaf * tree.leaves + self.compared_row * rows * tree.searched / tree.leaves)


Query = Callable[[np.ndarray, int], Any]  # with so many leaves searched


def _faiss(keys: np.ndarray, sample: int, leaves: int, candidates: int, threads: int, folder: Path) -> Query:
    faiss = library("faiss")
    index = faiss.learn(keys[:sample], leaves)
    faiss.add(index, (keys[start : start + faiss.BLOCK] for start in range(0, len(keys), faiss.BLOCK)))
    faiss.write(index, folder)

    def query(queries: np.ndarray, searched: int) -> np.ndarray:
        rotation, ivf = faiss.parts(index)
        rotated = rotation.apply(queries)
        squared, lists = ivf.quantizer.search(rotated, searched)
        rows: np.ndarray = faiss.nearest_codes(ivf, rotated, lists, squared, candidates)
        return rows

    return query


def _scann(keys: np.ndarray, sample: int, leaves: int, candidates: int, threads: int, folder: Path) -> Query:
    scann = library("scann")
    facts = {"measure": "dot_product", "leaves": leaves, "leaves_to_search": leaves, "block": scann.block(keys.shape[1])}
    index = scann.learn(keys, facts, candidates, sample, threads)
    index.serialize(str(folder), relative_path=True)
    return lambda queries, searched: index.search_batched_parallel(queries, final_num_neighbors=candidates, leaves_to_search=searched)


def measure_tree(emb: int, *, kind: str, candidates: int, training_rows: int, threads: int) -> TreeCosts:
    """The library's own costs, told apart by varying one of rows, sample and leaves at a time, on keys drawn at random."""
    # The sample is as large as it will be: ScaNN's k-means takes more rounds in a larger one.
    few = int(np.clip(training_rows, 1.2 * SMALL, 100_000))
    many, leaves, more_leaves, rounds = 2 * few, 100, 1600, library(kind).tree(SMALL, emb, few).rounds
    keys = np.random.default_rng(0).normal(size=(many, emb)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    queries = keys[:QUERY_BLOCK]

    def build(rows: int, sample: int, leaves: int) -> tuple[Query, float]:
        make = _scann if kind == "scann" else _faiss
        with tempfile.TemporaryDirectory(prefix="resmem-plan-") as folder:
            start = time.monotonic()
            return make(keys[:rows], sample, leaves, candidates, threads, Path(folder)), time.monotonic() - start

    def query(index: Query, searched: int) -> float:
        return least(lambda: index(queries, searched), times=4) / len(queries)

    _, sampled = build(few, few // 2, leaves)  # twice: for the first, threads are started
    _, sampled = build(few, few // 2, leaves)
    small, base = build(few, few, leaves)
    _, rows = build(many, few, leaves)
    leafy, leaved = build(few, few, more_leaves)
    product = max(0.0, leaved - base) / ((more_leaves - leaves) * (rounds * few + few))
    compared, fewer = query(small, leaves * 8 // 10), query(small, leaves // 10)
    compared_row = max(0.0, compared - fewer) / (few * 0.7)
    query_leaf = max(0.0, query(leafy, more_leaves // 10) - fewer) / (more_leaves - leaves)
    return TreeCosts(
        kind=kind,
        row=max(0.0, (rows - base) / (many - few) - product * leaves),
        sampled_row=max(0.0, (base - sampled) / (few - few // 2) - product * leaves * rounds),
        leaf_product=product,
        query=max(0.0, fewer - query_leaf * leaves - compared_row * few / 10),
        compared_row=compared_row,
        query_leaf=query_leaf,
    )
