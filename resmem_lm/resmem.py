"""The method of the paper in its own symbols: residuals, neighbor weights, sparse merge, prediction.

    r_i     = onehot(y_i) - softmax(f(x_i) / T)                 residual of training token i        (section 3.2, step 2)
    w_i(q)  = exp(-||z_q - z_i||_2 / sigma), sum to 1           over the k nearest keys z = phi(x)  (step 3)
    r_kNN   = sum_i w_i r_i                                     a missing entry counts as zero
    score   = softmax(f(x_q) / T) + lambda * r_kNN              lambda = 1 is the paper             (step 4)

A row is sparse. It stores the `entries` components of r_i with the largest magnitude (appendix C: 128 of 32,128). The component of the
row's own token y is 1 - p(y); the component of any other token is -p. Every function is pure and works on any number of queries.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def residual(
    logits: Float[Array, "rows vocab"], targets: Int[Array, " rows"], temperature: float | Float[Array, ""] = 1.0
) -> Float[Array, "rows vocab"]:
    """Return the residual r = onehot(y) - softmax(f / T)."""
    return jax.nn.one_hot(targets, logits.shape[-1]) - jax.nn.softmax(logits / temperature)


def largest(values: Float[Array, "rows n"], count: int) -> tuple[Float[Array, "rows count"], Int[Array, "rows count"]]:
    """Return the result of `jax.lax.top_k` by sorting only the blocks with the largest maxima, which contain the largest values."""
    block = 1 << max(0, round(math.log2(values.shape[1] / count) / 2))  # balances the number of blocks and of sorted values
    if block < 4:
        return _top_k(values, count)
    padded = jnp.pad(values, ((0, 0), (0, -values.shape[1] % block)), constant_values=-jnp.inf)
    blocks = padded.reshape(len(values), -1, block)
    numbers = jnp.sort(_top_k(jnp.max(blocks, axis=-1), count)[1], axis=-1)
    found, places = _top_k(jnp.take_along_axis(blocks, numbers[..., None], axis=1).reshape(len(values), -1), count)
    return found, jnp.take_along_axis(numbers, places // block, axis=1) * block + places % block


def _top_k(values: Float[Array, "rows n"], count: int) -> tuple[Float[Array, "rows count"], Int[Array, "rows count"]]:
    # If the result of top_k is sliced, XLA replaces top_k by a full sort, which is much slower on a CPU. The barrier prevents this.
    found, places = jax.lax.optimization_barrier(jax.lax.top_k(values, count))
    return found, places


def sparse_residual(
    logits: Float[Array, "rows vocab"], targets: Int[Array, " rows"], log_z: Float[Array, " rows"], entries: int
) -> tuple[Int[Array, "rows others"], Float[Array, "rows others"], Float[Array, " rows"]]:
    """Return the ids and probabilities p of the stored tokens other than y, largest p first, and the largest dropped p (0 if none).

    A row stores `entries` components of r at T = 1, or the whole vocabulary if it is smaller: the row's own token y, and the other tokens
    with the largest p. The paper keeps the components with the largest magnitude; the two choices differ only if 1 - p(y) is smaller than
    these. `log_z` is the logsumexp of the logits.
    """
    vocab = logits.shape[1]
    others = min(entries, vocab) - 1
    found, ids = largest(logits, min(others + 2, vocab))
    is_target = ids == targets[:, None]
    place = jnp.where(jnp.any(is_target, axis=1), jnp.argmax(is_target, axis=1), ids.shape[1])[:, None]
    rank = jnp.arange(ids.shape[1] - 1)
    without = rank + (rank >= place)  # skip the own token
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
    """Return residual entries at temperature T from probabilities p_1 at T = 1.

    The logits are log p_1 + log Z_1. Hence p_T = p_1^(1/T) / exp(s_T), where s_T = log sum_y p_1(y)^(1/T) = log Z_T - log Z_1 / T.
    `powers` are p_1^(1/T), or 0 for a missing entry. `log_power_sum` is s_T. The power of the row's own token, which `is_target` marks, is
    ignored: its log p_1, `target_log_probability`, is more exact.
    """
    own = jnp.exp(target_log_probability / temperature - log_power_sum)
    return jnp.where(is_target, 1 - own[..., None], -powers * jnp.exp(-log_power_sum)[..., None])


def neighbor_weights(distances: Float[Array, "queries k"], sigma: float | Float[Array, ""]) -> Float[Array, "queries k"]:
    """Return the normalized w_i = exp(-distance_i / sigma). Distances are L2, not squared. An infinite distance has weight 0."""
    return jnp.where(jnp.isfinite(distances), jax.nn.softmax(-distances / sigma, axis=-1), 0)


def merge_sparse(
    base: Float[Array, "queries vocab"],
    weights: Float[Array, "queries k"],
    ids: Int[Array, "queries k entries"],
    values: Float[Array, "queries k entries"],
    lambda_: float | Float[Array, ""] = 1.0,
) -> Float[Array, "queries vocab"]:
    """Return score = softmax(f(x_q) / T) + lambda * sum_i w_i r_i, where a missing entry of r_i is 0."""
    queries = jnp.arange(base.shape[0])[:, None, None]
    return base.at[queries, ids].add(lambda_ * weights[..., None] * values)


def knn_probabilities(weights: Float[Array, "queries k"], targets: Int[Array, "queries k"], vocab: int) -> Float[Array, "queries vocab"]:
    """Return p_kNN(y), the total weight of the neighbors whose token is y (Khandelwal et al. 2020)."""
    queries = jnp.arange(weights.shape[0])[:, None]
    return jnp.zeros((weights.shape[0], vocab), weights.dtype).at[queries, targets].add(weights)


def knn_lm(
    base: Float[Array, "queries vocab"], knn: Float[Array, "queries vocab"], lambda_: float | Float[Array, ""]
) -> Float[Array, "queries vocab"]:
    """Return (1 - lambda) p + lambda p_kNN (Khandelwal et al. 2020, equation 3)."""
    return (1 - lambda_) * base + lambda_ * knn


def predict(scores: Float[Array, "queries vocab"]) -> Int[Array, " queries"]:
    """Return the token with the largest score, and the lowest id among equal scores."""
    return jnp.argmax(scores, axis=-1)
