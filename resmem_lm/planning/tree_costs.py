"""Costs of an index with a tree (faiss or ScaNN) for any number of rows, from two indexes of random keys."""

import tempfile
import time
from typing import NamedTuple

import numpy as np

from resmem_lm.memory.index import QUERY_BLOCK
from resmem_lm.memory.index_kinds import library
from resmem_lm.planning.machine import least
from resmem_lm.workdir.storage import Record

FEW, MANY = 50_000, 200_000  # rows of the two indexes


class Cost(NamedTuple):
    """Seconds of some work: once, and for each unit."""

    once: float
    each: float

    def seconds(self, units: int | float) -> float:
        """Return the seconds of some units of work."""
        return self.once + self.each * units


class TreeCosts(NamedTuple):
    """The costs of a build, by multiplications, and of a query, by comparisons; ranking of the candidates is not among them."""

    kind: str
    build: Cost
    query: Cost

    def build_seconds(self, rows: int, dimensions: int, training_rows: int) -> float:
        """Return the seconds to build an index. K-means compares a sample with all leaves, then each row is rotated and compared."""
        return self.build.seconds(build_work(self.kind, rows, dimensions, training_rows))

    def search_seconds(self, rows: int, dimensions: int) -> float:
        """Return the seconds of a query. It is compared with all leaves, then with the rows in the probed ones."""
        return self.query.seconds(query_work(self.kind, rows, dimensions))


def build_work(kind: str, rows: int, dimensions: int, training_rows: int) -> float:
    """Return the multiplications of a build."""
    tree = library(kind).tree(rows, dimensions, training_rows)
    return float(dimensions * (tree.rounds * tree.sample * tree.leaves + rows * (dimensions + tree.leaves)))


def query_work(kind: str, rows: int, dimensions: int) -> float:
    """Return the comparisons of a query."""
    tree = library(kind).tree(rows, dimensions, rows)
    return float(tree.leaves + rows * tree.probed / tree.leaves)


def line(few: float, many: float, few_units: int | float, many_units: int | float) -> Cost:
    """Return the cost that fits two measurements."""
    each = max(many - few, 1e-9) / (many_units - few_units)
    return Cost(max(0.0, few - each * few_units), each)


def measure_tree(dimensions: int, settings: Record) -> TreeCosts:
    """Return the costs of an index with the settings of `build_index`."""
    kind, training_rows = settings["kind"], settings["training_rows"]
    keys = np.random.default_rng(0).normal(size=(MANY, dimensions)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    _build(keys[:FEW], settings)  # starts threads
    measured = [_build(keys[:rows], settings) for rows in (FEW, MANY)]
    builds, queries = zip(*measured, strict=True)
    return TreeCosts(
        kind,
        line(*builds, *(build_work(kind, rows, dimensions, training_rows) for rows in (FEW, MANY))),
        line(*queries, *(query_work(kind, rows, dimensions) for rows in (FEW, MANY))),
    )


def _build(keys: np.ndarray, settings: Record) -> tuple[float, float]:
    """Build an index of keys; return the seconds of the build and of a query that probes the most leaves."""
    module, candidates, queries = library(settings["kind"]), settings["candidates"], keys[:QUERY_BLOCK]
    tree, start = module.tree(*keys.shape, settings["training_rows"]), time.monotonic()
    if settings["kind"] == "scann":
        facts = {"measure": "dot_product", "leaves": tree.leaves, "leaves_to_search": tree.probed, "block": module.block(keys.shape[1])}
        index = module.learn(keys, facts, candidates, settings["training_rows"], settings["threads"])
        with tempfile.TemporaryDirectory(prefix="resmem-plan-") as folder:
            index.serialize(folder, relative_path=True)
        built = time.monotonic() - start
        return built, least(lambda: index.search_batched_parallel(queries, final_num_neighbors=candidates)) / len(queries)
    index = module.learn(keys[: tree.sample], tree.leaves)
    module.add(index, (keys[begin : begin + module.BLOCK] for begin in range(0, len(keys), module.BLOCK)))
    built = time.monotonic() - start
    rotation, ivf = module.parts(index)

    def search() -> None:
        rotated = rotation.apply(queries)
        squared, lists = ivf.quantizer.search(rotated, tree.probed)
        module.nearest_codes(ivf, rotated, lists, squared, candidates)

    return built, least(search) / len(queries)
