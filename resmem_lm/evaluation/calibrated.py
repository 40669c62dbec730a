"""ResMem on the simplex, so that perplexity and calibration exist; the paper's section 6 leaves it open.

    boosted:  q is proportional to  p exp(lambda r_kNN)
    clipped:  q is proportional to  max(p + lambda r_kNN, FLOOR p)                 with p = softmax(f / T)

`boosted` is a step of gradient boosting in logit space (Friedman 2001): the residual onehot(y) - p is the negative gradient of the
cross-entropy with respect to the logits. `clipped` is the paper's score, projected. In both, r_kNN counts at the candidates only (see
`resmem_lm.candidates`), and all other tokens keep DeepNet's probability up to the normalizer: q is a distribution over the vocabulary.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

SimplexFormula = Literal["knnlm", "boosted", "clipped"]
FLOOR = 0.1  # of DeepNet's probability, which no token falls below
BINS = 15  # of the calibration error, as Guo et al. have


class Distribution(NamedTuple):
    """Probabilities of the candidates; any other token has `other` times what DeepNet gives it."""

    candidates: Float[Array, "*some queries candidates"]
    other: Float[Array, "*some queries"]


def is_first(ids: Int[Array, "queries candidates"]) -> Bool[Array, "queries candidates"]:
    """Which candidates do not stand before: a token may be there twice, and counts once."""
    return ~jnp.any(jnp.tril(ids[:, :, None] == ids[:, None, :], k=-1), axis=-1)


def normalized(
    base: Float[Array, "queries candidates"], changed: Float[Array, "*some queries candidates"], counted: Bool[Array, "queries candidates"]
) -> Distribution:
    """What some tokens' probabilities were changed to, with all others', over their sum; `counted` has each of these tokens once."""
    total = 1 + jnp.sum(jnp.where(counted, changed - base, 0), axis=-1)
    return Distribution(changed / total[..., None], 1 / total)


def on_simplex(
    formula: SimplexFormula,
    base: Float[Array, "queries candidates"],
    residual: Float[Array, "*some queries candidates"],
    knn: Float[Array, "*some queries candidates"],
    first: Bool[Array, "queries candidates"],
    lambda_: float | Float[Array, ""],
) -> Distribution:
    """kNN-LM (Khandelwal et al. 2020), or one of the two forms of Calibrated ResMem; DeepNet where lambda is 0."""
    if formula == "knnlm":
        return Distribution((1 - lambda_) * base + lambda_ * knn, jnp.broadcast_to(1 - lambda_, knn.shape[:-1]))
    if formula == "boosted":
        return normalized(base, base * jnp.exp(lambda_ * residual), first)
    return normalized(base, jnp.maximum(base + lambda_ * residual, FLOOR * base), first)


def of_target(
    q: Distribution, is_target: Bool[Array, "queries candidates"], base: Float[Array, " queries"]
) -> Float[Array, "*some queries"]:
    """The probability of each query's target, which may be none of the candidates; `base` is what DeepNet gives it."""
    among = jnp.max(jnp.where(is_target, q.candidates, 0), axis=-1)
    return jnp.where(jnp.any(is_target, axis=-1), among, q.other * base)


def calibration_error(confidence: Float[np.ndarray, " tokens"], right: Bool[np.ndarray, " tokens"]) -> float:
    """Expected calibration error (Guo et al. 2017): |accuracy - mean confidence| in bins of equal width, weighted by their tokens."""
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(place, right - confidence, minlength=BINS)).sum() / len(confidence))
