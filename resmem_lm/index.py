"""Datastore -> index of its keys: ScaNN (approximate) or exact, behind one `search`.

Both return neighbours by true L2 distance between the query and the stored key: ScaNN only proposes candidates, whose
distances are then computed from the datastore itself.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from resmem_lm.datastore import Datastore, open_datastore
from resmem_lm.errors import UserError
from resmem_lm.resmem import largest
from resmem_lm.workdir import Record, new_directory, read_json, sha256, stage, write_json

EXACT_BLOCK = 2**16  # keys in one matrix product
QUERY_BLOCK = 1024
SMALL = 20_000  # rows below which ScaNN compares everything: a tree would cost recall and save nothing


@runtime_checkable
class Index(Protocol):
    """The index seam."""

    def search(
        self, queries: Float[np.ndarray, "queries emb"], k: int
    ) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
        """Rows and L2 distances of the k nearest keys of each query, nearest first."""


@jax.jit
def _distances(queries: Float[Array, "queries emb"], keys: Float[Array, "queries n emb"]) -> Float[Array, "queries n"]:
    return jnp.sqrt(jnp.sum(jnp.square(queries[:, None] - keys.astype(jnp.float32)), axis=-1))


def nearest(
    datastore: Datastore, queries: Float[np.ndarray, "queries emb"], candidates: Int[np.ndarray, "queries n"], k: int
) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
    """The k nearest of each query's candidate rows (-1 is none), by true L2, equal ones by row."""
    found = np.array(_distances(queries, datastore.take("keys", np.maximum(candidates, 0))))
    found[candidates < 0] = np.inf
    order = np.lexsort((candidates, found), axis=1)[:, :k]
    return np.take_along_axis(candidates, order, axis=1), np.take_along_axis(found, order, axis=1)


class ExactIndex:
    """Compares every query with every key, in JAX: for small datastores, for GPUs, and to measure recall."""

    def __init__(self, datastore: Datastore) -> None:
        self.datastore = datastore

    def search(
        self, queries: Float[np.ndarray, "queries emb"], k: int
    ) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
        """See `Index.search`."""
        best_rows = np.full((len(queries), 2 * k), -1, np.int64)
        best_scores = np.full((len(queries), 2 * k), -np.inf, np.float32)
        for shard, keys in enumerate(self.datastore.shard_arrays("keys")):
            for start in range(0, len(keys), EXACT_BLOCK):
                block = jnp.asarray(keys[start : start + EXACT_BLOCK], jnp.float32)
                count = min(k, len(block))
                for begin in range(0, len(queries), QUERY_BLOCK):
                    some = slice(begin, begin + QUERY_BLOCK)
                    scores, places = _block_search(jnp.asarray(queries[some]), block, count)
                    best_scores[some, k : k + count] = scores
                    best_rows[some, k : k + count] = np.asarray(places) + self.datastore.offsets[shard] + start
                order = np.argsort(-best_scores, axis=1, kind="stable")
                best_scores[:, :k] = np.take_along_axis(best_scores, order[:, :k], axis=1)
                best_rows[:, :k] = np.take_along_axis(best_rows, order[:, :k], axis=1)
                best_scores[:, k:], best_rows[:, k:] = -np.inf, -1
        return _in_blocks(lambda q, rows: nearest(self.datastore, q, rows, k), queries, best_rows[:, :k])


@functools.partial(jax.jit, static_argnames="k")
def _block_search(queries: Float[Array, "queries emb"], keys: Float[Array, "keys emb"], k: int) -> tuple[Array, Array]:
    # For one query, the order of q.z - |z|^2 / 2 is that of the distance.
    return largest(queries @ keys.T - jnp.sum(jnp.square(keys), axis=-1) / 2, k)


def _in_blocks(function: Callable[..., tuple[np.ndarray, np.ndarray]], *arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = [function(*(array[start : start + QUERY_BLOCK] for array in arrays)) for start in range(0, len(arrays[0]), QUERY_BLOCK)]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


class ScannIndex:
    """ScaNN (Guo et al. 2020): a tree and 4-bit product quantisation propose candidates."""

    def __init__(self, datastore: Datastore, folder: Path, candidates: int) -> None:
        self.datastore, self.candidates = datastore, candidates
        self._searcher = _scann().load_searcher(str(folder))

    def search(
        self, queries: Float[np.ndarray, "queries emb"], k: int
    ) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
        """See `Index.search`."""

        def some(block: Float[np.ndarray, "queries emb"]) -> tuple[np.ndarray, np.ndarray]:
            count = min(max(self.candidates, k), self.datastore.rows)
            rows, scores = self._searcher.search_batched_parallel(block, final_num_neighbors=count)
            # Where its leaves hold too few rows, ScaNN fills up with row 0 and a score that is not a number.
            rows = np.where(np.isnan(scores), -1, rows.astype(np.int64))
            return nearest(self.datastore, block, rows, k)

        return _in_blocks(some, queries)


def _scann() -> Any:
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except ImportError as error:
        raise UserError(f"ScaNN cannot be imported here ({error}): install it, or set build_index.kind = 'exact'") from None
    return scann_ops_pybind


def scann_parameters(rows: int, dimensions: int) -> dict[str, int]:
    """Leaves of the tree, leaves to search, and dimensions of a code block (at most 256 blocks stay on ScaNN's fast path)."""
    leaves = int(np.clip(np.sqrt(rows), 16, rows))
    return {"leaves": leaves, "leaves_to_search": min(leaves, max(40, leaves // 16)), "block": max(2, -(-dimensions // 256))}


@stage(name="index", after=("build",), output="index")
def build_index(workdir: Path, *, kind: Literal["scann", "exact"] = "scann", candidates: int = 200, training_rows: int = 100_000) -> Record:
    """Writes WORKDIR/index.

    Args:
        kind: "scann", or "exact" where ScaNN cannot be installed or every comparison is wanted.
        candidates: neighbours that ScaNN proposes for each query; the nearest by true distance are kept.
        training_rows: rows from which ScaNN learns its tree and codes.

    Returns:
        The datastore's checksum, the kind and its parameters.

    Raises:
        UserError: ScaNN cannot be imported, or the datastore is damaged.
    """
    folder = workdir / "datastore"
    datastore = open_datastore(folder, checksums=True)
    facts: Record = {"kind": kind, "datastore": sha256(folder / "manifest.json"), "candidates": candidates}
    with new_directory(workdir / "index") as temporary:
        if kind == "scann":
            facts |= _build_scann(datastore, temporary, candidates, training_rows)
        write_json(temporary / "index.json", facts)
    return facts


def _build_scann(datastore: Datastore, folder: Path, candidates: int, training_rows: int) -> Record:
    keys = np.concatenate([np.asarray(shard, np.float32) for shard in datastore.shard_arrays("keys")])
    norms = np.linalg.norm(keys[:: max(1, len(keys) // 100_000)], axis=1)
    # Inner products search three times faster, and order as distances do where all keys have nearly one norm.
    facts: Record = {"measure": "dot_product" if norms.std() < 0.02 * norms.mean() else "squared_l2"}
    if datastore.rows >= SMALL:
        facts |= scann_parameters(*keys.shape)
    scann_searcher(keys, facts, candidates, training_rows).serialize(str(folder), relative_path=True)
    return facts


def scann_searcher(keys: Float[np.ndarray, "rows emb"], facts: Record, candidates: int, training_rows: int) -> Any:
    """ScaNN's searcher of some keys, with what `scann_parameters` says; without that, it compares everything."""
    builder = _scann().builder(keys, candidates, facts["measure"])
    if "leaves" not in facts:
        return builder.score_brute_force().build()
    sample = min(training_rows, len(keys))
    tree = builder.tree(num_leaves=facts["leaves"], num_leaves_to_search=facts["leaves_to_search"], training_sample_size=sample)
    return tree.score_ah(facts["block"], anisotropic_quantization_threshold=0.2, training_sample_size=sample).build()


def open_index(workdir: Path, datastore: Datastore) -> Index:
    """The index of a work directory; UserError if it was made from another datastore or is damaged."""
    folder = workdir / "index"
    facts = read_json(folder / "index.json")
    if facts["datastore"] != sha256(datastore.folder / "manifest.json"):
        raise UserError(
            f"{folder} was made from another datastore: delete it and {workdir / 'stages' / 'index.json'}, and run `resmem index`"
        )
    if facts["kind"] == "exact":
        return ExactIndex(datastore)
    try:
        return ScannIndex(datastore, folder, facts["candidates"])
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder} cannot be read ({reason}): delete it and {workdir / 'stages' / 'index.json'}, and run `resmem index`"
        ) from None
