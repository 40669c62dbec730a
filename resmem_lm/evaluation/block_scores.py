"""Score one block of queries, in compiled functions: count right predictions, predict, and compute probabilities and log losses.

Two formulas run at every (k, sigma, T, lambda). ResMem is p_T + lambda r_kNN, and DeepNet at lambda = 0. kNN-LM is (1 - lambda) p_T +
lambda p_kNN, and kNN alone at lambda = 1. Formulas on the simplex (`calibrated`, `adaptive`) also give probabilities.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from resmem_lm.evaluation.adaptive import Gate, distribution, gate_inputs
from resmem_lm.evaluation.calibrated import SimplexFormula, confident, is_first, on_simplex, target_probability
from resmem_lm.evaluation.candidates import Block, Neighbors, Scores, Setting, best, score
from resmem_lm.evaluation.features import Source, columns_of, without

Temperature = tuple[Float[Array, ""], Int[Array, ""]]  # T, and its index among the datastore's temperatures


class Weightings(NamedTuple):
    """Settings at the same temperature, as arrays."""

    ks: Int[Array, " weightings"]
    sigmas: Float[Array, " weightings"]
    lambdas: Float[Array, " weightings"]
    is_resmem: Bool[Array, " weightings"]  # the others are kNN-LM

    @classmethod
    def of(cls, settings: list[Setting]) -> "Weightings":
        """Make the arrays. The settings' temperatures are ignored."""
        formulas, ks, sigmas, _, lambdas = zip(*settings, strict=True)
        is_resmem = jnp.array([formula == "resmem" for formula in formulas])
        return cls(jnp.array(ks, jnp.int32), jnp.array(sigmas, jnp.float32), jnp.array(lambdas, jnp.float32), is_resmem)


class Predictions(NamedTuple):
    """A method's prediction for every token, whether it is certified, its probability, and the true token's probability."""

    predictions: Int[np.ndarray, " queries"]
    certified: Bool[np.ndarray, " queries"]
    confidence: Float[np.ndarray, " queries"]
    target_probability: Float[np.ndarray, " queries"]


def nearest_of(neighbors: Neighbors, document: Neighbors) -> Neighbors:
    """Return the k nearest of k neighbors and the rows of the document."""
    order = jnp.argsort(jnp.concatenate([neighbors.distances, document.distances], axis=1), axis=1)[:, : neighbors.distances.shape[1]]

    def nearest(one: Array, other: Array) -> Array:
        both = jnp.concatenate([one, other], axis=1)
        return jnp.take_along_axis(both, order.reshape(*order.shape, *[1] * (both.ndim - 2)), axis=1)

    return Neighbors(*map(nearest, neighbors, document))


def totals(
    scores: Scores, is_resmem: Bool[Array, " weightings"], lambdas: Float[Array, " weightings"]
) -> Float[Array, "weightings queries candidates"]:
    """Return the scores of ResMem or kNN-LM. At lambda = 1, kNN-LM's are exactly p_kNN: rounding must not break its many ties."""
    lambda_ = lambdas[:, None, None]
    resmem, knn_lm = scores.base + lambda_ * scores.residual, (1 - lambda_) * scores.base + lambda_ * scores.knn
    return jnp.where(is_resmem[:, None, None], resmem, knn_lm)


@jax.jit
def count_correct(
    block: Block, weightings: Weightings, lambdas: Float[Array, " lambdas"], temperature: Temperature
) -> Int[Array, "weightings lambdas"]:
    """Count right predictions for every lambda at once: scores are linear in lambda, so the target wins on one closed interval."""
    candidates = block.candidates
    scores = score(candidates, block.neighbors, weightings.ks, weightings.sigmas, *temperature)
    slopes = jnp.where(weightings.is_resmem[:, None, None], scores.residual, scores.knn - scores.base)
    is_target = candidates.ids == block.targets[:, None]
    # A target that occurs twice must not lose to itself by rounding.
    lead = jnp.where(is_target, 0, _at_target(scores.base, is_target) - scores.base)
    slope = jnp.where(is_target, 0, _at_target(slopes, is_target) - slopes)
    crossing = -lead / jnp.where(slope == 0, 1.0, slope)
    low = jnp.max(jnp.where(slope > 0, crossing, -jnp.inf), axis=-1)
    high = jnp.min(jnp.where(slope < 0, crossing, jnp.inf), axis=-1)
    possible = jnp.any(is_target, axis=-1) & jnp.all((slope != 0) | (lead >= 0), axis=-1)
    within = (low[:, None] <= lambdas[:, None]) & (lambdas[:, None] <= high[:, None])
    return jnp.sum(within & possible[:, None], axis=-1)


def _at_target(values: Float[Array, "... candidates"], is_target: Bool[Array, "queries candidates"]) -> Float[Array, "... 1"]:
    return jnp.max(jnp.where(is_target, values, -jnp.inf), axis=-1, keepdims=True)


@jax.jit
def count_correct_knn(block: Block, weightings: Weightings) -> Int[Array, "weightings 1"]:
    """Count right predictions of p_kNN, which has no temperature. Ties go to the lowest id, as in `predict`."""
    knn = score(block.candidates, block.neighbors, weightings.ks, weightings.sigmas, 1.0, 0).knn
    return jnp.sum(best(knn, block.candidates.ids)[0] == block.targets, axis=-1, keepdims=True)


@jax.jit
def predict(
    block: Block, weightings: Weightings, temperature: Temperature
) -> tuple[Int[Array, "weightings queries"], Bool[Array, "weightings queries"]]:
    """Return the predictions of ResMem or kNN-LM, and which of them are certified."""
    ks, sigmas, lambdas, is_resmem = weightings
    scores = score(block.candidates, block.neighbors, ks, sigmas, *temperature)
    winners, top = best(totals(scores, is_resmem, lambdas), block.candidates.ids)
    bound = jnp.where(is_resmem[:, None], scores.bound, (1 - lambdas[:, None]) * scores.bound)
    return winners, top >= bound  # certified: no token outside of the candidates scores more


@functools.partial(jax.jit, static_argnames="formulas")
def log_losses(
    block: Block,
    sigmas: Float[Array, " sigmas"],
    lambdas: Float[Array, " lambdas"],
    temperature: Temperature,
    *,
    formulas: tuple[SimplexFormula, ...],
) -> Float[Array, "formulas lambdas sigmas"]:
    """Return the sum of the log losses of all queries for each formula, lambda and sigma, with all neighbors."""
    candidates, neighbors, _, _, targets, target_base = block
    ks = jnp.full(len(sigmas), neighbors.distances.shape[1])
    scores = score(candidates, neighbors, ks, sigmas, *temperature)
    first, base = is_first(candidates.ids), target_base[:, temperature[1]]

    def losses(formula: SimplexFormula, lambda_: Float[Array, ""]) -> Float[Array, " sigmas"]:
        q = on_simplex(formula, scores.base, scores.residual, scores.knn, first, lambda_)
        log_p = jnp.log(target_probability(q, candidates.ids == targets[:, None], base) + 1e-12)
        return -jnp.sum(jnp.where(targets >= 0, log_p, 0), axis=-1)

    return jnp.stack([jax.lax.map(functools.partial(losses, formula), lambdas) for formula in formulas])


@functools.partial(jax.jit, static_argnames="formula")
def predict_on_simplex(
    block: Block, weighting: Weightings, temperature: Temperature, *, formula: SimplexFormula | Literal["confident"]
) -> Predictions:
    """Return the predictions of a formula with probabilities. `weighting` has one setting."""
    candidates, neighbors, _, _, targets, target_base = block
    scores = score(candidates, neighbors, weighting.ks, weighting.sigmas, *temperature)
    base, residual, knn = scores.base, scores.residual[0], scores.knn[0]
    if formula == "confident":
        q = confident(base, knn, neighbors.distances)
    else:
        q = on_simplex(formula, base, residual, knn, is_first(candidates.ids), weighting.lambdas[0])
    winners, top = best(q.candidates, candidates.ids)
    probability = target_probability(q, candidates.ids == targets[:, None], target_base[:, temperature[1]])
    return Predictions(winners, top >= q.other * scores.bound, top, probability)  # type: ignore[arg-type]


compiled_gate_inputs = jax.jit(gate_inputs, static_argnames=("unit", "sources"))


@functools.partial(jax.jit, static_argnames=("unit", "sources"))
def predict_adaptive(gate: Gate, block: Block, sigma: Float[Array, ""], *, unit: int, sources: tuple[Source, ...]) -> Predictions:
    """Return the predictions of Adaptive ResMem, whose gate sees some sources."""
    candidates, columns = block.candidates, columns_of(block, sources)
    some = gate_inputs(block, sigma, unit, sources)
    q, ids = distribution(gate, some), candidates.ids[:, columns]
    log_z = candidates.log_partition[:, unit]
    own = slice(block.widths["deepnet"])
    own_ids, base = candidates.ids[:, own], jnp.exp(candidates.logits[:, own] - log_z[:, None])
    # A token that both DeepNet and the memory propose counts once, as the memory's.
    held = jnp.any(own_ids[:, :, None] == ids[:, None, :], axis=-1)
    probabilities = jnp.concatenate([jnp.where(held, 0, q.other[:, None] * base), jnp.where(some.counted, q.candidates, 0)], axis=1)
    winners, top = best(probabilities, jnp.concatenate([own_ids, ids], axis=1))
    sure = top >= q.other * jnp.exp(candidates.bound - log_z)
    return Predictions(winners, sure, top, target_probability(q, some.target, some.target_base))  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnames=("unit", "sources"))
def influence(
    gate: Gate, block: Block, sigma: Float[Array, ""], *, unit: int, sources: tuple[Source, ...]
) -> Float[Array, "parts queries"]:
    """Return the probability of each query's target, and what it loses without each source."""
    candidates = block.candidates
    is_target = candidates.ids == block.targets[:, None]
    base = jnp.exp(candidates.logits - candidates.log_partition[:, unit, None])
    target_base = jnp.max(jnp.where(is_target, base, 0), axis=1)

    def probability(some: Block) -> Float[Array, " queries"]:
        inputs = gate_inputs(some, sigma, unit, sources)
        return target_probability(distribution(gate, inputs), inputs.target, target_base)

    whole = probability(block)
    return jnp.stack([whole, *(whole - probability(without(block, source, unit)) for source in sources)])
