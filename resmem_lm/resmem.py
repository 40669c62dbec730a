"""The method of the paper in its own symbols: residuals, neighbour weights, sparse merge, prediction.

    r_i     = onehot(y_i) - softmax(f(x_i) / T)                 residual of training token i      (section 3.2, step 2)
    w_i(q)  = exp(-||z_q - z_i||_2 / sigma), sum to 1           over the k nearest keys z = phi(x)  (step 3)
    r_kNN   = sum_i w_i r_i                                     zero where a row stores no entry
    score   = softmax(f(x_q) / T) + lambda * r_kNN              lambda = 1 is the paper            (step 4)

A stored row is sparse: the `entries` components of r_i largest in absolute value (appendix C takes 128 of 32,128).
Everything here is pure and works on any number of queries at once.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def residual(
    logits: Float[Array, "rows vocab"], targets: Int[Array, " rows"], temperature: float | Float[Array, ""] = 1.0
) -> Float[Array, "rows vocab"]:
    """r = onehot(y) - softmax(f / T)."""
    return jax.nn.one_hot(targets, logits.shape[-1]) - jax.nn.softmax(logits / temperature)


def largest(values: Float[Array, "rows n"], count: int) -> tuple[Float[Array, "rows count"], Int[Array, "rows count"]]:
    """`jax.lax.top_k` behind a barrier: XLA makes a full sort of a top_k whose result is sliced, far slower on a CPU."""
    found, places = jax.lax.optimization_barrier(jax.lax.top_k(values, count))
    return found, places


def sparse_residual(
    r: Float[Array, "rows vocab"], entries: int
) -> tuple[Int[Array, "rows entries"], Float[Array, "rows entries"], Float[Array, " rows"]]:
    """Ids and values of the `entries` components largest in absolute value, and the largest |r| that is dropped (0 if none)."""
    entries = min(entries, r.shape[-1])
    magnitudes, ids = largest(jnp.abs(r), min(entries + 1, r.shape[-1]))
    dropped = magnitudes[:, entries] if magnitudes.shape[1] > entries else jnp.zeros(r.shape[0])
    ids = ids[:, :entries]
    return ids, jnp.take_along_axis(r, ids, axis=1), dropped


def at_temperature(
    values: Float[Array, "... entries"],
    is_target: Float[Array, "... entries"],
    target_log_probability: Float[Array, "..."],
    log_partition: Float[Array, "..."],
    log_partition_t: Float[Array, "..."],
    temperature: float | Float[Array, ""],
) -> Float[Array, "... entries"]:
    """Residual entries stored at T = 1 -> the same entries at temperature T.

    p_1 = onehot - r, and logits f = log p_1 + log Z_1, so p_T = exp(f / T - log Z_T), where log Z_T = logsumexp(f / T). The
    target's p_1 is given, because 1 - r loses it to rounding where r is nearly 1. Zeros (no entry) stay zero.
    """
    log_p = jnp.where(is_target > 0, target_log_probability[..., None], jnp.log(jnp.maximum(-values, 1e-30)))
    p_t = jnp.exp((log_p + log_partition[..., None]) / temperature - log_partition_t[..., None])
    return jnp.where(values == 0, 0.0, is_target - p_t)


def neighbor_weights(distances: Float[Array, "queries k"], sigma: float | Float[Array, ""]) -> Float[Array, "queries k"]:
    """w_i = exp(-distance_i / sigma), normalised. Distances are L2 (not squared); an infinite one weighs nothing."""
    return jax.nn.softmax(-distances / sigma, axis=-1)


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
    """p_kNN(y) = the weight of the neighbours whose token is y (Khandelwal et al. 2020)."""
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
