"""Compare the estimators with scikit-learn's nearest neighbors on a million examples, in time and in memory of what is fitted.

python -m benchmarks.estimators [--examples=1000000]
"""

import argparse
from typing import Any

import numpy as np
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import SGDClassifier
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.measure import interleaved, median, ratio, table
from resmem_lm.estimators import ResMemClassifier

DIMENSIONS, CLASSES, QUERIES, K = 64, 10, 200, 10


def data(examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return examples around 1,000 centers, whose class is that of the center, in float32."""
    rng = np.random.default_rng(0)
    centers, of = rng.normal(size=(1000, DIMENSIONS)), rng.integers(0, 1000, examples)
    return (centers[of] + rng.normal(size=(examples, DIMENSIONS))).astype(np.float32), of % CLASSES


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1_000_000)
    count = parser.parse_args().examples
    x, y = data(count + QUERIES)
    train, queries, targets = (x[:count], y[:count]), x[count:], y[count:]
    base = FrozenEstimator(SGDClassifier(loss="log_loss", max_iter=2, tol=None, random_state=0).fit(*train))
    models: dict[str, Any] = {
        "ResMem, exact": ResMemClassifier(base, k=K),
        "ResMem, faiss": ResMemClassifier(base, k=K, index="faiss"),
        "scikit-learn, brute": KNeighborsClassifier(K, algorithm="brute", n_jobs=-1),
        "scikit-learn, kd_tree": KNeighborsClassifier(K, algorithm="kd_tree", n_jobs=-1),
    }
    fits = interleaved({name: lambda model=model: model.fit(*train) for name, model in models.items()}, rounds=1)
    predictions = interleaved({name: lambda model=model: model.predict(queries) for name, model in models.items()}, rounds=3)
    reference = "scikit-learn, brute"
    rows = [
        [
            name,
            f"{median(fits, name):.2f}",
            f"{1000 * median(predictions, name) / QUERIES:.2f}",
            ratio(predictions, reference, name),
            f"{100 * np.mean(model.predict(queries) == targets):.1f}",
        ]
        for name, model in models.items()
    ]
    title = f"{count:,} examples, {DIMENSIONS} features, {CLASSES} classes, k = {K}, {QUERIES:,} queries"
    table(title, ("method", "fit, s", "prediction, ms a query", "times as fast as brute", "accuracy, %"), rows)


if __name__ == "__main__":
    main()
