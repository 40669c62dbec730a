"""Compare a linear model, nearest neighbors and ResMem on datasets that come with scikit-learn, with nested cross-validation.

    python -m benchmarks.datasets

Every example is a test example once: in an outer fold, whose inner folds choose the parameters of every method by the same score. ResMem
has the linear model's parameter, fitted once for each fold, and its own. The intervals are by bootstrap over test examples.
"""

import tempfile
import warnings
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine, make_friedman1
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.measure import table
from resmem_lm.estimators import ResMemClassifier, ResMemRegressor
from resmem_lm.evaluation.statistics import bootstrap_interval

PENALTIES = (0.01, 0.1, 1.0, 10.0)
NEIGHBORS = {"n_neighbors": [1, 3, 10, 30], "weights": ["uniform", "distance"]}
MEMORY = {"k": [3, 10, 30], "sigma": [0.5, 2.0], "lambda_": [0.25, 0.5, 1.0]}
CLASSES = {"digits": load_digits, "wine": load_wine, "breast cancer": load_breast_cancer}
TARGETS = {"diabetes": load_diabetes, "friedman": lambda **_: make_friedman1(2000, noise=1.0, random_state=0)}


def searches(classes: bool, cache: str) -> dict[str, GridSearchCV]:
    """Return each method with the parameters to try. All see standardized features."""
    linear, penalty, neighbors, resmem = (
        (LogisticRegression(max_iter=5000), "C", KNeighborsClassifier(), ResMemClassifier)
        if classes
        else (Ridge(), "alpha", KNeighborsRegressor(), ResMemRegressor)
    )
    base = make_pipeline(StandardScaler(), linear)
    step, nearest = type(linear).__name__.lower(), make_pipeline(StandardScaler(), neighbors)
    grids: dict[str, tuple[Any, dict[str, Any]]] = {
        "linear": (base, {f"{step}__{penalty}": PENALTIES}),
        "nearest neighbors": (nearest, {f"{type(neighbors).__name__.lower()}__{name}": values for name, values in NEIGHBORS.items()}),
        "ResMem": (resmem(base, memory=cache), {f"estimator__{step}__{penalty}": PENALTIES, **MEMORY}),
    }
    folds = (StratifiedKFold if classes else KFold)(4, shuffle=True, random_state=1)
    return {name: GridSearchCV(model, grid, cv=folds) for name, (model, grid) in grids.items()}


def per_example(classes: bool, y: np.ndarray, predictions: np.ndarray) -> Float[np.ndarray, " examples"]:
    """Return what is averaged: whether a class is right, or the part of the variance that a prediction explains."""
    if classes:
        return (predictions == y).astype(np.float64)
    return 1 - np.square(predictions - y) / np.var(y)


def main() -> None:
    """Print the table."""
    rows = []
    for name, load in (CLASSES | TARGETS).items():
        classes, (x, y) = name in CLASSES, load(return_X_y=True)
        folds = (StratifiedKFold if classes else KFold)(5, shuffle=True, random_state=0)
        with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fold with few examples of a class
            found = {
                method: per_example(classes, y, cross_val_predict(search, x, y, cv=folds))
                for method, search in searches(classes, cache).items()
            }
        numbers, groups = [f"{100 * np.mean(found[method]):.2f}" for method in found], np.arange(len(y))
        for other in ("linear", "nearest neighbors"):
            difference = found["ResMem"] - found[other]
            low, high = bootstrap_interval(difference, groups)
            numbers.append(f"{100 * np.mean(difference):+.2f} [{100 * low:.2f}, {100 * high:.2f}]")
        rows.append([name, len(y), "accuracy, %" if classes else "R2, %", *numbers])
        print(rows[-1], flush=True)
    columns = ("data", "examples", "score", *found, "ResMem over linear", "ResMem over nearest neighbors")
    table("ResMem on tables of numbers", columns, rows)


if __name__ == "__main__":
    main()
