"""ResMem for any regressor."""

from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.base import RegressorMixin
from sklearn.linear_model import LinearRegression
from sklearn.utils import Tags, column_or_1d, get_tags, indexable
from sklearn.utils.validation import check_array, check_is_fitted

from resmem_lm.estimators.base import ResMem


class ResMemRegressor(RegressorMixin, ResMem):
    """A regressor that adds the residuals of the nearest training examples to the predictions of another (paper, Remark 3.1).

    With k = 1 and `lambda_` = 1 it is the estimator of the paper's section 5, and it fits the training data exactly.

    Args:
        estimator: a regressor, or `sklearn.frozen.FrozenEstimator` of a fitted one; None is `LinearRegression()`.
        embedding: the key of an input. None takes the features, or the last transform of a pipeline; a string takes the transform up to
            this step of a pipeline; a function gets the fitted estimator and inputs, and returns an array with a row per input.
        k: number of neighbors.
        sigma: bandwidth, in units of L2 distance between keys.
        lambda_: factor of the neighbors' residuals.
        index: "exact", or "faiss" for a search in a part of the examples, which is faster for many examples.
        entries: entries of a residual that are stored; residuals with fewer outputs are stored whole.
        memory: where fitted base regressors are cached, as in `sklearn.pipeline.Pipeline`: a folder or a `joblib.Memory`. A grid search
            over the other parameters then fits one base regressor for each fold.

    Attributes:
        estimator_: the fitted base regressor.
        examples_: the remembered examples.
    """

    def fit(self, X: Any, y: Any) -> "ResMemRegressor":
        """Fit the base regressor, and remember all examples.

        Args:
            X: inputs that the base regressor takes.
            y: their targets, with a column for each output if there are several.

        Raises:
            ValueError: a parameter out of its range, NaN in a key or a target, or k above the number of examples.
        """
        if y is None:
            raise ValueError("ResMemRegressor requires y to be passed, but the target y is None")
        X, y = indexable(X, y)
        y = self._checked_targets(y)
        self._fit(X, y)
        self._remember_all(X, y)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return f(x) + lambda r_kNN."""
        check_is_fitted(self)
        base = np.asarray(self.estimator_.predict(X), np.float64)
        return base + self.lambda_ * self._merged(X, _columns(base)).reshape(base.shape)

    def _residuals(self, X: Any, y: Any) -> Float[np.ndarray, "examples outputs"]:
        return _columns(y - self.estimator_.predict(X).reshape(y.shape))

    def _checked_targets(self, y: Any) -> np.ndarray:
        if get_tags(self._base()).target_tags.multi_output:
            found: np.ndarray = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
            return found
        return check_array(column_or_1d(y, warn=True), ensure_2d=False, dtype=np.float64, input_name="y")

    def _base(self) -> Any:
        return LinearRegression() if self.estimator is None else self.estimator

    def __sklearn_tags__(self) -> Tags:
        tags, base = super().__sklearn_tags__(), get_tags(self._base())
        tags.target_tags.multi_output = base.target_tags.multi_output
        return tags


def _columns(y: Float[np.ndarray, "..."]) -> Float[np.ndarray, "examples outputs"]:
    return y.reshape(len(y), -1)
