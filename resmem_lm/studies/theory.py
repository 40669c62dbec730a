"""The paper's section 5: linear regression with a bounded model, whose error does not vanish, and a memory of its residuals, whose does.

x uniform in the unit ball of R^d,  y = <theta*, x>, |theta*| = 1
DeepNet:            <theta_n, x>, theta_n = argmin over |theta| <= L < 1 of the squared error on n points
nearest neighbor:  y of the nearest training point x'
ResMem:             <theta_n, x> + residual of that point                                       (equation 2, k = 1)

Theorem 5.3 of the paper bounds ResMem's risk. Its formula could not be verified here, so nothing is compared with it; these rates can be
derived (`predicted`):

DeepNet.  theta_n -> L theta*, so the risk -> (1 - L)^2 E<theta*, x>^2 = (1 - L)^2 / (d + 2).
Nearest neighbor.  It errs by <theta*, x' - x>. The joint law of x and x' does not change under rotation, so its risk is E|x' - x|^2 / d.
    A ball of radius r around an x in the interior has a share r^d of the unit ball, so |x' - x| > r with probability (1 - r^d)^n, and
    E|x' - x|^2 is Gamma(1 + 2/d) n^(-2/d) for large n.
ResMem.  It errs by <theta* - theta_n, x' - x>, its residuals being a linear function of x: with theta_n = L theta*, (1 - L)^2 times the
    nearest neighbor's risk. For small n theta_n is not there yet, and theta* - theta_n is longer.

Within about n^(-1/d) of the surface a part of that ball lies outside, the neighbor is probe_radius, and the risk is larger. These points are a
share of about d n^(-1/d), which falls slowly: for small n, and in 8 dimensions for every n tried here, the last two risks lie above the
prediction and fall faster than n^(-2/d). Standard errors of slopes tell the scatter of repetitions, not this.
"""

import itertools
import math
from typing import Any

import numpy as np
from jaxtyping import Float

from resmem_lm.errors import UserError, check_least
from resmem_lm.report.plots import INK, Figure, line
from resmem_lm.studies.study import study, write_study
from resmem_lm.workdir.progress import progress
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record

PREDICTORS = ("DeepNet", "nearest neighbor", "ResMem")


def in_unit_ball(rng: np.random.Generator, points: int, d: int) -> Float[np.ndarray, "points d"]:
    """Points uniform in the unit ball."""
    x = rng.normal(size=(points, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True) * rng.random((points, 1)) ** (1 / d)


def bounded_least_squares(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, " n"], bound: float) -> Float[np.ndarray, " d"]:
    """argmin |x theta - y|^2 over |theta| <= bound: ridge regression, with the penalty that reaches the bound (by bisection)."""
    values, vectors = np.linalg.eigh(x.T @ x)
    target = vectors.T @ (x.T @ y)

    def norm(penalty: float) -> float:
        return float(np.linalg.norm(target / (np.maximum(values, 1e-12) + penalty)))

    if norm(0.0) <= bound:
        return vectors @ (target / np.maximum(values, 1e-12))
    low, high = 0.0, float(np.linalg.norm(target)) / bound
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if norm(middle) > bound else (low, middle)
    return vectors @ (target / (np.maximum(values, 1e-12) + high))


def nearest_points(x: Float[np.ndarray, "n d"], queries: Float[np.ndarray, "q d"]) -> Any:
    """Number of the nearest point of each query."""
    squares = np.sum(np.square(x), axis=1)
    blocks = np.array_split(queries, max(1, len(queries) * len(x) // 10**7))  # so that a block's distances fit in memory
    return np.concatenate([np.argmin(squares - 2 * some @ x.T, axis=1) for some in blocks])


def risks(rng: np.random.Generator, n: int, d: int, bound: float, queries: int) -> list[float]:
    """Mean squared error of each method, on fresh points."""
    theta = rng.normal(size=d)
    theta /= np.linalg.norm(theta)
    x, test = in_unit_ball(rng, n, d), in_unit_ball(rng, queries, d)
    y, wanted = x @ theta, test @ theta
    fitted = bounded_least_squares(x, y, bound)
    near = nearest_points(x, test)
    predictions = (test @ fitted, y[near], test @ fitted + (y - x @ fitted)[near])
    return [float(np.mean(np.square(prediction - wanted))) for prediction in predictions]


def slope(n: list[int], risk: list[list[float]]) -> tuple[float, float]:
    """Slope of log risk against log n over all repetitions, and its standard error."""
    x = np.log(np.repeat(n, [len(some) for some in risk]))
    y = np.log(np.maximum(np.concatenate(risk), 1e-300))
    centered = x - x.mean()
    fitted = float(centered @ y / (centered @ centered))
    errors = y - y.mean() - fitted * centered
    return fitted, float(np.sqrt(errors @ errors / (len(x) - 2) / (centered @ centered)))


def predicted(method: str, n: int, d: int, bound: float) -> float:
    """A method's risk for large n, as derived above."""
    if method == "DeepNet":
        return (1 - bound) ** 2 / (d + 2)
    alone = math.gamma(1 + 2 / d) * n ** (-2 / d) / d
    return alone if method == "nearest neighbor" else (1 - bound) ** 2 * alone


@study(name="theory", after=())
def study_theory(
    run: Run,
    *,
    sizes: tuple[int, ...] | list[int] = (100, 300, 1000, 3000, 10_000, 30_000),
    dimensions: tuple[int, ...] | list[int] = (2, 4, 8),
    bounds: tuple[float, ...] | list[float] = (0.3, 0.6, 0.9),
    repetitions: int = 8,
    queries: int = 2000,
    seed: int = 0,
) -> Record:
    """Test risk against n of DeepNet, of the nearest neighbor alone and of ResMem, beside what can be derived (paper: section 5).

    Args:
        sizes: numbers n of training points.
        dimensions: numbers d of features.
        bounds: norms L of the model, below 1, which is that of the truth.
        repetitions: of each, with another truth and other points.
        queries: test points of each repetition.
        seed: of everything.

    Raises:
        UserError: a number out of its range, or too few sizes for a slope.
    """
    check_least("study_theory", 1, sizes=sizes, dimensions=dimensions, repetitions=repetitions, queries=queries)
    check_least("study_theory", 1e-6, bounds=bounds)
    if max(bounds) >= 1:
        raise UserError(f"study_theory.bounds = {bounds}: take numbers below 1, the norm of the truth, or the model has no risk left")
    sizes = sorted(sizes)
    if len(set(sizes)) < 2 or len(set(sizes)) * repetitions < 3:
        raise UserError(f"study_theory.sizes = {sizes}: take two or more, and more than two points with repetitions, for a slope")
    rng = np.random.default_rng(seed)
    pairs = list(itertools.product(dimensions, bounds))
    rows: list[Record] = []
    curves: dict[tuple[int, float], list[list[list[float]]]] = {}
    with progress("theory", total=len(pairs) * len(sizes), unit="settings") as bar:
        for d, bound in pairs:
            found = []
            for n in sizes:
                found.append([risks(rng, n, d, bound, queries) for _ in range(repetitions)])
                bar.update(len(curves) * len(sizes) + len(found))
            curves[d, bound] = found
            for number, method in enumerate(PREDICTORS):
                risk = [[repetition[number] for repetition in some] for some in found]
                fitted, error = slope(list(sizes), risk)
                rows.append(
                    {
                        "d": d,
                        "L": bound,
                        "method": method,
                        "risk at smallest n": float(np.mean(risk[0])),
                        "predicted at smallest n": predicted(method, sizes[0], d, bound),
                        "risk at largest n": float(np.mean(risk[-1])),
                        "predicted at largest n": predicted(method, sizes[-1], d, bound),
                        "slope": fitted,
                        "standard error": error,
                        "predicted slope": 0.0 if method == "DeepNet" else -2 / d,
                    }
                )

    def draw(figure: Figure) -> None:
        for axes, d in zip(figure.subplots(1, len(dimensions), sharey=True, squeeze=False)[0], dimensions, strict=True):
            bound = bounds[len(bounds) // 2]
            for number, method in enumerate(PREDICTORS):
                line(axes, number, list(sizes), [float(np.mean([r[number] for r in some])) for some in curves[d, bound]], method)
            for method in PREDICTORS:
                derived = [predicted(method, n, d, bound) for n in sizes]
                label = "predicted" if method == PREDICTORS[0] else None
                axes.plot(sizes, derived, color=f"{INK}0", linestyle=(0, (5, 3)), linewidth=0.7, zorder=3, label=label)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel("n")
            axes.set_title(f"d = {d}, L = {bound:g}", fontsize=10)
        figure.get_axes()[0].set_ylabel("test risk")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False)

    text = (
        "DeepNet's risk stays where its norm bound leaves it; that of ResMem keeps falling with n, below the nearest neighbor's alone. "
        "Slopes are of log risk against log n, with standard errors over repetitions. Predicted, for large n: (1 - L)^2 / (d + 2) for "
        "DeepNet, Gamma(1 + 2/d) n^(-2/d) / d for the nearest neighbor, (1 - L)^2 times that for ResMem. Near the surface of the ball "
        "neighbors are probe_radius, so the last two risks lie above the prediction and fall faster, the more so for small n and large d. The "
        "predictions are derived in resmem_lm/studies/theory.py; the formula of the paper's Theorem 5.3 could not be verified, and nothing "
        "is compared with it."
    )
    return write_study(run, "theory", title="Linear regression (section 5)", text=text, rows=rows, draw=draw)
