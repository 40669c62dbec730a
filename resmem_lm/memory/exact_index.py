"""Search exactly in JAX by comparing every query with every key: for small datastores, for GPUs, and to measure recall."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from resmem_lm.memory.datastore import Datastore
from resmem_lm.memory.index import QUERY_BLOCK, Nearest, in_threads, rank_candidates
from resmem_lm.resmem import largest

EXACT_BLOCK = 2**16  # keys in one matrix product
SPARE = 16  # extra candidates: in float32, inner products order rows almost as distances do, but not exactly


class ExactIndex:
    """An `Index` that compares every query with every live key."""

    def __init__(self, datastore: Datastore) -> None:
        self.datastore = datastore

    def search(self, queries: Float[np.ndarray, "queries emb"], k: int) -> Nearest:
        """Search as `Index.search` specifies."""
        kept = k + SPARE
        rows, scores = np.full((len(queries), kept), -1, np.int64), np.full((len(queries), kept), -np.inf, np.float32)  # the best so far
        for first_row, keys, live in self._blocks():
            for begin in range(0, len(queries), QUERY_BLOCK):
                some = slice(begin, begin + QUERY_BLOCK)
                block_scores, places = _search_block(jnp.asarray(queries[some]), keys, live, min(kept, len(keys)))
                both_scores = np.concatenate([scores[some], block_scores], axis=1)
                both_rows = np.concatenate([rows[some], np.asarray(places) + first_row], axis=1)
                order = np.argsort(-both_scores, axis=1, kind="stable")[:, :kept]
                scores[some], rows[some] = np.take_along_axis(both_scores, order, axis=1), np.take_along_axis(both_rows, order, axis=1)
        rows[np.isneginf(scores)] = -1  # deleted rows and padding
        return in_threads(lambda some, candidates: rank_candidates(self.datastore, some, candidates, k), queries, rows)

    def _blocks(self) -> Iterator[tuple[int, Float[Array, "keys emb"], Bool[Array, " keys"]]]:
        """Yield the first row, the keys and the mask of live rows of each block, padded to a power of two to compile few shapes."""
        for shard, record in enumerate(self.datastore.shards):
            for start in range(0, record["rows"], EXACT_BLOCK):
                keys = self.datastore.shard_keys(shard, slice(start, start + EXACT_BLOCK))
                first_row = int(self.datastore.offsets[shard]) + start
                live = ~self.datastore.is_deleted(first_row + np.arange(len(keys)))
                padding = (1 << (len(keys) - 1).bit_length()) - len(keys)
                yield first_row, jnp.asarray(np.pad(keys, ((0, padding), (0, 0)))), jnp.asarray(np.pad(live, (0, padding)))


@functools.partial(jax.jit, static_argnames="count")
def _search_block(
    queries: Float[Array, "queries emb"], keys: Float[Array, "keys emb"], live: Bool[Array, " keys"], count: int
) -> tuple[Array, Array]:
    # For a fixed query q, sorting keys z by descending q.z - |z|^2 / 2 sorts them by ascending distance.
    offsets = jnp.where(live, -jnp.sum(jnp.square(keys), axis=-1) / 2, -jnp.inf)
    return largest(queries @ keys.T + offsets, count)
