"""What ResMem does alike for classification and regression: fit the base model, embed, remember, search, merge.

r_i   = y_i - f(x_i)                    residual of training example i; for classes onehot(y_i) - softmax(f(x_i) / T)
r_kNN = sum_i w_i r_i                   over the k nearest examples, with w_i proportional to exp(-distance / sigma)
f(x) + lambda r_kNN                     is the prediction, or the scores of the classes       (paper, section 3.2)
"""

import abc
import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy import sparse
from sklearn.base import BaseEstimator, clone
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import Pipeline
from sklearn.utils import Tags, _safe_indexing, check_scalar, gen_batches, get_tags, indexable
from sklearn.utils.validation import _num_samples, check_array, check_is_fitted, check_memory

from resmem_lm.estimators.examples import KINDS, Examples, Residuals, join, store
from resmem_lm.resmem import merge_sparse, neighbor_weights

BLOCK = 1024  # queries that are merged at a time; a fixed number, so that JAX compiles once and results do not depend on it


class ResMem(BaseEstimator, abc.ABC):
    """The base class of the estimators, which document the parameters. As in scikit-learn, `fit` checks them, not the constructor."""

    def __init__(
        self,
        estimator: Any = None,
        *,
        embedding: Any = None,
        k: Any = 10,
        sigma: Any = 1.0,
        lambda_: Any = 1.0,
        index: Any = "exact",
        entries: Any = 128,
        memory: Any = None,
    ) -> None:
        self.estimator, self.embedding = estimator, embedding
        self.k, self.sigma, self.lambda_ = k, sigma, lambda_
        self.index, self.entries, self.memory = index, entries, memory

    @abc.abstractmethod
    def _base(self) -> Any:
        """Return the estimator to fit, or the default."""

    @abc.abstractmethod
    def _residuals(self, X: Any, y: Any) -> Float[np.ndarray, "examples outputs"]:
        """Return the residuals of examples under the fitted base model."""

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "examples_")

    def _fit(self, X: Any, y: Any) -> "ResMem":
        self._check_parameters()
        fitted = check_memory(self.memory).cache(_fit_base)(clone(self._base()), X, y)
        self.estimator_ = fitted
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(fitted, name):
                setattr(self, name, getattr(fitted, name))
        return self

    def _remember_all(self, X: Any, y: Any) -> None:
        keys, residuals = self._encode(X, y)
        if self.k > len(keys):
            raise ValueError(f"k = {self.k} is above the number of examples, {len(keys)} (n_samples = {len(keys)}): take a smaller k")
        self.examples_ = Examples(keys, residuals, self.index)

    def _encode(self, X: Any, y: Any) -> tuple[Float[np.ndarray, "examples dimensions"], Residuals]:
        """Return keys and residuals of examples. Blocks limit the memory of the base model's outputs."""
        batches = [(_safe_indexing(X, some), y[some]) for some in gen_batches(_num_samples(X), BLOCK)]
        keys = np.concatenate([self._keys(some) for some, _ in batches])
        return keys, join([store(self._residuals(*batch), self.entries) for batch in batches])

    def remember(self, X: Any, y: Any) -> "ResMem":
        """Add examples to the memory. The base model stays as it is.

        Raises:
            ValueError: examples that the base model cannot predict, or classes that it does not know.
        """
        check_is_fitted(self)
        X, y = indexable(X, y)
        self.examples_.remember(*self._encode(X, self._checked_targets(y)))
        return self

    def delete(self, examples: Int[np.ndarray, " some"] | Sequence[int]) -> "ResMem":
        """Delete examples from the memory by their numbers, which `kneighbors` returns. Later examples get smaller numbers.

        Raises:
            ValueError: a number that no example has, or fewer than k examples would be left.
        """
        check_is_fitted(self)
        chosen, count = np.unique(np.asarray(examples, np.int64)), len(self.examples_.keys)
        if len(chosen) and not 0 <= chosen[0] <= chosen[-1] < count:
            raise ValueError(f"the examples have numbers from 0 to {count - 1}, not {[chosen[0], chosen[-1]]}")
        if count - len(chosen) < self.k:
            raise ValueError(f"{count - len(chosen)} examples would be left, fewer than k = {self.k}: delete fewer")
        self.examples_.delete(chosen)
        return self

    def kneighbors(self, X: Any, n_neighbors: int | None = None, return_distance: bool = True) -> Any:
        """Return the L2 distances and the numbers of the nearest examples, nearest first, as scikit-learn's nearest neighbors do.

        Args:
            X: inputs.
            n_neighbors: how many; None is `k`.
            return_distance: whether to return distances too.

        Raises:
            ValueError: more neighbors than there are examples.
        """
        check_is_fitted(self)
        k, examples, (X,) = self.k if n_neighbors is None else n_neighbors, len(self.examples_.keys), indexable(X)
        if not 1 <= k <= examples:
            raise ValueError(f"n_neighbors = {k}: take 1 to {examples}, the number of examples")
        found = [self.examples_.nearest(self._keys(_safe_indexing(X, some)), k) for some in gen_batches(_num_samples(X), BLOCK)]
        rows, distances = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return (distances, rows) if return_distance else rows

    def _checked_targets(self, y: Any) -> Any:
        return np.asarray(y)

    def _keys(self, X: Any) -> Float[np.ndarray, "examples dimensions"]:
        """Embed inputs."""
        found = self._embed(X)
        keys: np.ndarray = check_array(found.toarray() if sparse.issparse(found) else found, dtype=np.float32, input_name="embedding")
        return np.ascontiguousarray(keys)

    def _embed(self, X: Any) -> Any:
        if callable(self.embedding):
            return self.embedding(self.estimator_, X)
        model = self.estimator_.estimator if isinstance(self.estimator_, FrozenEstimator) else self.estimator_
        if isinstance(model, Pipeline):
            names = list(model.named_steps)
            if self.embedding is not None and self.embedding not in names:
                raise ValueError(f"embedding = {self.embedding!r}: the steps of the pipeline are {names}")
            steps = model[:-1] if self.embedding is None else model[: names.index(self.embedding) + 1]
            return steps.transform(X) if len(steps) else X
        if self.embedding is not None:
            raise ValueError(f"embedding = {self.embedding!r} names a step, and the estimator is no pipeline: take a function or None")
        return X

    def _merged(self, X: Any, base: Float[np.ndarray, "queries outputs"]) -> Float[np.ndarray, "queries outputs"]:
        """Return r_kNN of inputs. `base` has the shape of the outputs."""
        found, (X,) = np.empty(base.shape, np.float64), indexable(X)
        for some in gen_batches(len(base), BLOCK):
            rows, distances = self.examples_.nearest(self._keys(_safe_indexing(X, some)), self.k)
            padding = [(0, BLOCK - len(rows)), (0, 0)]
            rows, distances = np.pad(rows, padding), np.pad(distances, padding)
            values, ids = self.examples_.residuals.map(lambda array, rows=rows: array[rows])
            with jax.enable_x64(True):  # scikit-learn computes in float64
                merged = _merge(distances, values, ids, self.sigma, outputs=base.shape[1])
            found[some] = np.asarray(merged)[: some.stop - some.start]
        return found

    def _check_parameters(self) -> None:
        """Raise ValueError or TypeError for a parameter out of its range."""
        for name in ("k", "entries"):
            check_scalar(getattr(self, name), name, numbers.Integral, min_val=1)
        for name in ("sigma", "temperature", "lambda_"):
            least = "left" if name == "lambda_" else "neither"  # whether 0 is allowed
            value = getattr(self, name, 1.0)
            check_scalar(value, name, numbers.Real, min_val=0, max_val=math.inf, include_boundaries=least)
            if math.isnan(value):
                raise ValueError(f"{name} is NaN: take a number")
        if self.index not in KINDS:
            raise ValueError(f"index = {self.index!r}: take one of {KINDS}")

    def __sklearn_tags__(self) -> Tags:
        tags, base = super().__sklearn_tags__(), get_tags(self._base())
        tags.input_tags.sparse = base.input_tags.sparse
        tags.input_tags.allow_nan = base.input_tags.allow_nan and self.embedding is not None
        return tags


def _fit_base(estimator: Any, X: Any, y: Any) -> Any:
    return estimator.fit(X, y)


@functools.partial(jax.jit, static_argnames="outputs")
def _merge(
    distances: Float[Array, "queries k"],
    values: Float[Array, "queries k entries"],
    ids: Int[Array, "queries k entries"] | None,
    sigma: float | Float[Array, ""],
    *,
    outputs: int,
) -> Float[Array, "queries outputs"]:
    """Return r_kNN; a missing entry of a residual is 0."""
    weights = neighbor_weights(distances, sigma)
    if ids is None:
        return jnp.einsum("qk,qko->qo", weights, values)
    return merge_sparse(jnp.zeros((len(distances), outputs)), weights, ids, values)
