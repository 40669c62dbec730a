"""Study linear regression (paper, section 5) with a bounded model, whose risk does not vanish, and a memory of its residuals.

x uniform in the unit ball of R^d,  y = <theta*, x>, |theta*| = 1  (paper: a ball of radius sqrt(d + 2), with d + 2 times these risks)
DeepNet:           <theta_n, x>, theta_n = argmin over |theta| <= L < 1 of the squared error on n points
nearest neighbor:  y of the nearest training point x'
ResMem:            <theta_n, x> + residual of that point                                       (equation 2, k = 1)

Theorem 5.3 of the paper bounds ResMem's risk up to a constant, so this study compares risks with the following derivation (`predicted`):

DeepNet.  theta_n -> L theta*, so the risk -> (1 - L)^2 E<theta*, x>^2 = (1 - L)^2 / (d + 2).
Nearest neighbor.  The error is <theta*, x' - x>. Rotation does not change the joint law of x and x', so the risk is E|x' - x|^2 / d.
    A ball of radius r around an x in the interior has a share r^d of the unit ball, so |x' - x| > r with probability (1 - r^d)^n, and
    E|x' - x|^2 is Gamma(1 + 2/d) n^(-2/d) for large n.
ResMem.  The residuals are a linear function of x, so the error is <theta* - theta_n, x' - x>. With theta_n = L theta*, the risk is
    (1 - L)^2 times the risk of the nearest neighbor. For small n, theta_n has not converged, and theta* - theta_n is longer.

Within about n^(-1/d) of the surface, part of that ball is outside the unit ball, so the neighbor is farther away and the risk is larger.
About d n^(-1/d) of the points lie there; this share decreases slowly. So the measured risks of the nearest neighbor and of ResMem exceed
the prediction and decrease faster than n^(-2/d): for small n, and in 8 dimensions for every n of the default settings. The standard error
of a slope measures only the scatter of the repetitions.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from resmem_lm.errors import UserError, check_least
from resmem_lm.report.plots import INK, Figure, legend_above, line
from resmem_lm.studies.study import check_values, study, write_study
from resmem_lm.workdir.progress import progress
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record

PREDICTORS = ("DeepNet", "nearest neighbor", "ResMem")
Curve = list[list[float]]  # risks, by size and repetition


def in_unit_ball(rng: np.random.Generator, points: int, d: int) -> Float[np.ndarray, "points d"]:
    """Draw points uniformly from the unit ball."""
    x = rng.normal(size=(points, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True) * rng.random((points, 1)) ** (1 / d)


def bounded_least_squares(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, " n"], bound: float) -> Float[np.ndarray, " d"]:
    """Return argmin |x theta - y|^2 over |theta| <= bound, by ridge regression. Bisection finds the penalty that reaches the bound."""
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
    """Return the index of the nearest point of each query."""
    squares = np.sum(np.square(x), axis=1)
    blocks = np.array_split(queries, max(1, len(queries) * len(x) // 10**7))  # so that a block's distances fit in memory
    return np.concatenate([np.argmin(squares - 2 * some @ x.T, axis=1) for some in blocks])


def risks(rng: np.random.Generator, n: int, d: int, bound: float, queries: int) -> list[float]:
    """Return the mean squared error of each method on new points."""
    theta = rng.normal(size=d)
    theta /= np.linalg.norm(theta)
    x, test = in_unit_ball(rng, n, d), in_unit_ball(rng, queries, d)
    y, wanted = x @ theta, test @ theta
    fitted = bounded_least_squares(x, y, bound)
    near = nearest_points(x, test)
    predictions = (test @ fitted, y[near], test @ fitted + (y - x @ fitted)[near])
    return [float(np.mean(np.square(prediction - wanted))) for prediction in predictions]


def slope(n: Sequence[int], risk: Curve) -> tuple[float, float]:
    """Return the slope of log risk against log n over all repetitions, and its standard error."""
    x = np.log(np.repeat(n, [len(some) for some in risk]))
    y = np.log(np.maximum(np.concatenate(risk), 1e-300))
    centered = x - x.mean()
    fitted = float(centered @ y / (centered @ centered))
    errors = y - y.mean() - fitted * centered
    return fitted, float(np.sqrt(errors @ errors / (len(x) - 2) / (centered @ centered)))


def predicted(method: str, n: int, d: int, bound: float) -> float:
    """Return a method's risk for large n; see the derivation at the top of the module."""
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
    """Measure test risk against n for DeepNet, the nearest neighbor alone and ResMem; compare it with predictions (paper, section 5).

    Args:
        sizes: numbers n of training points.
        dimensions: numbers d of features.
        bounds: upper bounds L of the model's norm, below 1, the norm of theta*.
        repetitions: repetitions of each measurement, with new theta* and points.
        queries: number of test points of each repetition.
        seed: seed of all random draws.
    """
    check_least("study_theory", 1, sizes=sizes, dimensions=dimensions, repetitions=repetitions, queries=queries)
    check_values("study_theory.bounds", bounds, lambda bound: 1e-6 <= bound < 1, "from 1e-06 and below 1, the norm of theta*")
    sizes = sorted(sizes)
    if len(set(sizes)) < 2 or len(set(sizes)) * repetitions < 3:
        raise UserError(f"study_theory.sizes = {sizes}: a slope needs two or more sizes, and three or more points with repetitions")
    curves = _measure(list(itertools.product(dimensions, bounds)), sizes, repetitions, queries, seed)
    rows = [_row(d, bound, method, sizes, curve) for (d, bound), by_method in curves.items() for method, curve in by_method.items()]
    text = (
        "DeepNet's risk stays at the value that its norm bound implies. ResMem's risk decreases with n, and is lower than the nearest "
        "neighbor's alone. Slopes are of log risk against log n, with standard errors over repetitions. Predicted, for large n: "
        "(1 - L)^2 / (d + 2) for DeepNet, Gamma(1 + 2/d) n^(-2/d) / d for the nearest neighbor, and (1 - L)^2 times that risk for ResMem. "
        "Near the surface of the ball neighbors are farther away, so the last two risks exceed the prediction and decrease faster, "
        "mostly for small n and large d. The predictions are derived in resmem_lm/studies/theory.py. Theorem 5.3 of the paper is a bound "
        "up to a constant, so it predicts no risk."
    )
    shown = {d: curves[d, bounds[len(bounds) // 2]] for d in dimensions}
    draw = functools.partial(_draw, bound=bounds[len(bounds) // 2], sizes=sizes, curves=shown)
    return write_study(run, "theory", title="Linear regression (section 5)", text=text, rows=rows, draw=draw)


def _measure(
    pairs: list[tuple[int, float]], sizes: list[int], repetitions: int, queries: int, seed: int
) -> dict[tuple[int, float], dict[str, Curve]]:
    """Return the curve of each method for each pair of d and L."""
    rng = np.random.default_rng(seed)
    curves: dict[tuple[int, float], dict[str, Curve]] = {}
    with progress("theory", total=len(pairs) * len(sizes), unit="settings") as bar:
        for d, bound in pairs:
            found = []
            for n in sizes:
                found.append([risks(rng, n, d, bound, queries) for _ in range(repetitions)])
                bar.update(len(curves) * len(sizes) + len(found))
            curves[d, bound] = {
                method: [[repetition[number] for repetition in some] for some in found] for number, method in enumerate(PREDICTORS)
            }
    return curves


def _row(d: int, bound: float, method: str, sizes: list[int], curve: Curve) -> Record:
    fitted, error = slope(sizes, curve)
    return {
        "d": d,
        "L": bound,
        "method": method,
        "risk at smallest n": float(np.mean(curve[0])),
        "predicted at smallest n": predicted(method, sizes[0], d, bound),
        "risk at largest n": float(np.mean(curve[-1])),
        "predicted at largest n": predicted(method, sizes[-1], d, bound),
        "slope": fitted,
        "standard error": error,
        "predicted slope": 0.0 if method == "DeepNet" else -2 / d,
    }


def _draw(figure: Figure, _: list[Record], *, bound: float, sizes: list[int], curves: dict[int, dict[str, Curve]]) -> None:
    for axes, (d, by_method) in zip(figure.subplots(1, len(curves), sharey=True, squeeze=False)[0], curves.items(), strict=True):
        for number, (method, curve) in enumerate(by_method.items()):
            line(axes, number, sizes, [float(np.mean(repetitions)) for repetitions in curve], method)
        for method in PREDICTORS:
            label = "predicted" if method == PREDICTORS[0] else None
            style: dict[str, Any] = {"color": f"{INK}0", "linestyle": (0, (5, 3)), "linewidth": 0.7, "zorder": 3, "label": label}
            axes.plot(sizes, [predicted(method, n, d, bound) for n in sizes], **style)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("n")
        axes.set_title(f"d = {d}, L = {bound:g}", fontsize=10)
    figure.get_axes()[0].set_ylabel("test risk")
    legend_above(figure)
