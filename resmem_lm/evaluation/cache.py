"""Mix kNN-LM with a continuous cache of the document's earlier tokens (Grave et al. 2017): (1 - mu) p_kNN-LM + mu p_cache.

p_cache(y) is the total weight of the document's nearest rows with token y, as p_kNN(y) is for the datastore. Its bandwidth and mu are
chosen on validation, beside kNN-LM's hyperparameters.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from resmem_lm.evaluation.block_scores import Predictions, Temperature
from resmem_lm.evaluation.calibrated import Distribution, on_simplex, target_probability
from resmem_lm.evaluation.candidates import Block, Setting, best, score
from resmem_lm.evaluation.scorer import SplitScorer

SIGMAS = (0.25, 0.5, 1.0, 2.0, 4.0)
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # mu


class Cache(NamedTuple):
    """kNN-LM's hyperparameters, and those of the cache."""

    knnlm: Setting
    sigma: float
    weight: float

    def hyperparameters(self) -> dict[str, int | float]:
        """Return the hyperparameters under their names in results.json."""
        return self.knnlm.hyperparameters() | {"cache_sigma": self.sigma, "cache_weight": self.weight}


class _KnnLM(NamedTuple):
    """kNN-LM's hyperparameters as arrays."""

    k: Int[Array, "1"]
    sigma: Float[Array, "1"]
    lambda_: Float[Array, ""]
    temperature: Temperature

    @classmethod
    def of(cls, setting: Setting, scorer: SplitScorer) -> "_KnnLM":
        arrays = jnp.array([setting.k]), jnp.array([setting.sigma], jnp.float32), jnp.float32(setting.lambda_)
        return cls(*arrays, scorer.temperature(setting.temperature))


def _mixed(block: Block, knnlm: _KnnLM, sigma: Float[Array, ""], weight: Float[Array, ""]) -> Distribution:
    candidates, document = block.candidates, block.document
    scores = score(candidates, block.neighbors, knnlm.k, knnlm.sigma, *knnlm.temperature)
    q = on_simplex("knnlm", scores.base, scores.residual[0], scores.knn[0], jnp.ones(candidates.ids.shape, bool), knnlm.lambda_)
    rows = jnp.array([document.tokens.shape[1]])
    cached = score(candidates, document, rows, sigma[None], *knnlm.temperature).knn[0]
    mu = jnp.where(jnp.isfinite(document.distances[:, 0]), weight, 0)  # the first token of a document has no earlier one
    return Distribution((1 - mu)[:, None] * q.candidates + mu[:, None] * cached, (1 - mu) * q.other)


@jax.jit
def _count_correct(
    block: Block, knnlm: _KnnLM, sigmas: Float[Array, " sigmas"], weights: Float[Array, " weights"]
) -> Int[Array, "sigmas weights"]:
    def count(sigma: Float[Array, ""], weight: Float[Array, ""]) -> Int[Array, ""]:
        winners, _ = best(_mixed(block, knnlm, sigma, weight).candidates, block.candidates.ids)
        return jnp.sum(winners == block.targets)

    return jax.vmap(lambda sigma: jax.vmap(lambda weight: count(sigma, weight))(weights))(sigmas)


@jax.jit
def _predict(block: Block, knnlm: _KnnLM, sigma: Float[Array, ""], weight: Float[Array, ""]) -> Predictions:
    candidates = block.candidates
    q = _mixed(block, knnlm, sigma, weight)
    winners, top = best(q.candidates, candidates.ids)
    temperature, position = knnlm.temperature
    bound = jnp.exp(candidates.bound / temperature - candidates.log_partition[:, position])
    probability = target_probability(q, candidates.ids == block.targets[:, None], block.target_base[:, position])
    return Predictions(winners, top >= q.other * bound, top, probability)  # type: ignore[arg-type]


def fit_cache(validation: SplitScorer, setting: Setting) -> Cache:
    """Return the bandwidth and mu with the most right predictions on validation, for given hyperparameters of kNN-LM."""
    arrays = np.array(SIGMAS, np.float32), np.array(WEIGHTS, np.float32)
    knnlm, counts = _KnnLM.of(setting, validation), np.zeros((len(SIGMAS), len(WEIGHTS)), np.int64)
    for _, block in validation.blocks("tune the cache"):
        counts += _count_correct(block, knnlm, *arrays)
    sigma, weight = np.unravel_index(counts.argmax(), counts.shape)
    return Cache(setting, SIGMAS[sigma], WEIGHTS[weight])


def predict_with_cache(scorer: SplitScorer, cache: Cache) -> Predictions:
    """Return the predictions of kNN-LM with the cache."""
    knnlm, values = _KnnLM.of(cache.knnlm, scorer), (np.float32(cache.sigma), np.float32(cache.weight))
    return scorer.collect("score with the cache", lambda block: _predict(block, knnlm, *values))
