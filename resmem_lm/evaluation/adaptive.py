"""Adaptive ResMem: how far to trust the memory here, told by the neighbors' distances and DeepNet's confidence.

    q is proportional to  p exp(g)    with g a small network of what is known about a neighbor's token, and 0 for all other tokens

A step beyond one lambda for all tokens (paper, section 6); He et al. (2021, "Efficient Nearest Neighbor Language Models", section 4.1)
learn kNN-LM's lambda from such features. The network is fitted on validation tokens by cross-entropy; held-out documents of these say
after how many steps to stop.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from jaxtyping import Array, Bool, Float, Int

from resmem_lm.evaluation.calibrated import Distribution, is_first, normalized, of_target
from resmem_lm.evaluation.candidates import Candidates, Neighbors, score

with epy.lazy_imports():
    import optax

HIDDEN = 32
STEPS, CHECK_STEPS = 800, 50
BATCH = 1024
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 1e-2
HELD_OUT = 5  # one document in so many
BANDWIDTHS = (0.5, 1.0, 4.0)  # times sigma
SMALL = 1e-6
LARGEST = 30.0  # change of a logit


class GateFeatures(NamedTuple):
    """What the network sees of some queries, and what it is fitted to.

    The neighbors' tokens are places on the last axis; a token that several neighbors hold counts at the nearest of them.
    """

    features: Float[Array, "queries k features"]
    base: Float[Array, "queries k"]  # DeepNet's probability of the neighbor's token
    counted: Bool[Array, "queries k"]
    target: Bool[Array, "queries k"]  # counted, and the query's token
    target_base: Float[Array, " queries"]  # DeepNet's probability of the target, a neighbor's or not


class Gate(NamedTuple):
    """The network's weights, and the features' means and scales."""

    weights: dict[str, Any]
    mean: Float[Array, " features"]
    scale: Float[Array, " features"]


def gate_features(
    candidates: Candidates,
    neighbors: Neighbors,
    targets: Int[Array, " queries"],
    target_base: Float[Array, " queries"],
    sigma: float | Float[Array, ""],
    unit_number: int,
) -> GateFeatures:
    """What is known at T = 1. Per neighbor's token y: p(y), p_kNN(y) at three bandwidths, r_kNN(y), the nearest distance at which it was
    found and how little DeepNet knew it there; per query: distances, DeepNet's largest probability and entropy, the largest p_kNN.
    """
    k = neighbors.tokens.shape[1]
    sigmas = sigma * jnp.array(BANDWIDTHS, jnp.float32)
    scores = score(candidates, neighbors, jnp.full(len(BANDWIDTHS), k), sigmas, 1.0, unit_number)
    base, residual, knn = scores.base[:, -k:], scores.residual[1][:, -k:], scores.knn[..., -k:]
    same = neighbors.tokens[:, :, None] == neighbors.tokens[:, None, :]
    found = jnp.isfinite(neighbors.distances)
    counted = is_first(neighbors.tokens) & found  # neighbors that were not found stand last
    farthest = jnp.max(jnp.where(found, neighbors.distances, 0), axis=1, keepdims=True)
    distances = jnp.log(jnp.where(found, neighbors.distances, farthest) + 1e-2)
    unknown = -jnp.expm1(neighbors.target_log_probability)
    own = scores.base[:, :-k]  # DeepNet's largest
    of_token = [
        jnp.log(base + SMALL),
        *jnp.log(knn + 1e-4),
        residual,
        jnp.min(jnp.where(same & found[:, None, :], distances[:, None, :], jnp.inf), axis=-1, initial=10.0),
        jnp.max(jnp.where(same & found[:, None, :], unknown[:, None, :], 0), axis=-1),
    ]
    of_query = [
        *(distances[:, rank] for rank in (0, min(7, k - 1), k - 1)),
        jnp.max(own, axis=-1),
        -jnp.sum(own * jnp.log(jnp.maximum(own, SMALL)), axis=-1),
        *jnp.log(jnp.max(knn, axis=-1) + 1e-4),
    ]
    columns = [*of_token, *(jnp.broadcast_to(column[:, None], base.shape) for column in of_query)]
    return GateFeatures(jnp.stack(columns, axis=-1), base, counted, counted & (neighbors.tokens == targets[:, None]), target_base)


def trust(gate: Gate, features: Float[Array, "queries k features"]) -> Float[Array, "queries k"]:
    """g: how much the logit of each neighbor's token is raised."""
    w, x = gate.weights, (features - gate.mean) / gate.scale
    x = jax.nn.gelu(x @ w["in"] + w["in_bias"])
    x = jax.nn.gelu(x @ w["middle"] + w["middle_bias"])
    return jnp.clip(x @ w["out"], -LARGEST, LARGEST)  # exp of it must be a number


def distribution(gate: Gate, some: GateFeatures) -> Distribution:
    """q at the neighbors' tokens."""
    return normalized(some.base, some.base * jnp.exp(trust(gate, some.features)), some.counted)


def _loss(weights: dict[str, Any], gate: Gate, some: GateFeatures) -> Float[Array, ""]:
    q = distribution(gate._replace(weights=weights), some)
    return -jnp.mean(jnp.log(of_target(q, some.target, some.target_base) + 1e-12))


@jax.jit
def _watched_loss(weights: dict[str, Any], gate: Gate, some: GateFeatures, places: Int[Array, " some"]) -> Float[Array, ""]:
    return _loss(weights, gate, _take(some, places))


def fit(some: GateFeatures, groups: Int[np.ndarray, " queries"], seed: int = 0) -> Gate:
    """Fits the network; it begins as DeepNet alone.

    Args:
        some: what is known of validation tokens, as NumPy arrays.
        groups: a number for each token, equal where they are not independent.
        seed: of the first weights and of the batches.
    """
    x = np.asarray(some.features)[np.asarray(some.counted)]
    some = GateFeatures(*map(jnp.asarray, some))
    gate = Gate(_first_weights(x.shape[-1], seed), jnp.asarray(x.mean(axis=0)), jnp.asarray(x.std(axis=0) + 1e-3))
    held_out = groups % HELD_OUT == HELD_OUT - 1
    if not held_out.any():
        held_out = np.arange(len(groups)) % HELD_OUT == HELD_OUT - 1  # too few groups
    fitted, watched = np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def watch(weights: dict[str, Any]) -> float:
        parts = np.array_split(watched, -(-len(watched) // 8192))
        return sum(float(_watched_loss(weights, gate, some, part)) * len(part) for part in parts) / len(watched)

    losses = {0: watch(gate.weights)} if len(watched) else {STEPS: 0.0}
    if len(watched) and len(fitted):
        losses |= {step: watch(weights) for step, weights in _steps(gate, some, fitted, STEPS, seed)}
    steps = min(losses, key=lambda step: losses[step])
    again = [weights for _, weights in _steps(gate, some, np.arange(len(groups)), steps, seed)]
    return gate._replace(weights=[gate.weights, *again][-1])


def _take(some: GateFeatures, places: Int[Array, " some"] | Int[np.ndarray, " some"]) -> GateFeatures:
    return GateFeatures(*(array[places] for array in some))


def _first_weights(features: int, seed: int) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "in": jax.random.normal(keys[0], (features, HIDDEN)) / np.sqrt(features),
        "in_bias": jnp.zeros(HIDDEN),
        "middle": jax.random.normal(keys[1], (HIDDEN, HIDDEN)) / np.sqrt(HIDDEN),
        "middle_bias": jnp.zeros(HIDDEN),
        "out": jnp.zeros(HIDDEN),
    }


def _optimizer() -> Any:
    return optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, STEPS), weight_decay=WEIGHT_DECAY)


@jax.jit
def _advance(
    weights: dict[str, Any], state: Any, gate: Gate, some: GateFeatures, batches: Int[Array, "steps batch"]
) -> tuple[dict[str, Any], Any]:
    optimizer = _optimizer()

    def step(carry: tuple[dict[str, Any], Any], places: Int[Array, " batch"]) -> tuple[tuple[dict[str, Any], Any], None]:
        weights, state = carry
        updates, state = optimizer.update(jax.grad(_loss)(weights, gate, _take(some, places)), state, weights)
        return (optax.apply_updates(weights, updates), state), None

    (weights, state), _ = jax.lax.scan(step, (weights, state), batches)
    return weights, state


def _steps(gate: Gate, some: GateFeatures, places: Int[np.ndarray, " some"], steps: int, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, weights) after every CHECK_STEPS."""
    weights, rng = gate.weights, np.random.default_rng(seed)
    state = _optimizer().init(weights)
    for step in range(CHECK_STEPS, steps + 1, CHECK_STEPS):
        weights, state = _advance(weights, state, gate, some, rng.choice(places, (CHECK_STEPS, min(BATCH, len(places)))))
        yield step, weights
