"""Accuracy, TPR, FPR, gain, perplexity and calibration error of predictions, with 95% intervals over documents."""

import numpy as np
from jaxtyping import Bool, Float, Int

from resmem_lm.evaluation.calibrated import calibration_error
from resmem_lm.evaluation.scorer import Predictions
from resmem_lm.workdir.storage import Record

BOOTSTRAP_SAMPLES = 2000


def bootstrap_interval(values: Float[np.ndarray, " tokens"], groups: Int[np.ndarray, " tokens"]) -> tuple[float, float] | None:
    """95% interval of the mean of `values` over tokens, groups drawn with replacement (tokens of one are not independent).

    Args:
        values: of each token.
        groups: the number of its document, or of the work that has several (`Queries.groups`): 0, 1, ...

    Returns:
        Its ends; None for a single group, which says nothing of others.
    """
    sums, tokens = np.bincount(groups, weights=values), np.bincount(groups)
    if len(sums) < 2:
        return None
    draws = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=BOOTSTRAP_SAMPLES)
    means = (draws @ sums) / (draws @ tokens)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def accuracy_metrics(
    found: tuple[Int[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]],
    deepnet: Int[np.ndarray, " tokens"],
    targets: Int[np.ndarray, " tokens"],
    groups: Int[np.ndarray, " tokens"],
) -> Record:
    """Accuracy, TPR (DeepNet wrong, this right), FPR (the reverse) and gain = TPR - FPR, as shares of all tokens (paper, Table 2)."""
    predictions, sure = found
    right, deepnet_right = predictions == targets, deepnet == targets
    tpr, fpr = float(np.mean(right & ~deepnet_right)), float(np.mean(~right & deepnet_right))
    return {
        "accuracy": float(np.mean(right)),
        "accuracy_ci95": bootstrap_interval(right.astype(np.float64), groups),
        "tpr": tpr,
        "fpr": fpr,
        "gain": tpr - fpr,
        "gain_ci95": bootstrap_interval(right.astype(np.float64) - deepnet_right, groups),
        "certified": float(np.mean(sure)),
    }


def probability_metrics(told: Predictions, targets: Int[np.ndarray, " tokens"]) -> Record:
    """Perplexity and expected calibration error of a method whose scores are probabilities."""
    least = np.finfo(np.float32).tiny  # a token may be less probable than float32 can say
    return {
        "perplexity": float(np.exp(-np.mean(np.log(np.maximum(told.target_probability, least), dtype=np.float64)))),
        "calibration_error": calibration_error(told.confidence, told.predictions == targets),
    }
