"""ResMem for any classifier with probabilities."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.utils import Tags, column_or_1d, get_tags, indexable
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from resmem_lm.estimators.base import ResMem
from resmem_lm.evaluation.calibrated import FLOOR
from resmem_lm.resmem import residual


class ResMemClassifier(ClassifierMixin, ResMem):
    """A classifier that adds the residuals of the nearest training examples to the probabilities of another (paper, section 3.2).

    With `lambda_` = 1 the scores are softmax(f(x) / T) + r_kNN, as in the paper. The logits f are the logarithms of the base
    classifier's probabilities.

    Args:
        estimator: a classifier with `predict_proba`, or `sklearn.frozen.FrozenEstimator` of a fitted one; None is `LogisticRegression()`.
        embedding: the key of an input. None takes the features, or the last transform of a pipeline; a string takes the transform up to
            this step of a pipeline; a function gets the fitted estimator and inputs, and returns an array with a row per input.
        k: number of neighbors.
        sigma: bandwidth, in units of L2 distance between keys.
        temperature: temperature of the base classifier's probabilities.
        lambda_: factor of the neighbors' residuals.
        index: "exact", or "faiss" for a search in a part of the examples, which is faster for many examples.
        entries: entries of a residual that are stored; residuals of fewer classes are stored whole.
        memory: where fitted base classifiers are cached, as in `sklearn.pipeline.Pipeline`: a folder or a `joblib.Memory`. A grid search
            over the other parameters then fits one base classifier for each fold.

    Attributes:
        estimator_: the fitted base classifier.
        classes_: the classes.
        examples_: the remembered examples.
    """

    def __init__(
        self,
        estimator: Any = None,
        *,
        embedding: Any = None,
        k: Any = 10,
        sigma: Any = 1.0,
        temperature: Any = 1.0,
        lambda_: Any = 1.0,
        index: Any = "exact",
        entries: Any = 128,
        memory: Any = None,
    ) -> None:
        super().__init__(estimator, embedding=embedding, k=k, sigma=sigma, lambda_=lambda_, index=index, entries=entries, memory=memory)
        self.temperature = temperature

    def fit(self, X: Any, y: Any) -> "ResMemClassifier":
        """Fit the base classifier, and remember all examples.

        Args:
            X: inputs that the base classifier takes.
            y: their classes.

        Raises:
            ValueError: a parameter out of its range, an estimator without `predict_proba`, NaN in a key, or k above the number of examples.
        """
        X, y = indexable(X, y)
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        if not hasattr(self._base(), "predict_proba"):
            raise ValueError(f"{self._base()} has no predict_proba: take a classifier with it, or wrap yours in CalibratedClassifierCV")
        self._fit(X, y)
        self.classes_ = self.estimator_.classes_
        self._remember_all(X, self._checked_targets(y))
        return self

    def scores(self, X: Any) -> Float[np.ndarray, "queries classes"]:
        """Return the score of each class: softmax(f(x) / T) + lambda r_kNN. They sum to 1 where residuals are stored whole."""
        base, merged = self._parts(X)
        return base + self.lambda_ * merged

    def predict(self, X: Any) -> np.ndarray:
        """Return the class with the largest score."""
        winners = np.argmax(self.scores(X), axis=1)
        return self.classes_[winners]

    def predict_proba(self, X: Any) -> Float[np.ndarray, "queries classes"]:
        """Return max(score, FLOOR softmax(f(x) / T)), normalized: the clipped form of Calibrated ResMem (`evaluation.calibrated`)."""
        base, merged = self._parts(X)
        clipped = np.maximum(base + self.lambda_ * merged, FLOOR * base)
        return clipped / clipped.sum(axis=1, keepdims=True)

    def _parts(self, X: Any) -> tuple[Float[np.ndarray, "queries classes"], Float[np.ndarray, "queries classes"]]:
        """Return softmax(f(x) / T) and r_kNN."""
        check_is_fitted(self)
        logits = self._logits(X) / self.temperature
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        base = powers / powers.sum(axis=1, keepdims=True)
        return base, self._merged(X, base)

    def _logits(self, X: Any) -> Float[np.ndarray, "queries classes"]:
        with np.errstate(divide="ignore"):  # log 0
            logits: np.ndarray = np.log(self.estimator_.predict_proba(X).astype(np.float64))
        return logits

    def _residuals(self, X: Any, y: Any) -> Float[np.ndarray, "examples classes"]:
        with jax.enable_x64(True):
            return np.asarray(residual(jnp.asarray(self._logits(X)), jnp.asarray(y), self.temperature))

    def _checked_targets(self, y: Any) -> np.ndarray:
        """Return the numbers of classes. Raise ValueError for a class that the base classifier does not know."""
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(f"the base classifier does not know the classes {unknown.tolist()[:5]}; it knows {self.classes_.tolist()[:9]}")
        return np.searchsorted(self.classes_, y)

    def _base(self) -> Any:
        return LogisticRegression() if self.estimator is None else self.estimator

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags = get_tags(self._base()).classifier_tags
        return tags
