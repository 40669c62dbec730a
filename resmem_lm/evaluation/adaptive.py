"""Fit the gate of Adaptive ResMem: a small network that chooses for each token how much to trust the memory.

    q is proportional to  p exp(g)    with g the network's output at the neighbors' tokens, and 0 at all other tokens

The gate replaces one lambda for all tokens (paper, section 6). He et al. (2021, "Efficient Nearest Neighbor Language Models", section 4.1)
learn kNN-LM's lambda from similar features: distances and DeepNet's confidence. The network minimizes the cross-entropy of validation
tokens. The loss on a held-out fifth of their documents chooses the number of steps.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from jaxtyping import Array, Bool, Float, Int

from resmem_lm.evaluation.calibrated import Distribution, is_first, normalized, target_probability
from resmem_lm.evaluation.candidates import Block, score

with epy.lazy_imports():
    import optax

    from resmem_lm.evaluation import gate_network

STEPS, CHECK_STEPS = 800, 50
BATCH = 1024
HELD_OUT_BATCH = 8192
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 1e-2
HELD_OUT = 5  # every fifth group of documents is held out
BANDWIDTHS = (0.5, 1.0, 4.0)  # in units of sigma
SMALL = 1e-6
LARGEST = 30.0  # largest change of a logit, so that its exponential is finite

Weights = dict[str, Any]


class GateFeatures(NamedTuple):
    """Inputs and targets of the network: a row per query, a column per neighbor. A repeated token counts at its nearest neighbor."""

    features: Float[Array, "queries k features"]
    base: Float[Array, "queries k"]  # DeepNet's probability of the neighbor's token
    counted: Bool[Array, "queries k"]
    target: Bool[Array, "queries k"]  # counted, and equal to the query's token
    target_base: Float[Array, " queries"]  # DeepNet's probability of the target, even if no neighbor has it


class Gate(NamedTuple):
    """The network's weights, and the features' means and scales."""

    weights: Weights
    mean: Float[Array, " features"]
    scale: Float[Array, " features"]


def gate_features(block: Block, sigma: float | Float[Array, ""], unit: int) -> GateFeatures:
    """Compute the network's features at T = 1, which has index `unit` in the datastore.

    Features of a neighbor's token y: p(y), p_kNN(y) at three bandwidths (multiples of sigma), r_kNN(y), the distance of the nearest row
    with y, and the largest 1 - p(y) that a row with y stores. Features of a query: three distances, DeepNet's largest probability and
    entropy, and the largest p_kNN at each bandwidth.
    """
    candidates, neighbors, targets, target_base = block
    k = neighbors.tokens.shape[1]
    sigmas = sigma * jnp.array(BANDWIDTHS, jnp.float32)
    scores = score(candidates, neighbors, jnp.full(len(BANDWIDTHS), k), sigmas, 1.0, unit)
    base, residual, knn = scores.base[:, -k:], scores.residual[1][:, -k:], scores.knn[..., -k:]
    same = neighbors.tokens[:, :, None] == neighbors.tokens[:, None, :]
    found = jnp.isfinite(neighbors.distances)
    counted = is_first(neighbors.tokens) & found  # missing neighbors come last
    farthest = jnp.max(jnp.where(found, neighbors.distances, 0), axis=1, keepdims=True)
    distances = jnp.log(jnp.where(found, neighbors.distances, farthest) + 1e-2)
    unexpected = -jnp.expm1(neighbors.target_log_probability)
    deepnet = scores.base[:, :-k]  # DeepNet's own candidates
    of_token = [
        jnp.log(base + SMALL),
        *jnp.log(knn + 1e-4),
        residual,
        jnp.min(jnp.where(same & found[:, None, :], distances[:, None, :], jnp.inf), axis=-1, initial=10.0),
        jnp.max(jnp.where(same & found[:, None, :], unexpected[:, None, :], 0), axis=-1),
    ]
    of_query = [
        *(distances[:, rank] for rank in (0, min(7, k - 1), k - 1)),
        jnp.max(deepnet, axis=-1),
        -jnp.sum(deepnet * jnp.log(jnp.maximum(deepnet, SMALL)), axis=-1),
        *jnp.log(jnp.max(knn, axis=-1) + 1e-4),
    ]
    columns = [*of_token, *(jnp.broadcast_to(column[:, None], base.shape) for column in of_query)]
    is_target = counted & (neighbors.tokens == targets[:, None])
    return GateFeatures(jnp.stack(columns, axis=-1), base, counted, is_target, target_base[:, unit])


def distribution(gate: Gate, some: GateFeatures) -> Distribution:
    """Return q at the neighbors' tokens."""
    change: Any = gate_network.GateNetwork().apply({"params": gate.weights}, (some.features - gate.mean) / gate.scale)
    return normalized(some.base, some.base * jnp.exp(jnp.clip(change, -LARGEST, LARGEST)), some.counted)


def fit(some: GateFeatures, groups: Int[np.ndarray, " queries"], seed: int = 0) -> Gate:
    """Fit the network on validation tokens, starting from DeepNet alone. Tokens with equal `groups` are not independent."""
    x = np.asarray(some.features)[np.asarray(some.counted)]
    some = GateFeatures(*map(jnp.asarray, some))
    weights = gate_network.initial_weights(x.shape[-1], seed)
    gate = Gate(weights, jnp.asarray(x.mean(axis=0)), jnp.asarray(x.std(axis=0) + 1e-3))
    *_, weights = _train(gate, some, np.arange(len(groups)), _choose_steps(gate, some, groups, seed), seed)
    return gate._replace(weights=weights)


def _choose_steps(gate: Gate, some: GateFeatures, groups: Int[np.ndarray, " queries"], seed: int) -> int:
    """Return the number of steps with the lowest loss on held-out groups."""
    is_held_out = groups % HELD_OUT == HELD_OUT - 1
    if not is_held_out.any():
        is_held_out = np.arange(len(groups)) % HELD_OUT == HELD_OUT - 1  # too few groups
    fitted, held_out = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    if not len(held_out):
        return STEPS
    parts = np.array_split(held_out, -(-len(held_out) // HELD_OUT_BATCH))

    def loss(weights: Weights) -> float:
        return sum(float(_jitted_loss(weights, gate, some, part)) * len(part) for part in parts) / len(held_out)

    losses = [loss(weights) for weights in _train(gate, some, fitted, STEPS if len(fitted) else 0, seed)]
    return CHECK_STEPS * min(range(len(losses)), key=losses.__getitem__)


def _loss(weights: Weights, gate: Gate, some: GateFeatures, queries: Int[Array, " some"] | Int[np.ndarray, " some"]) -> Float[Array, ""]:
    """Return the mean cross-entropy of some queries."""
    some = GateFeatures(*(array[queries] for array in some))
    q = distribution(gate._replace(weights=weights), some)
    return -jnp.mean(jnp.log(target_probability(q, some.target, some.target_base) + 1e-12))


_jitted_loss = jax.jit(_loss)


def _optimizer() -> Any:
    return optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, STEPS), weight_decay=WEIGHT_DECAY)


def _train(gate: Gate, some: GateFeatures, queries: Int[np.ndarray, " some"], steps: int, seed: int) -> Iterator[Weights]:
    """Yield the initial weights, and the weights after every CHECK_STEPS steps."""
    weights, rng = gate.weights, np.random.default_rng(seed)
    state = _optimizer().init(weights)
    yield weights
    for _ in range(steps // CHECK_STEPS):
        weights, state = _advance(weights, state, gate, some, rng.choice(queries, (CHECK_STEPS, min(BATCH, len(queries)))))
        yield weights


@jax.jit
def _advance(weights: Weights, state: Any, gate: Gate, some: GateFeatures, batches: Int[Array, "steps batch"]) -> tuple[Weights, Any]:
    optimizer = _optimizer()

    def step(carry: tuple[Weights, Any], queries: Int[Array, " batch"]) -> tuple[tuple[Weights, Any], None]:
        weights, state = carry
        updates, state = optimizer.update(jax.grad(_loss)(weights, gate, some, queries), state, weights)
        return (optax.apply_updates(weights, updates), state), None

    return jax.lax.scan(step, (weights, state), batches)[0]
