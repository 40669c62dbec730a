"""The formula on the few tokens that can win, so that many hyperparameters are tried without a pass over the vocabulary.

A neighbour's residual is positive at its own token only. So with lambda >= 0 a token that is neither DeepNet's among the
largest logits nor a neighbour's token scores at most DeepNet's own probability of the next logit: where the best
candidate reaches that bound, the prediction is certified to be that of the full formula.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from resmem_lm.resmem import at_temperature, largest, neighbor_weights


class Candidates(NamedTuple):
    """Per query: DeepNet's largest logits and those of its neighbours' tokens (a token may stand twice)."""

    ids: Int[Array, "queries candidates"]
    logits: Float[Array, "queries candidates"]
    bound: Float[Array, " queries"]
    log_partition: Float[Array, "queries temperatures"]


class Neighbors(NamedTuple):
    """Per query, nearest first: distance, token, and the residual's entries at the query's candidates (T = 1)."""

    distances: Float[Array, "queries k"]
    tokens: Int[Array, "queries k"]
    residuals: Float[Array, "queries k candidates"]
    target_log_probability: Float[Array, "queries k"]
    log_partition: Float[Array, "queries k temperatures"]


class Scores(NamedTuple):
    """Candidates' base probabilities, merged residuals and p_kNN for one k and T and several sigmas."""

    base: Float[Array, "queries candidates"]
    residual: Float[Array, "sigmas queries candidates"]
    knn: Float[Array, "sigmas queries candidates"]
    bound: Float[Array, " queries"]


def choose_candidates(
    logits: Float[Array, "queries vocab"], neighbor_tokens: Int[Array, "queries k"], base: int
) -> tuple[Int[Array, "queries candidates"], Float[Array, "queries candidates"], Float[Array, " queries"]]:
    """Ids and logits of the candidates, and the largest logit that is not among the `base` largest."""
    base = min(base, logits.shape[1] - 1)
    top, ids = largest(logits, base + 1)
    ids = jnp.concatenate([ids[:, :base], neighbor_tokens.astype(ids.dtype)], axis=1)
    return ids, jnp.take_along_axis(logits, ids, axis=1), top[:, base]


def residuals_at(
    candidates: Int[Array, "queries candidates"], ids: Int[Array, "queries k entries"], values: Float[Array, "queries k entries"]
) -> Float[Array, "queries k candidates"]:
    """Each neighbour's residual at each candidate, zero where it stores no entry."""
    same = candidates[:, None, :, None] == ids[:, :, None, :]
    return jnp.sum(jnp.where(same, values[:, :, None, :].astype(jnp.float32), 0.0), axis=-1)


def score(
    candidates: Candidates,
    neighbors: Neighbors,
    sigmas: Float[Array, " sigmas"],
    k: int,
    temperature: float | Float[Array, ""],
    temperature_number: int | Int[Array, ""],
    unit_number: int,
) -> Scores:
    """The parts of every method's score for k neighbours. `unit_number` is where T = 1 stands among the temperatures."""
    near = jax.tree.map(lambda x: x[:, :k], neighbors)
    is_token = (near.tokens[..., None] == candidates.ids[:, None, :]).astype(jnp.float32)
    r = at_temperature(
        near.residuals,
        is_token,
        near.target_log_probability,
        near.log_partition[..., unit_number],
        near.log_partition[..., temperature_number],
        temperature,
    )
    r = jnp.where(temperature == 1.0, near.residuals, r)
    weights = jax.vmap(lambda sigma: neighbor_weights(near.distances, sigma))(sigmas)
    log_z = candidates.log_partition[:, temperature_number]
    return Scores(
        base=jnp.exp(candidates.logits / temperature - log_z[:, None]),
        residual=jnp.einsum("sqk,qkc->sqc", weights, r),
        knn=jnp.einsum("sqk,qkc->sqc", weights, is_token),
        bound=jnp.exp(candidates.bound / temperature - log_z),
    )


def best(
    scores: Float[Array, "*some queries candidates"], ids: Int[Array, "queries candidates"]
) -> tuple[Int[Array, "*some queries"], Float[Array, "*some queries"]]:
    """The winning token and its score; the lowest id among equals, as `resmem.predict`."""
    top = jnp.max(scores, axis=-1)
    winners = jnp.where(scores == top[..., None], ids, jnp.iinfo(ids.dtype).max)
    return jnp.min(winners, axis=-1), top


def certified(best_score: Float[Array, "*some queries"], bound: Float[Array, " queries"]) -> Bool[Array, "*some queries"]:
    """Whether no token outside the candidates can score more."""
    return best_score >= bound
