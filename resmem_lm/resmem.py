"""The method of the paper in its own symbols: residuals, neighbor weights, sparse merge, prediction.

    r_i     = onehot(y_i) - softmax(f(x_i) / T)                 residual of training token i      (section 3.2, step 2)
    w_i(q)  = exp(-||z_q - z_i||_2 / sigma), sum to 1           over the k nearest keys z = phi(x)  (step 3)
    r_kNN   = sum_i w_i r_i                                     zero where a row stores no entry
    score   = softmax(f(x_q) / T) + lambda * r_kNN              lambda = 1 is the paper            (step 4)

A stored row is sparse: of r_i it has the `entries` largest components (appendix C takes 128 of 32,128), which are 1 - p(y) of its own
token y and -p of others.
Everything here is pure and works on any number of queries at once.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def residual(
    logits: Float[Array, "rows vocab"], targets: Int[Array, " rows"], temperature: float | Float[Array, ""] = 1.0
) -> Float[Array, "rows vocab"]:
    """r = onehot(y) - softmax(f / T)."""
    return jax.nn.one_hot(targets, logits.shape[-1]) - jax.nn.softmax(logits / temperature)


def largest(values: Float[Array, "rows n"], count: int) -> tuple[Float[Array, "rows count"], Int[Array, "rows count"]]:
    """`jax.lax.top_k`, equal values by place, without a look at everything: only the blocks whose largest is among the largest matter."""
    block = 1 << max(0, round(math.log2(values.shape[1] / count) / 2))  # as many blocks as values in those that are looked at
    if block < 4:
        return _top_k(values, count)
    padded = jnp.pad(values, ((0, 0), (0, -values.shape[1] % block)), constant_values=-jnp.inf)
    blocks = padded.reshape(len(values), -1, block)
    numbers = jnp.sort(_top_k(jnp.max(blocks, axis=-1), count)[1], axis=-1)
    found, places = _top_k(jnp.take_along_axis(blocks, numbers[..., None], axis=1).reshape(len(values), -1), count)
    return found, jnp.take_along_axis(numbers, places // block, axis=1) * block + places % block


def _top_k(values: Float[Array, "rows n"], count: int) -> tuple[Float[Array, "rows count"], Int[Array, "rows count"]]:
    # XLA makes a full sort of a top_k whose result is sliced, far slower on a CPU.
    found, places = jax.lax.optimization_barrier(jax.lax.top_k(values, count))
    return found, places


def sparse_residual(
    logits: Float[Array, "rows vocab"], targets: Int[Array, " rows"], log_z: Float[Array, " rows"], entries: int
) -> tuple[Int[Array, "rows others"], Float[Array, "rows others"], Float[Array, " rows"]]:
    """r at T = 1 without all but `entries` components: the token's own and the largest others, largest first.

    (The paper keeps those largest in absolute value; the own is not among these only where 1 - p(y) is smaller than all of them.)

    Args:
        logits: f(x).
        targets: y.
        log_z: logsumexp of the logits.
        entries: how many components, the token's own counted; all where the vocabulary has no more.

    Returns:
        Of the others, ids and probabilities p (r = -p), and the largest p that is dropped (0 if none).
    """
    vocab = logits.shape[1]
    others = min(entries, vocab) - 1
    found, ids = largest(logits, min(others + 2, vocab))
    is_target = ids == targets[:, None]
    place = jnp.where(jnp.any(is_target, axis=1), jnp.argmax(is_target, axis=1), ids.shape[1])[:, None]
    rank = jnp.arange(ids.shape[1] - 1)
    without = rank + (rank >= place)  # the token's own is passed over
    ids, p = jnp.take_along_axis(ids, without, axis=1), jnp.exp(jnp.take_along_axis(found, without, axis=1) - log_z[:, None])
    dropped = p[:, others] if p.shape[1] > others else jnp.zeros(len(logits))
    return ids[:, :others], p[:, :others], dropped


def at_temperature(
    powers: Float[Array, "... entries"],
    is_target: Bool[Array, "... entries"],
    target_log_probability: Float[Array, "..."],
    log_power_sum: Float[Array, "..."],
    temperature: float | Float[Array, ""],
) -> Float[Array, "... entries"]:
    """Residual entries at temperature T, from p_1^(1/T) of what is stored at T = 1 (0 where there is no entry).

    The logits are log p_1 + log Z_1, so p_T = p_1^(1/T) / exp(s_T) with s_T = log sum_y p_1(y)^(1/T) = log Z_T - log Z_1 / T, which is
    0 at T = 1. An entry of the row's own token is there whatever stands in `powers`; its p_1 is given more exactly.
    """
    own = jnp.exp(target_log_probability / temperature - log_power_sum)
    return jnp.where(is_target, 1 - own[..., None], -powers * jnp.exp(-log_power_sum)[..., None])


def neighbor_weights(distances: Float[Array, "queries k"], sigma: float | Float[Array, ""]) -> Float[Array, "queries k"]:
    """w_i = exp(-distance_i / sigma), normalized. Distances are L2 (not squared); an infinite one weighs nothing, even where all are."""
    return jnp.where(jnp.isfinite(distances), jax.nn.softmax(-distances / sigma, axis=-1), 0)


def merge_sparse(
    base: Float[Array, "queries vocab"],
    weights: Float[Array, "queries k"],
    ids: Int[Array, "queries k entries"],
    values: Float[Array, "queries k entries"],
    lambda_: float | Float[Array, ""] = 1.0,
) -> Float[Array, "queries vocab"]:
    """score = softmax(f(x_q) / T) + lambda * sum_i w_i r_i with zero-filled r_i."""
    queries = jnp.arange(base.shape[0])[:, None, None]
    return base.at[queries, ids].add(lambda_ * weights[..., None] * values)


def knn_probabilities(weights: Float[Array, "queries k"], targets: Int[Array, "queries k"], vocab: int) -> Float[Array, "queries vocab"]:
    """p_kNN(y) = the weight of the neighbors whose token is y (Khandelwal et al. 2020)."""
    queries = jnp.arange(weights.shape[0])[:, None]
    return jnp.zeros((weights.shape[0], vocab), weights.dtype).at[queries, targets].add(weights)


def knn_lm(
    base: Float[Array, "queries vocab"], knn: Float[Array, "queries vocab"], lambda_: float | Float[Array, ""]
) -> Float[Array, "queries vocab"]:
    """(1 - lambda) p + lambda p_kNN (Khandelwal et al. 2020, equation 3)."""
    return (1 - lambda_) * base + lambda_ * knn


def predict(scores: Float[Array, "queries vocab"]) -> Int[Array, " queries"]:
    """The token of the largest score; the lowest id among equals."""
    return jnp.argmax(scores, axis=-1)
