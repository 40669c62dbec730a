"""Costs of an index with a tree (faiss or ScaNN) for any number of rows, from those of one index."""

from typing import NamedTuple

from resmem_lm.memory.index_kinds import library


class TreeCosts(NamedTuple):
    """Seconds of a multiplication of a build, of a comparison of a query, and to rank the candidates of a query."""

    kind: str
    multiplication: float
    comparison: float
    ranking: float

    def build_seconds(self, rows: int, dimensions: int, training_rows: int) -> float:
        """Return the seconds to build an index."""
        return self.multiplication * build_work(self.kind, rows, dimensions, training_rows)

    def search_seconds(self, rows: int, dimensions: int) -> float:
        """Return the seconds of a query."""
        return self.ranking + self.comparison * query_work(self.kind, rows, dimensions)


def build_work(kind: str, rows: int, dimensions: int, training_rows: int) -> float:
    """Return the multiplications of a build: k-means compares a sample with all leaves, then each row is rotated and compared."""
    tree = library(kind).tree(rows, dimensions, training_rows)
    return float(dimensions * (tree.rounds * tree.sample * tree.leaves + rows * (dimensions + tree.leaves)))


def query_work(kind: str, rows: int, dimensions: int) -> float:
    """Return the comparisons of a query: with all leaves, then with the rows in the searched ones."""
    tree = library(kind).tree(rows, dimensions, rows)
    return float(tree.leaves + rows * tree.probed / tree.leaves)
