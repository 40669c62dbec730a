"""Turn ResMem's scores into probabilities, which define perplexity and calibration. The paper leaves this open (section 6).

    boosted:  q is proportional to  p exp(lambda r_kNN)
    clipped:  q is proportional to  max(p + lambda r_kNN, FLOOR p)                 with p = softmax(f / T)

`boosted` is a step of gradient boosting in logit space (Friedman 2001): the residual onehot(y) - p is the negative gradient of the
cross-entropy with respect to the logits. `clipped` is the paper's score with a floor. Both use r_kNN at the candidates only (see
`resmem_lm.evaluation.candidates`); all other tokens keep DeepNet's probability. Division by the sum over the vocabulary gives q.

    confident:  q = w p_kNN + (1 - w) p        with w = 1 / (1 + exp((d_1 / d_k - MIDDLE) / WIDTH))

`confident` is kNN-LM with a weight for each token that needs no validation text: NEST's relative retrieval confidence (Li et al. 2024),
from the L2 distances of the nearest and the k-th neighbor. The nearer the nearest is to the query, compared with the k-th, the larger w.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

SimplexFormula = Literal["knnlm", "boosted", "clipped"]
FLOOR = 0.1  # lowest score of a token, as a share of DeepNet's probability
MIDDLE, WIDTH = 0.5, 0.2  # of the ratio of distances, which is from 0 to 1
BINS = 15  # for the calibration error, as in Guo et al. (2017)


class Distribution(NamedTuple):
    """Probabilities of the candidates. Every other token has DeepNet's probability times `other`."""

    candidates: Float[Array, "*some queries candidates"]
    other: Float[Array, "*some queries"]


def is_first(ids: Int[Array, "queries candidates"]) -> Bool[Array, "queries candidates"]:
    """Mark the first candidate with each token, so that a token that occurs twice counts once."""
    return ~jnp.any(jnp.tril(ids[:, :, None] == ids[:, None, :], k=-1), axis=-1)


def normalized(
    base: Float[Array, "queries candidates"], changed: Float[Array, "*some queries candidates"], counted: Bool[Array, "queries candidates"]
) -> Distribution:
    """Replace the probabilities `base` by `changed` and normalize over the vocabulary. `counted` marks each token once."""
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
    """Return the distribution of kNN-LM (Khandelwal et al. 2020) or of Calibrated ResMem. Lambda = 0 gives DeepNet."""
    if formula == "knnlm":
        return Distribution((1 - lambda_) * base + lambda_ * knn, jnp.broadcast_to(1 - lambda_, knn.shape[:-1]))
    if formula == "boosted":
        return normalized(base, base * jnp.exp(lambda_ * residual), first)
    return normalized(base, jnp.maximum(base + lambda_ * residual, FLOOR * base), first)


def confident(
    base: Float[Array, "queries candidates"], knn: Float[Array, "queries candidates"], distances: Float[Array, "queries k"]
) -> Distribution:
    """Return the distribution of kNN-LM with NEST's relative retrieval confidence (Li et al. 2024, section 3.1)."""
    found = jnp.isfinite(distances)
    farthest = jnp.max(jnp.where(found, distances, 0), axis=1)
    weight = jax.nn.sigmoid((MIDDLE - distances[:, 0] / jnp.maximum(farthest, 1e-6)) / WIDTH)
    return Distribution((1 - weight)[:, None] * base + weight[:, None] * knn, 1 - weight)


def target_probability(
    q: Distribution, is_target: Bool[Array, "queries candidates"], base: Float[Array, " queries"]
) -> Float[Array, "*some queries"]:
    """Return the probability of each query's target. DeepNet's probability `base` counts if no candidate is the target."""
    among = jnp.max(jnp.where(is_target, q.candidates, 0), axis=-1)
    return jnp.where(jnp.any(is_target, axis=-1), among, q.other * base)


def calibration_error(confidence: Float[np.ndarray, " tokens"], right: Bool[np.ndarray, " tokens"]) -> float:
    """Return the expected calibration error (Guo et al. 2017): |accuracy - mean confidence| in bins of equal width, weighted by tokens."""
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(place, right - confidence, minlength=BINS)).sum() / len(confidence))
