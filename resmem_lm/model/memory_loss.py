"""Compute the loss of DeepNet with a memory in sight: the tokens of the training batch (TRIME, Zhong et al. 2022, with residuals).

    w_ij = exp(-||z_i - z_j||_2 / sigma), sum to 1              over the tokens j that token i may see
    r_i  = sum_j w_ij (onehot(y_j) - softmax(f(x_j)))           the residuals are constants for the gradient
    loss = sum_i cross-entropy(f(x_i) + lambda r_i, y_i)        the gradient reaches f(x_i), z_i, z_j and lambda

Token i sees the tokens of other rows. In a share `OWN_ROW` of the rows, drawn at random at each step, it also sees the earlier tokens
of its own row. Without this limit the model would learn to copy from the row, which attention does already. Padding is never seen.

The product of weights and residuals is the main cost. Hence only every `STRIDE`-th token of a row has a loss, from a random first token.
The sum is multiplied by the share of tokens that is left out, so that its expectation is the sum over all tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from resmem_lm.resmem import neighbor_weights, residual

OWN_ROW = 0.1  # probability that a row sees its own earlier tokens
SIGMA = 1.0
STRIDE = 8
SMALLEST = 1e-3  # squared distances below count as equal to it: the gradient of a distance of 0 does not exist

Segments = Int[Array, "batch length"]


def query_places(key: Array, length: int, stride: int = STRIDE) -> Int[Array, " queries"]:
    """Return every `stride`-th place of a row, cyclically from a random place. Each place is equally probable."""
    return (jax.random.randint(key, (), 0, length) + stride * jnp.arange(max(1, length // stride))) % length


def visible(
    segment_ids: Segments, places: Int[Array, " queries"], own_row: Bool[Array, " batch"]
) -> Bool[Array, "batch queries batch length"]:
    """Return which tokens (row, place) each query sees: tokens of other rows, and earlier tokens of its row where `own_row` is true."""
    batch, length = segment_ids.shape
    same_row = jnp.eye(batch, dtype=bool)[:, None, :, None]
    earlier = own_row[:, None, None, None] & (jnp.arange(length) < places[:, None])[None, :, None, :]
    return (segment_ids > 0)[None, None] & (~same_row | earlier)


def distances(queries: Float[Array, "queries emb"], keys: Float[Array, "rows emb"]) -> Float[Array, "queries rows"]:
    """Return L2 distances, at least the root of `SMALLEST`."""
    squared = jnp.sum(queries**2, axis=1)[:, None] + jnp.sum(keys**2, axis=1) - 2 * queries @ keys.T
    return jnp.sqrt(jnp.maximum(squared, SMALLEST))


def memory_residuals(
    logits: Float[Array, "batch length vocab"],
    keys: Float[Array, "batch length emb"],
    targets: Int[Array, "batch length"],
    places: Int[Array, " queries"],
    seen: Bool[Array, "batch queries batch length"],
) -> Float[Array, "batch queries vocab"]:
    """Return the weighted sum of the residuals that each query sees, or 0 if it sees none."""
    flat = keys.astype(jnp.float32).reshape(-1, keys.shape[-1])
    queries = keys[:, places].astype(jnp.float32).reshape(-1, keys.shape[-1])
    far = jnp.where(seen.reshape(len(queries), len(flat)), distances(queries, flat), jnp.inf)
    residuals = residual(jax.lax.stop_gradient(logits.reshape(len(flat), -1)), targets.reshape(-1))
    return (neighbor_weights(far, SIGMA) @ residuals).reshape(*seen.shape[:2], -1)


def memory_loss(
    logits: Float[Array, "batch length vocab"],
    keys: Float[Array, "batch length emb"],
    targets: Int[Array, "batch length"],
    segment_ids: Segments,
    lambda_: float | Float[Array, ""],
    key: Array,
    stride: int = STRIDE,
) -> Float[Array, ""]:
    """Return the cross-entropy of f + lambda r, summed over the tokens that are not padding. `key` draws the queries and the rows."""
    places_key, own_row_key = jax.random.split(key)
    batch, length = segment_ids.shape
    places = query_places(places_key, length, stride)
    seen = visible(segment_ids, places, jax.random.bernoulli(own_row_key, OWN_ROW, (batch,)))
    scores = logits[:, places] + lambda_ * memory_residuals(logits, keys, targets, places, seen)
    chosen = jnp.take_along_axis(scores, targets[:, places][..., None], axis=-1)[..., 0]
    losses = (jax.nn.logsumexp(scores, axis=-1) - chosen) * (segment_ids[:, places] > 0)
    return jnp.sum(losses) * (length / len(places))
