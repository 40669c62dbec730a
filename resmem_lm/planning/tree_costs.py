"""Costs of an index with a tree (faiss or ScaNN) for any number of rows, from indexes of two sizes."""

from typing import NamedTuple

from resmem_lm.memory.index_kinds import library


class Cost(NamedTuple):
    """Seconds of some work: once, and for each unit."""

    once: float
    each: float

    def seconds(self, units: int | float) -> float:
        """Return the seconds of some units of work."""
        return self.once + self.each * units


def line(few: float, many: float, few_units: int | float, many_units: int | float) -> Cost:
    """Return the cost that fits two measurements."""
    each = max(many - few, 1e-9) / (many_units - few_units)
    return Cost(max(0.0, few - each * few_units), each)


class TreeCosts(NamedTuple):
    """The costs of a build, by multiplications, and of a query, by comparisons."""

    kind: str
    build: Cost
    query: Cost

    def build_seconds(self, rows: int, dimensions: int, training_rows: int) -> float:
        """Return the seconds to build an index."""
        return self.build.seconds(build_work(self.kind, rows, dimensions, training_rows))

    def search_seconds(self, rows: int, dimensions: int) -> float:
        """Return the seconds of a query."""
        return self.query.seconds(query_work(self.kind, rows, dimensions))


def build_work(kind: str, rows: int, dimensions: int, training_rows: int) -> float:
    """Return the multiplications of a build: k-means compares a sample with all leaves, then each row is rotated and compared."""
    tree = library(kind).tree(rows, dimensions, training_rows)
    return float(dimensions * (tree.rounds * tree.sample * tree.leaves + rows * (dimensions + tree.leaves)))


def query_work(kind: str, rows: int, dimensions: int) -> float:
    """Return the comparisons of a query: with all leaves, then with the rows in the probed leaves."""
    tree = library(kind).tree(rows, dimensions, rows)
    return float(tree.leaves + rows * tree.probed / tree.leaves)
