"""Fit the gate of Adaptive ResMem: a small network that chooses for each token how much to trust the memory.

    q is proportional to  p exp(g)    with g the network's output at the proposed tokens, and 0 at all other tokens

The gate replaces one lambda for all tokens (paper, section 6). He et al. (2021, "Efficient Nearest Neighbor Language Models", section 4.1)
learn kNN-LM's lambda from similar features: distances and DeepNet's confidence. `resmem_lm.evaluation.features` lists the features. The
network minimizes the cross-entropy of validation tokens. The loss on a held-out fifth of their documents chooses the number of steps.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from jaxtyping import Array, Bool, Float, Int

from resmem_lm.evaluation.calibrated import Distribution, is_first, normalized, target_probability
from resmem_lm.evaluation.candidates import Block
from resmem_lm.evaluation.features import Features, Source, columns_of, features

with epy.lazy_imports():
    import optax

    from resmem_lm.evaluation import gate_network

STEPS, CHECK_STEPS = 800, 50
BATCH = 1024
HELD_OUT_BATCH = 8192
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 1e-2
HELD_OUT = 5  # every fifth group of documents is held out
LARGEST = 30.0  # largest change of a logit, so that its exponential is finite

Weights = dict[str, Any]


class GateInputs(NamedTuple):
    """Inputs and targets of the network: a row per query, a column per proposed token. A repeated token counts at its first column."""

    features: Features
    base: Float[Array, "queries columns"]  # DeepNet's probability of the column's token
    counted: Bool[Array, "queries columns"]
    target: Bool[Array, "queries columns"]  # counted, and equal to the query's token
    target_base: Float[Array, " queries"]  # DeepNet's probability of the target, even if no column has it


class Gate(NamedTuple):
    """The network's weights, and the features' means and scales."""

    weights: Weights
    mean: Features
    scale: Features


class Adaptive(NamedTuple):
    """The method with its gate, kNN's bandwidth in the features, and the sources that the gate sees."""

    gate: Gate
    sigma: float
    sources: tuple[Source, ...]


def gate_inputs(block: Block, sigma: float | Float[Array, ""], unit: int, sources: tuple[Source, ...]) -> GateInputs:
    """Compute the network's inputs at T = 1, which has index `unit` in the datastore."""
    columns, candidates = columns_of(block, sources), block.candidates
    ids = candidates.ids[:, columns]
    base = jnp.exp(candidates.logits[:, columns] - candidates.log_partition[:, unit, None])
    counted = is_first(ids)
    is_target = counted & (ids == block.targets[:, None])
    return GateInputs(features(block, columns, sources, sigma, unit), base, counted, is_target, block.target_base[:, unit])


def distribution(gate: Gate, some: GateInputs) -> Distribution:
    """Return q at the proposed tokens."""
    scaled = jax.tree.map(lambda x, mean, scale: (x - mean) / scale, some.features, gate.mean, gate.scale)
    change: Any = gate_network.GateNetwork().apply({"params": gate.weights}, *scaled)
    return normalized(some.base, some.base * jnp.exp(jnp.clip(change, -LARGEST, LARGEST)), some.counted)


def fit(some: GateInputs, groups: Int[np.ndarray, " queries"], seed: int = 0) -> Gate:
    """Fit the network on validation tokens, starting from DeepNet alone. Tokens with equal `groups` are not independent."""
    of_columns, of_queries = np.asarray(some.features.of_column)[np.asarray(some.counted)], np.asarray(some.features.of_query)
    some = jax.tree.map(jnp.asarray, some)
    weights = gate_network.initial_weights(of_columns.shape[-1], of_queries.shape[-1], seed)
    mean, scale = (Features(*(jnp.asarray(f(x)) for x in (of_columns, of_queries))) for f in (_mean, _scale))
    gate = Gate(weights, mean, scale)
    *_, weights = _train(gate, some, np.arange(len(groups)), _choose_steps(gate, some, groups, seed), seed)
    return gate._replace(weights=weights)


def _mean(x: Float[np.ndarray, "some features"]) -> Float[np.ndarray, " features"]:
    return x.mean(axis=0)


def _scale(x: Float[np.ndarray, "some features"]) -> Float[np.ndarray, " features"]:
    return x.std(axis=0) + 1e-3


def _choose_steps(gate: Gate, some: GateInputs, groups: Int[np.ndarray, " queries"], seed: int) -> int:
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


def _loss(weights: Weights, gate: Gate, some: GateInputs, queries: Int[Array, " some"] | Int[np.ndarray, " some"]) -> Float[Array, ""]:
    """Return the mean cross-entropy of some queries."""
    some = jax.tree.map(lambda array: array[queries], some)
    q = distribution(gate._replace(weights=weights), some)
    return -jnp.mean(jnp.log(target_probability(q, some.target, some.target_base) + 1e-12))


_jitted_loss = jax.jit(_loss)


def _optimizer() -> Any:
    return optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, STEPS), weight_decay=WEIGHT_DECAY)


def _train(gate: Gate, some: GateInputs, queries: Int[np.ndarray, " some"], steps: int, seed: int) -> Iterator[Weights]:
    """Yield the initial weights, and the weights after every CHECK_STEPS steps."""
    weights, rng = gate.weights, np.random.default_rng(seed)
    state = _optimizer().init(weights)
    yield weights
    for _ in range(steps // CHECK_STEPS):
        weights, state = _advance(weights, state, gate, some, rng.choice(queries, (CHECK_STEPS, min(BATCH, len(queries)))))
        yield weights


@jax.jit
def _advance(weights: Weights, state: Any, gate: Gate, some: GateInputs, batches: Int[Array, "steps batch"]) -> tuple[Weights, Any]:
    optimizer = _optimizer()

    def step(carry: tuple[Weights, Any], queries: Int[Array, " batch"]) -> tuple[tuple[Weights, Any], None]:
        weights, state = carry
        updates, state = optimizer.update(jax.grad(_loss)(weights, gate, some, queries), state, weights)
        return (optax.apply_updates(weights, updates), state), None

    return jax.lax.scan(step, (weights, state), batches)[0]
