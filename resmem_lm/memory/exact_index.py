"""Exact search in JAX: every query is compared with every key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from resmem_lm.memory.datastore import Datastore
from resmem_lm.memory.index import QUERY_BLOCK, in_threads, rank_candidates
from resmem_lm.resmem import largest

EXACT_BLOCK = 2**16  # keys in one matrix product
SPARE = 16  # more than k, for the order of inner products is that of distances only as far as float32 tells


class ExactIndex:
    """Compares every query with every key, in JAX: for small datastores, for GPUs, and to measure recall."""

    def __init__(self, datastore: Datastore) -> None:
        self.datastore = datastore

    def search(
        self, queries: Float[np.ndarray, "queries emb"], k: int
    ) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
        """See `Index.search`."""
        most = k + SPARE
        best_rows = np.full((len(queries), 2 * most), -1, np.int64)
        best_scores = np.full((len(queries), 2 * most), -np.inf, np.float32)
        for shard, record in enumerate(self.datastore.shards):
            for start in range(0, record["rows"], EXACT_BLOCK):
                some_keys = self.datastore.shard_keys(shard, slice(start, start + EXACT_BLOCK))
                # Each shape is compiled: blocks are filled up to a power of two, with rows that cannot be found.
                padding = (1 << (len(some_keys) - 1).bit_length()) - len(some_keys)
                block = jnp.asarray(np.pad(some_keys, ((0, padding), (0, 0))))
                rows = self.datastore.offsets[shard] + start + np.arange(len(some_keys))
                live = jnp.asarray(np.pad(~self.datastore.is_deleted(rows), (0, padding)))
                count = min(most, len(block))
                for begin in range(0, len(queries), QUERY_BLOCK):
                    some = slice(begin, begin + QUERY_BLOCK)
                    scores, places = _block_search(jnp.asarray(queries[some]), block, live, count)
                    best_scores[some, most : most + count] = scores
                    best_rows[some, most : most + count] = np.asarray(places) + self.datastore.offsets[shard] + start
                order = np.argsort(-best_scores, axis=1, kind="stable")
                best_scores[:, :most] = np.take_along_axis(best_scores, order[:, :most], axis=1)
                best_rows[:, :most] = np.take_along_axis(best_rows, order[:, :most], axis=1)
                best_scores[:, most:], best_rows[:, most:] = -np.inf, -1
        best_rows[np.isneginf(best_scores)] = -1  # deleted
        return in_threads(lambda q, rows: rank_candidates(self.datastore, q, rows, k), queries, best_rows[:, :most])


@functools.partial(jax.jit, static_argnames="k")
def _block_search(
    queries: Float[Array, "queries emb"], keys: Float[Array, "keys emb"], live: Bool[Array, " keys"], k: int
) -> tuple[Array, Array]:
    # For one query, the order of q.z - |z|^2 / 2 is that of the distance.
    offsets = jnp.where(live, -jnp.sum(jnp.square(keys), axis=-1) / 2, -jnp.inf)
    return largest(queries @ keys.T + offsets, k)
