from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.datasets import load_digits, make_classification, make_regression
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from resmem_lm.estimators import ResMemClassifier, ResMemRegressor


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    return x[:600] / 16, y[:600], x[600:700] / 16, y[600:700]


def by_hand(model, x, y, queries, classes):
    """The scores by the formulas of the paper, in float64."""
    tempered = [np.log(model.estimator_.predict_proba(some)) / model.temperature for some in (x, queries)]
    known, base = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) for logits in tempered)
    distances = np.linalg.norm(x.astype(np.float32)[None].astype(np.float64) - queries.astype(np.float32)[:, None], axis=-1)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, : model.k]
    weights = np.exp(-np.take_along_axis(distances, nearest, axis=1) / model.sigma)
    weights /= weights.sum(axis=1, keepdims=True)
    return base + model.lambda_ * np.einsum("qk,qkc->qc", weights, (np.eye(classes)[y] - known)[nearest])


@pytest.mark.parametrize("parameters", [{}, {"k": 3, "sigma": 0.3, "temperature": 1.4, "lambda_": 0.7}, {"k": 1, "lambda_": 0.0}])
def test_scores_are_the_formula_of_the_paper(digits, parameters):
    x, y, queries, _ = digits
    model = ResMemClassifier(LogisticRegression(C=0.01), **parameters).fit(x, y)
    scores = model.scores(queries)
    np.testing.assert_allclose(scores, by_hand(model, x, y, queries, 10), atol=1e-6)
    np.testing.assert_array_equal(model.predict(queries), scores.argmax(axis=1))
    np.testing.assert_allclose(model.predict_proba(queries).sum(axis=1), 1)
    # Half of the entries of each residual, those of largest magnitude.
    few = ResMemClassifier(LogisticRegression(C=0.01), entries=5, **parameters).fit(x, y)
    assert few.examples_.residuals.values.shape == (600, 5)
    assert np.abs(few.scores(queries) - scores).max() < 0.2 * model.lambda_ + 1e-12


def test_resmem_is_more_accurate_than_a_weak_base_and_fits_the_training_data(digits):
    x, y, queries, targets = digits
    model = ResMemClassifier(LogisticRegression(C=0.003), k=5, sigma=0.2).fit(x, y)
    assert model.score(queries, targets) > model.estimator_.score(queries, targets) + 0.05
    assert ResMemClassifier(LogisticRegression(C=0.003), k=1).fit(x, y).score(x, y) == 1  # Remark 3.2


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 40), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2**31))
def test_one_neighbor_fits_every_training_target(examples, dimensions, outputs, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(examples, dimensions)), rng.normal(size=(examples, outputs)).squeeze(axis=1 if outputs == 1 else ())
    np.testing.assert_allclose(ResMemRegressor(k=1).fit(x, y).predict(x), y, atol=1e-5)


def test_regression_improves_a_linear_model_of_a_curve():
    x = np.linspace(-3, 3, 200)[:, None]
    y = np.sin(2 * x[:, 0])
    model = ResMemRegressor(k=4, sigma=0.05).fit(x[::2], y[::2])
    assert model.score(x[1::2], y[1::2]) > 0.99 > model.estimator_.score(x[1::2], y[1::2])


def test_remembered_examples_equal_a_fit_and_deleted_ones_leave_no_trace(digits):
    x, y, queries, _ = digits
    base = FrozenEstimator(LogisticRegression(C=0.01).fit(x, y))
    half, whole = ResMemClassifier(base).fit(x[:300], y[:300]), ResMemClassifier(base).fit(x, y)
    before = half.scores(queries)
    np.testing.assert_array_equal(half.remember(x[300:], y[300:]).scores(queries), whole.scores(queries))
    np.testing.assert_array_equal(half.delete(np.arange(300, 600)).scores(queries), before)
    with pytest.raises(ValueError, match="have numbers from 0 to 299"):
        half.delete([300])
    with pytest.raises(ValueError, match="fewer than k = 10"):
        half.delete(range(295))
    with pytest.raises(ValueError, match=r"does not know the classes \[77\]"):
        half.remember(x[:1], [77])


def test_the_embedding_is_the_last_transform_a_step_or_a_function(digits):
    x, y, queries, _ = digits
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.01))
    default = ResMemClassifier(pipeline).fit(x, y)
    keys = pipeline.fit(x, y)[:-1].transform(x).astype(np.float32)
    np.testing.assert_array_equal(default.examples_.keys, keys)
    for embedding in ("standardscaler", lambda fitted, some: fitted[:-1].transform(some)):
        same = ResMemClassifier(pipeline, embedding=embedding).fit(x, y)
        np.testing.assert_array_equal(same.scores(queries), default.scores(queries))
    frozen = ResMemClassifier(FrozenEstimator(pipeline)).fit(x, y)
    np.testing.assert_array_equal(frozen.scores(queries), default.scores(queries))


def test_a_grid_search_fits_one_base_model_for_each_fold(digits, tmp_path):
    x, y, *_ = digits
    grid = {"k": [1, 5, 10], "sigma": [0.2, 1.0], "temperature": [0.7, 1.4], "lambda_": [0.0, 0.5, 1.0]}
    counting = Counting(str(tmp_path / "fits"))
    search = GridSearchCV(ResMemClassifier(counting, memory=str(tmp_path / "cache")), grid, cv=2, refit=False).fit(x, y)
    assert len((tmp_path / "fits").read_text()) == 2
    assert len(set(search.cv_results_["mean_test_score"])) > 5


class Counting(ClassifierMixin, BaseEstimator):
    """A classifier that appends a character to a file for each fit."""

    def __init__(self, file):
        self.file = file

    def fit(self, X, y):
        with Path(self.file).open("a") as file:
            file.write("x")
        self.model_ = LogisticRegression(C=0.01).fit(X, y)
        self.classes_ = self.model_.classes_
        return self

    def predict_proba(self, X):
        return self.model_.predict_proba(X)


def test_sparse_features_equal_dense_ones(digits):
    x, y, queries, _ = digits
    dense, scattered = ResMemClassifier().fit(x, y), ResMemClassifier().fit(sparse.csr_array(x), y)
    np.testing.assert_allclose(scattered.scores(sparse.csr_array(queries)), dense.scores(queries), atol=1e-4)


@pytest.mark.parametrize("index", ["exact", "faiss"])
def test_neighbors_are_the_nearest(index):
    x, y = make_regression(25_000, 8, noise=1.0, random_state=0)
    x[20_001] = x[0]  # equal keys
    model = ResMemRegressor(k=10, index=index).fit(x, y)
    distances, rows = model.kneighbors(x[:200], n_neighbors=5)
    np.testing.assert_allclose(distances, np.linalg.norm(x[rows] - x[:200, None], axis=-1), atol=1e-5)
    assert (np.diff(distances, axis=1) >= 0).all()
    assert rows[0, :2].tolist() == [0, 20_001]
    exact = np.argsort(np.linalg.norm(x[None] - x[:100, None], axis=-1), axis=1, kind="stable")[:, :5]
    shared = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(rows, exact, strict=False)])
    assert shared == 1 if index == "exact" else shared > 0.9
    more = model.remember(x[:500] + 0.01, y[:500]).kneighbors(x[:50] + 0.01, n_neighbors=1, return_distance=False)
    assert more[:, 0].tolist() == list(range(25_000, 25_050))
    assert len(model.delete(rows[:, 0]).examples_.keys) == 25_300


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"k": 0}, "k == 0, must be >= 1"),
        ({"k": 2.5}, "k must be an instance of"),
        ({"k": 101}, "k = 101 is above the number of examples, 100"),
        ({"sigma": 0}, "sigma == 0, must be > 0"),
        ({"sigma": np.nan}, "sigma is NaN: take a number"),
        ({"temperature": -1.0}, "temperature == -1.0, must be > 0"),
        ({"lambda_": -0.5}, "lambda_ == -0.5, must be >= 0"),
        ({"entries": 0}, "entries == 0, must be >= 1"),
        ({"index": "tree"}, r"index = 'tree': take one of \('exact', 'faiss'\)"),
        ({"embedding": "scaler"}, "embedding = 'scaler' names a step, and the estimator is no pipeline"),
        ({"estimator": make_pipeline(StandardScaler(), LogisticRegression()), "embedding": "pca"}, "embedding = 'pca': the steps"),
        ({"estimator": LinearSVC()}, "has no predict_proba: take a classifier with it"),
        ({"embedding": lambda _, some: np.full((len(some), 2), np.nan)}, "Input embedding contains NaN"),
    ],
)
def test_wrong_parameters_are_one_line(parameters, message):
    x, y = make_classification(100, random_state=0)
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        ResMemClassifier(**parameters).fit(x, y)
    assert str(caught.value).count("\n") == 0 or "NaN" in message  # scikit-learn's message on NaN has more lines


def test_more_neighbors_than_examples_are_refused():
    x, y = make_regression(30, 3, random_state=0)
    model = ResMemRegressor(LinearRegression(), k=5).fit(x, y)
    with pytest.raises(ValueError, match="n_neighbors = 31: take 1 to 30"):
        model.kneighbors(x, n_neighbors=31)
