"""A lambda for each token: how far to trust the memory here, told by the distances of the neighbours and DeepNet's confidence.

lambda(q) = softplus(a small network of features(q)), in `resmem_lm.calibrated.boosted`. He et al. (2021, "Efficient Nearest Neighbor
Language Models", section 4.1) do so for kNN-LM. Fitted by cross-entropy on validation tokens; a part of the documents says when to stop.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from resmem_lm.calibrated import boosted

HIDDEN = 32
STEPS, CHECK_STEPS = 600, 20
LEARNING_RATE = 0.01
HELD_OUT = 5  # one document in so many says when to stop


class Tokens(NamedTuple):
    """What is known of some tokens at one k, sigma and T: probabilities and merged residuals of the candidates, and the neighbours."""

    ids: Int[Array, "queries candidates"]
    first: Bool[Array, "queries candidates"]
    base: Float[Array, "queries candidates"]
    residual: Float[Array, "queries candidates"]
    knn: Float[Array, "queries candidates"]
    distances: Float[Array, "queries k"]
    targets: Int[Array, " queries"]
    target_base: Float[Array, " queries"]  # DeepNet's probability of the target, candidate or not


class Gate(NamedTuple):
    """The network, and how its inputs are brought to one scale."""

    weights: dict[str, Any]
    mean: Any
    scale: Any


def features(tokens: Tokens) -> Float[Array, "queries features"]:
    """Logarithms of distances at ranks 1, 2, 4, ...; largest and entropy of DeepNet's and of the neighbours' probabilities; agreement."""
    ranks = [rank for rank in (0, 1, 3, 7, 15, 31) if rank < tokens.distances.shape[1]]
    far = jnp.where(jnp.isfinite(tokens.distances), tokens.distances, 1e3)
    columns = [jnp.log(far[:, rank] + 1e-3) for rank in ranks]
    for p in (tokens.base, tokens.knn):
        p = jnp.where(tokens.first, p, 0)
        top = jax.lax.top_k(p, 2)[0]
        columns += [top[:, 0], top[:, 0] - top[:, 1], -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-9)), axis=-1)]
    best, nearest = jnp.argmax(tokens.base, axis=-1)[:, None], jnp.argmax(tokens.knn, axis=-1)[:, None]
    columns += [jnp.take_along_axis(tokens.knn, best, axis=1)[:, 0], jnp.take_along_axis(tokens.base, nearest, axis=1)[:, 0]]
    columns.append(jnp.take_along_axis(tokens.residual, nearest, axis=1)[:, 0])
    return jnp.stack(columns, axis=1)


def lambdas(gate: Gate, tokens: Tokens) -> Float[Array, " queries"]:
    """lambda(q)."""
    x = (features(tokens) - gate.mean) / gate.scale
    hidden = jax.nn.gelu(x @ gate.weights["in"] + gate.weights["in_bias"])
    return jax.nn.softplus(hidden @ gate.weights["out"] + gate.weights["out_bias"])


def target_probability(tokens: Tokens, q: Float[Array, "queries candidates"]) -> Float[Array, " queries"]:
    """q of the target: that of its candidate, or DeepNet's over the same normaliser."""
    is_target = (tokens.ids == tokens.targets[:, None]) & tokens.first
    rest = jnp.maximum(1e-9, 1 - jnp.sum(jnp.where(tokens.first, tokens.base, 0), axis=-1))
    q_rest = jnp.maximum(1e-9, 1 - jnp.sum(jnp.where(tokens.first, q, 0), axis=-1))
    outside = tokens.target_base * q_rest / rest
    return jnp.where(jnp.any(is_target, axis=-1), jnp.sum(jnp.where(is_target, q, 0), axis=-1), outside)


def _loss(weights: dict[str, Any], gate: Gate, tokens: Tokens) -> Float[Array, ""]:
    q = boosted(tokens.base, tokens.residual, tokens.first, lambdas(gate._replace(weights=weights), tokens))
    return -jnp.mean(jnp.log(jnp.maximum(target_probability(tokens, q), 1e-12)))


def fit(tokens: Tokens, documents: Int[np.ndarray, " queries"], start: float, seed: int = 0) -> Gate:
    """Fits the gate.

    Args:
        tokens: of validation.
        documents: number of each token's document: whole documents are held out.
        start: the lambda with which it begins.
        seed: of the network's first weights.
    """
    held_out = documents % HELD_OUT == HELD_OUT - 1
    if held_out.all() or not held_out.any():
        held_out = np.arange(len(documents)) % HELD_OUT == 0  # too few documents to hold one out
    x = features(tokens)
    keys = jax.random.split(jax.random.key(seed), 2)
    weights = {
        "in": jax.random.normal(keys[0], (x.shape[1], HIDDEN)) / np.sqrt(x.shape[1]),
        "in_bias": jnp.zeros(HIDDEN),
        "out": 0.01 * jax.random.normal(keys[1], (HIDDEN,)),
        "out_bias": jnp.log(jnp.expm1(jnp.float32(max(start, 0.01)))),
    }
    gate = Gate(weights, jnp.mean(x, axis=0), jnp.std(x, axis=0) + 1e-6)
    optimizer = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, STEPS), weight_decay=1e-3)

    @jax.jit
    def steps(weights: dict[str, Any], state: Any, some: Tokens) -> tuple[dict[str, Any], Any]:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            weights, state = carry
            updates, state = optimizer.update(jax.grad(_loss)(weights, gate, some), state, weights)
            return (optax.apply_updates(weights, updates), state), None

        return jax.lax.scan(step, (weights, state), None, length=CHECK_STEPS)[0]

    loss = jax.jit(_loss)
    fitted, watched = (jax.tree.map(lambda array, some=some: array[some], tokens) for some in (~held_out, held_out))
    best, best_loss, state = weights, float(loss(weights, gate, watched)), optimizer.init(weights)
    for _ in range(STEPS // CHECK_STEPS):
        weights, state = steps(weights, state, fitted)
        now = float(loss(weights, gate, watched))
        if now < best_loss:
            best, best_loss = weights, now
    return gate._replace(weights=best)
