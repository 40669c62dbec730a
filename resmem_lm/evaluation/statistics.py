"""Compute accuracy, TPR, FPR, gain, perplexity and calibration error of predictions, with 95% intervals over documents."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from resmem_lm.evaluation.block_scores import Predictions
from resmem_lm.evaluation.calibrated import calibration_error
from resmem_lm.workdir.storage import Record

BOOTSTRAP_SAMPLES = 2000

Certified = tuple[Int[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]  # predictions, and whether each is certified


class Found(NamedTuple):
    """A method's predictions for a split, their probabilities if its scores are probabilities, and its hyperparameters."""

    predictions: Certified
    probabilities: Predictions | None
    hyperparameters: dict[str, int | float]


def bootstrap_interval(values: Float[np.ndarray, " tokens"], groups: Int[np.ndarray, " tokens"]) -> tuple[float, float] | None:
    """Return the 95% interval of the mean of `values` by bootstrap over `groups`, or None for a single group."""
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
    """Return accuracy, TPR, FPR and gain as shares of all tokens (paper, Table 2). `found` has predictions and certified flags.

    TPR counts tokens that DeepNet gets wrong and the method right, FPR the reverse; gain = TPR - FPR.
    """
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


def probability_metrics(found: Predictions, targets: Int[np.ndarray, " tokens"]) -> Record:
    """Return perplexity and expected calibration error of a method whose scores are probabilities."""
    least = np.finfo(np.float32).tiny  # in place of probabilities that underflow to 0
    return {
        "perplexity": float(np.exp(-np.mean(np.log(np.maximum(found.target_probability, least), dtype=np.float64)))),
        "calibration_error": calibration_error(found.confidence, found.predictions == targets),
    }
