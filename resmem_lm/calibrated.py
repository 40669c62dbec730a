"""ResMem on the simplex, so that perplexity and calibration exist (the paper's section 6 leaves it open), and a lambda for each token.

    boosted:  q  is proportional to  softmax(f / T) * exp(lambda * r_kNN)
    clipped:  q  is proportional to  max(softmax(f / T) + lambda * r_kNN, floor * softmax(f / T))

`boosted` is a step of gradient boosting in logit space (Friedman 2001): the residual onehot(y) - p is the negative gradient of the
cross-entropy with respect to the logits. `clipped` is the paper's score brought back to the simplex. In both, r_kNN counts at the
candidates only (see `resmem_lm.candidates`): other tokens keep DeepNet's probability up to the normaliser, so q is a distribution over the
whole vocabulary.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

FLOOR = 0.1  # of DeepNet's probability, below which no token is clipped


def is_first(ids: Int[Array, "queries candidates"]) -> Bool[Array, "queries candidates"]:
    """Which candidates are not there before: a token may stand twice, and counts once."""
    same = ids[:, :, None] == ids[:, None, :]
    return ~jnp.any(jnp.tril(same, k=-1), axis=-1)


def boosted(
    base: Float[Array, "queries candidates"],
    residual: Float[Array, "queries candidates"],
    first: Bool[Array, "queries candidates"],
    lambda_: Float[Array, "#queries"],
) -> Float[Array, "queries candidates"]:
    """q at the candidates, in logit space."""
    return _normalised(base, base * jnp.exp(lambda_[:, None] * residual), first)


def clipped(
    base: Float[Array, "queries candidates"],
    residual: Float[Array, "queries candidates"],
    first: Bool[Array, "queries candidates"],
    lambda_: Float[Array, "#queries"],
) -> Float[Array, "queries candidates"]:
    """q at the candidates, from the paper's score."""
    return _normalised(base, jnp.maximum(base + lambda_[:, None] * residual, FLOOR * base), first)


def _normalised(
    base: Float[Array, "queries candidates"], score: Float[Array, "queries candidates"], first: Bool[Array, "queries candidates"]
) -> Float[Array, "queries candidates"]:
    rest = jnp.maximum(0.0, 1 - jnp.sum(jnp.where(first, base, 0), axis=-1, keepdims=True))
    return score / (rest + jnp.sum(jnp.where(first, score, 0), axis=-1, keepdims=True))


def calibration_error(confidence: Float[Array, " tokens"], right: Bool[Array, " tokens"], bins: int = 15) -> Float[Array, ""]:
    """Expected calibration error (Guo et al. 2017): mean |accuracy - confidence| over bins of equal width, weighted by their tokens."""
    place = jnp.minimum((confidence * bins).astype(jnp.int32), bins - 1)
    gap = jnp.zeros(bins).at[place].add(right - confidence)
    return jnp.sum(jnp.abs(gap)) / len(confidence)
