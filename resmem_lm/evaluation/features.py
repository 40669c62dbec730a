"""Compute the inputs of Adaptive ResMem's gate, source by source.

A column is a token that DeepNet or a source proposes: one of DeepNet's most probable tokens, a continuation of the longest exact match, a
token of the document, or a neighbor's token. Each source describes every column and the query. `FEATURES` names all features.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from resmem_lm.evaluation.candidates import Block, Exact, Neighbors, score

Source = Literal["neighbors", "matches", "exact", "document"]  # besides DeepNet
MEMORY: tuple[Source, ...] = ("neighbors", "matches", "exact")  # without the query's own document
EVERY: tuple[Source, ...] = (*MEMORY, "document")

DEEPNET_COLUMNS = 8  # the most probable tokens of DeepNet
BANDWIDTHS = (0.5, 1.0, 4.0)  # in units of sigma
MATCH_WEIGHT = 0.5  # one more equal token before a row counts as much as half a sigma less distance
MOST_MATCHED = 16  # equal tokens that count in a row's weight
FAR = 10.0  # logarithm of the distance where there is no row
SMALL = 1e-6

ROWS = ("log_knn_narrow", "log_knn", "log_knn_wide", "residual", "log_nearest", "unexpected")
ROWS_QUERY = ("log_first_distance", "log_eighth_distance", "log_last_distance", "top_knn_narrow", "top_knn", "top_knn_wide")
MATCHES, MATCHES_QUERY = ("longest_match", "log_matched_knn"), ("longest_match", "mean_match")
FEATURES = {  # names of the features of a column, and of those of a query
    "deepnet": (("log_probability",), ("top_probability", "entropy")),
    "neighbors": (ROWS, ROWS_QUERY),
    "matches": (MATCHES, MATCHES_QUERY),
    "exact": (("log_exact_probability",), ("match_length", "match_occurrences", "distinct_continuations")),
    "document": ((*ROWS, *MATCHES), (*ROWS_QUERY, *MATCHES_QUERY)),
}


class Features(NamedTuple):
    """Features of each column and of each query, in the order of `FEATURES`."""

    of_column: Float[Array, "queries columns features"]
    of_query: Float[Array, "queries features"]


Part = tuple[list[Float[Array, "queries columns"]], list[Float[Array, " queries"]]]


def columns_of(block: Block, sources: tuple[Source, ...]) -> Int[np.ndarray, " columns"]:
    """Return the places of the candidates that DeepNet and some sources propose."""
    widths = block.widths
    proposes = {
        "deepnet": True,
        "exact": "exact" in sources,
        "document": "document" in sources,
        "neighbors": "neighbors" in sources or "matches" in sources,
    }
    places = np.flatnonzero(np.repeat([proposes[name] for name in widths], list(widths.values())))
    return places[(places < DEEPNET_COLUMNS) | (places >= widths["deepnet"])]


def features(
    block: Block, columns: Int[np.ndarray, " columns"], sources: tuple[Source, ...], sigma: float | Float[Array, ""], unit: int
) -> Features:
    """Return the features of DeepNet and of some sources at T = 1, which has index `unit` in the datastore."""
    parts = [_deepnet_part(block, columns, unit)]
    if "neighbors" in sources:
        parts.append(_rows_part(block, block.neighbors, columns, sigma, unit))
    if "matches" in sources:
        parts.append(_matches_part(block, block.neighbors, columns, sigma))
    if "exact" in sources:
        parts.append(_exact_part(block.exact, columns))
    if "document" in sources:
        parts.append(_rows_part(block, block.document, columns, sigma, unit))
        parts.append(_matches_part(block, block.document, columns, sigma))
    of_column, of_query = ([feature for part in parts for feature in part[place]] for place in (0, 1))
    return Features(jnp.stack(of_column, axis=-1), jnp.stack(of_query, axis=-1))


def without(block: Block, source: Source, unit: int) -> Block:
    """Return queries for which a source has found nothing. T = 1 has index `unit` in the datastore."""
    if source == "exact":  # without counts, the probabilities are DeepNet's
        deepnet = block.candidates.logits - block.candidates.log_partition[:, unit, None]
        return block._replace(exact=Exact(deepnet, jnp.zeros_like(block.exact.match)))
    if source == "matches":
        return block._replace(neighbors=block.neighbors._replace(matches=jnp.zeros_like(block.neighbors.matches)))
    if source == "neighbors":
        return block._replace(neighbors=_none_of(block.neighbors))
    return block._replace(document=_none_of(block.document))


def _none_of(rows: Neighbors) -> Neighbors:
    # XLA would fold a constant for seconds, so the distances depend on the rows.
    return rows._replace(distances=rows.distances + jnp.inf, matches=jnp.zeros_like(rows.matches))


def _deepnet_part(block: Block, columns: Int[np.ndarray, " columns"], unit: int) -> Part:
    """Describe DeepNet's probability of each column, and its largest probability and entropy."""
    base = jnp.exp(block.candidates.logits - block.candidates.log_partition[:, unit, None])
    own = base[:, : block.widths["deepnet"]]
    entropy = -jnp.sum(own * jnp.log(jnp.maximum(own, SMALL)), axis=-1)
    return [jnp.log(base[:, columns] + SMALL)], [jnp.max(own, axis=-1), entropy]


def _rows_part(block: Block, rows: Neighbors, columns: Int[np.ndarray, " columns"], sigma: float | Float[Array, ""], unit: int) -> Part:
    """Describe rows of the datastore or of the document.

    For each column y: p_kNN(y) at three bandwidths (multiples of sigma), r_kNN(y), the distance of the nearest row with y, and the largest
    1 - p(y) that a row with y stores. For the query: three distances, and the largest p_kNN at each bandwidth.
    """
    k = rows.tokens.shape[1]
    sigmas = sigma * jnp.array(BANDWIDTHS, jnp.float32)
    scores = score(block.candidates, rows, jnp.full(len(BANDWIDTHS), k), sigmas, 1.0, unit)
    knn = jnp.log(scores.knn + 1e-4)
    found = jnp.isfinite(rows.distances)
    distances = jnp.where(found, jnp.log(rows.distances + 1e-2), FAR)
    same = _same(block, rows, columns)
    nearest = jnp.min(jnp.where(same, distances[:, None, :], FAR), axis=-1)
    unexpected = jnp.max(jnp.where(same, -jnp.expm1(rows.target_log_probability)[:, None, :], 0), axis=-1)
    of_query = [distances[:, rank] for rank in (0, min(7, k - 1), k - 1)]
    return [*knn[..., columns], scores.residual[1][:, columns], nearest, unexpected], [*of_query, *jnp.max(knn, axis=-1)]


def _matches_part(block: Block, rows: Neighbors, columns: Int[np.ndarray, " columns"], sigma: float | Float[Array, ""]) -> Part:
    """Describe how many tokens before each row equal those before the query.

    For each column y: the longest match of a row with y, and p_kNN(y) with weights that grow with the match. For the query: the longest
    and the mean match.
    """
    same, matches = _same(block, rows, columns), rows.matches.astype(jnp.float32)
    longest = jnp.max(jnp.where(same, matches[:, None, :] + 1, 0), axis=-1)
    found = jnp.isfinite(rows.distances)
    closeness = jnp.where(found, MATCH_WEIGHT * jnp.minimum(matches, MOST_MATCHED) - rows.distances / sigma, -jnp.inf)
    weights = jnp.where(found, jnp.exp(closeness - jnp.max(closeness, axis=1, keepdims=True)), 0)
    weights = weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), SMALL)
    matched = jnp.log(jnp.einsum("qck,qk->qc", same.astype(jnp.float32), weights) + 1e-4)
    return [jnp.log1p(longest), matched], [jnp.log1p(jnp.max(matches, axis=1)), jnp.log1p(jnp.mean(matches, axis=1))]


def _exact_part(exact: Exact, columns: Int[np.ndarray, " columns"]) -> Part:
    """Describe the probability of each column by the counts of the datastore, and the longest match in the datastore."""
    return [exact.log_probability[:, columns]], [*jnp.log1p(exact.match).T]


def _same(block: Block, rows: Neighbors, columns: Int[np.ndarray, " columns"]) -> Array:
    """Mark the rows with each column's token."""
    ids, found = block.candidates.ids[:, columns], jnp.isfinite(rows.distances)
    return (rows.tokens[:, None, :] == ids[:, :, None]) & found[:, None, :]
