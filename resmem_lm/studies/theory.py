"""Study linear regression in the paper's setting (section 5): a bounded model, whose risk does not vanish, and a memory of its residuals.

x uniform in the ball of radius sqrt(d + 2) in R^d, so E x x^T = I;  y = <theta*, x>, |theta*| = 1
DeepNet:           <theta_n, x>, theta_n = argmin over |theta| <= L < 1 of the squared error on n points
nearest neighbor:  y of the nearest training point x'
ResMem:            <theta_n, x> + residual of that point                                       (equation 2, k = 1)

With f_inf = L theta* and f_perp = (1 - L) theta*, the proof of Theorem 5.3 (equation 10) bounds ResMem's risk by 3 (T1 + T2):

T1 = E (f_n - f_inf)^2(x) + E (f_n - f_inf)^2(x')    from DeepNet's estimation         bound: d^2 L^2 n^(-2/3)
T2 = E (f_perp(x) - f_perp(x'))^2                    from the distance to x'           bound: d^2 (1 - L)^2 [log(n^(1/d)) / n]^(1/d)

The theorem and Lemma D.1 (E|x' - x|^2 <= d^2 [log(n^(1/d)) / n]^(1/d) up to a constant) leave their constants open. The study takes the
smallest constant with which the bound holds for every measured d, L and n. It also compares with a derivation for large n (`predicted`):

DeepNet.  theta_n -> L theta*, so the risk -> (1 - L)^2.
T1.  On the sphere |theta| = L, to first order in the error D of the sample covariance, theta_n - L theta* is L (1 - L) times the part
    of D theta* that is orthogonal to theta*. Its expected square is (d - 1) E x_1^2 x_2^2 / n, so T1 is 2 L^2 (1 - L)^2 (d - 1) (d + 2) /
    ((d + 4) n). It falls as 1 / n, faster than the bound's n^(-2/3).
Distance.  A ball of radius r around an x in the interior has a share (r^2 / (d + 2))^(d/2) of the whole, so E|x' - x|^2 is
    (d + 2) Gamma(1 + 2/d) n^(-2/d) for large n. The exponent is twice that of Lemma D.1, which is therefore not tight.
Nearest neighbor.  The error is <theta*, x' - x>. Rotation does not change the joint law of x and x', so the risk is E|x' - x|^2 / d.
T2 and ResMem.  T2 is (1 - L)^2 times the risk of the nearest neighbor. ResMem's error is <theta* - theta_n, x' - x>, so with theta_n =
    L theta* its risk is T2: the errors at x and at x', whose squares are T1, nearly cancel.

Within about n^(-1/d) of the surface, part of that ball is outside, so the neighbor is farther away and the risk is larger. About
d n^(-1/d) of the points lie there; this share decreases slowly. So the measured risks of the nearest neighbor and of ResMem exceed the
prediction and decrease faster than n^(-2/d): for small n, and in 8 dimensions for every n of the default settings. The standard error of a
slope measures only the scatter of the repetitions.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epy
from jaxtyping import Float
from sklearn.base import BaseEstimator, RegressorMixin

from resmem_lm.errors import UserError, check_least
from resmem_lm.report.plots import INK, Figure, legend_above, line
from resmem_lm.studies.study import check_values, study, write_study
from resmem_lm.workdir.progress import progress
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record

with epy.lazy_imports():
    from resmem_lm.estimators import regressor

QUANTITIES = ("DeepNet", "nearest neighbor", "ResMem", "T1", "T2", "squared distance")
DRAWN = ("DeepNet", "nearest neighbor", "ResMem", "T1")
Curve = list[list[float]]  # values by size and repetition
Curves = dict[tuple[int, float], dict[str, Curve]]  # by d and L, and by quantity


def in_ball(rng: np.random.Generator, points: int, d: int) -> Float[np.ndarray, "points d"]:
    """Draw points uniformly from the ball of radius sqrt(d + 2), so that each coordinate has variance 1."""
    x = rng.normal(size=(points, d))
    return math.sqrt(d + 2) * x / np.linalg.norm(x, axis=1, keepdims=True) * rng.random((points, 1)) ** (1 / d)


class BoundedLeastSquares(RegressorMixin, BaseEstimator):
    """argmin |x theta - y|^2 over |theta| <= bound, by ridge regression. Bisection finds the penalty that reaches the bound."""

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def fit(self, x: Float[np.ndarray, "n d"], y: Float[np.ndarray, " n"]) -> "BoundedLeastSquares":
        """Set `coef_`, the minimizer."""
        values, vectors = np.linalg.eigh(x.T @ x)
        target = vectors.T @ (x.T @ y)

        def norm(penalty: float) -> float:
            return float(np.linalg.norm(target / (np.maximum(values, 1e-12) + penalty)))

        low, high = 0.0, float(np.linalg.norm(target)) / self.bound
        for _ in range(100 if norm(0.0) > self.bound else 0):
            middle = (low + high) / 2
            low, high = (middle, high) if norm(middle) > self.bound else (low, middle)
        penalty = high if norm(0.0) > self.bound else 0.0
        self.coef_ = vectors @ (target / (np.maximum(values, 1e-12) + penalty))
        return self

    def predict(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """Return <theta, x>."""
        found: np.ndarray = x @ self.coef_
        return found


def measure(rng: np.random.Generator, n: int, d: int, bound: float, queries: int) -> list[float]:
    """Return each of QUANTITIES, measured on new points."""
    theta = rng.normal(size=d)
    theta /= np.linalg.norm(theta)
    x, test = in_ball(rng, n, d), in_ball(rng, queries, d)
    model = regressor.ResMemRegressor(BoundedLeastSquares(bound), k=1).fit(x, x @ theta)
    distances, rows = model.kneighbors(test)
    near, error = x[rows[:, 0]], model.estimator_.coef_ - bound * theta
    differences = (
        test @ (model.estimator_.coef_ - theta),
        (near - test) @ theta,
        model.predict(test) - test @ theta,
        np.hypot(test @ error, near @ error),
        (1 - bound) * (test - near) @ theta,
        distances[:, 0],
    )
    return [float(np.mean(np.square(difference))) for difference in differences]


def slope(n: Sequence[int], risk: Curve) -> tuple[float, float]:
    """Return the slope of log risk against log n over all repetitions, and its standard error."""
    x = np.log(np.repeat(n, [len(some) for some in risk]))
    y = np.log(np.maximum(np.concatenate(risk), 1e-300))
    centered = x - x.mean()
    fitted = float(centered @ y / (centered @ centered))
    errors = y - y.mean() - fitted * centered
    return fitted, float(np.sqrt(errors @ errors / (len(x) - 2) / (centered @ centered)))


def predicted(quantity: str, n: int, d: int, bound: float) -> float:
    """Return a quantity for large n; see the derivation at the top of the module."""
    if quantity == "DeepNet":
        return (1 - bound) ** 2
    if quantity == "T1":
        return 2 * bound**2 * (1 - bound) ** 2 * (d - 1) * (d + 2) / ((d + 4) * n)
    distance = (d + 2) * math.gamma(1 + 2 / d) * n ** (-2 / d)
    return {"squared distance": distance, "nearest neighbor": distance / d}.get(quantity, (1 - bound) ** 2 * distance / d)


def bound_shape(quantity: str, n: int, d: int, bound: float) -> float | None:
    """Return the paper's bound without its constant: Theorem 5.3 for ResMem and its terms, Lemma D.1 for the distance, else None."""
    distance = d**2 * (math.log(n) / d / n) ** (1 / d)
    terms = {"T1": d**2 * bound**2 * n ** (-2 / 3), "T2": (1 - bound) ** 2 * distance}
    return (terms | {"ResMem": sum(terms.values()), "squared distance": distance}).get(quantity)


def bound_constant(curves: Curves, sizes: list[int], quantity: str) -> float:
    """Return the smallest constant with which the bound of a quantity holds for every measured d, L and n."""
    return max(
        float(np.mean(some)) / (bound_shape(quantity, n, *setting) or math.inf)
        for setting, by_quantity in curves.items()
        for n, some in zip(sizes, by_quantity[quantity], strict=True)
    )


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
    """Measure the test risks of DeepNet, the nearest neighbor alone and ResMem against n, and the terms of the bound (paper, section 5).

    Args:
        sizes: numbers n of training points, 2 or more.
        dimensions: numbers d of features.
        bounds: upper bounds L of the model's norm, below 1, the norm of theta*.
        repetitions: repetitions of each measurement, with new theta* and points.
        queries: number of test points of each repetition.
        seed: seed of all random draws.
    """
    check_least("study_theory", 2, sizes=sizes)
    check_least("study_theory", 1, dimensions=dimensions, repetitions=repetitions, queries=queries)
    check_values("study_theory.bounds", bounds, lambda bound: 1e-6 <= bound < 1, "from 1e-06 and below 1, the norm of theta*")
    sizes = sorted(sizes)
    if len(set(sizes)) < 2 or len(set(sizes)) * repetitions < 3:
        raise UserError(f"study_theory.sizes = {sizes}: a slope needs two or more sizes, and three or more points with repetitions")
    curves = _measure(list(itertools.product(dimensions, bounds)), sizes, repetitions, queries, seed)
    theorem, lemma = (bound_constant(curves, sizes, quantity) for quantity in ("ResMem", "squared distance"))
    constants = {"ResMem": theorem, "T1": theorem, "T2": theorem, "squared distance": lemma}
    rows = [
        _row(d, bound, quantity, sizes, curve, constants.get(quantity))
        for (d, bound), by_quantity in curves.items()
        for quantity, curve in by_quantity.items()
    ]
    text = (
        "DeepNet's risk stays at the value that its norm bound implies. ResMem's risk decreases with n, and is lower than the nearest "
        "neighbor's alone. T1 and T2 are the terms of section 5.3. Slopes are of the logarithm against log n, with standard errors over "
        f"repetitions. The bounds are Theorem 5.3 with the constant {theorem:.3g} and, for the squared distance, Lemma D.1 with "
        f"{lemma:.3g}, the smallest with which they hold for all d, L and n here. The measured rates are faster than the bounds': T1 falls "
        "as 1/n and the squared distance as n^(-2/d). resmem_lm/studies/theory.py derives both and the predicted values, for large n. Near "
        "the surface of the ball neighbors are farther away, which increases the risk most for small n and large d."
    )
    middle = bounds[len(bounds) // 2]
    shown = {d: curves[d, middle] for d in dimensions}
    draw = functools.partial(_draw, bound=middle, sizes=sizes, curves=shown, constant=theorem)
    return write_study(run, "theory", title="Linear regression (section 5)", text=text, rows=rows, draw=draw)


def _measure(pairs: list[tuple[int, float]], sizes: list[int], repetitions: int, queries: int, seed: int) -> Curves:
    """Return the curve of each quantity for each pair of d and L."""
    rng = np.random.default_rng(seed)
    curves: Curves = {}
    with progress("theory", total=len(pairs) * len(sizes), unit="settings") as bar:
        for d, bound in pairs:
            found = []
            for n in sizes:
                found.append([measure(rng, n, d, bound, queries) for _ in range(repetitions)])
                bar.update(len(curves) * len(sizes) + len(found))
            curves[d, bound] = {
                quantity: [[repetition[number] for repetition in some] for some in found] for number, quantity in enumerate(QUANTITIES)
            }
    return curves


def _row(d: int, bound: float, quantity: str, sizes: list[int], curve: Curve, constant: float | None) -> Record:
    fitted, error = slope(sizes, curve)
    row = {
        "d": d,
        "L": bound,
        "quantity": quantity,
        "at smallest n": float(np.mean(curve[0])),
        "at largest n": float(np.mean(curve[-1])),
        "predicted at largest n": predicted(quantity, sizes[-1], d, bound),
        "slope": fitted,
        "standard error": error,
        "predicted slope": {"DeepNet": 0.0, "T1": -1.0}.get(quantity, -2 / d),
        "bound at largest n": "-",
        "slope of the bound": "-",
    }
    if constant is None:
        return row
    shape = [bound_shape(quantity, n, d, bound) or 0.0 for n in sizes]
    return row | {"bound at largest n": constant * shape[-1], "slope of the bound": slope(sizes, [[value] * 2 for value in shape])[0]}


def _draw(figure: Figure, _: list[Record], *, bound: float, sizes: list[int], curves: dict[int, dict[str, Curve]], constant: float) -> None:
    for axes, (d, by_quantity) in zip(figure.subplots(1, len(curves), sharey=True, squeeze=False)[0], curves.items(), strict=True):
        for number, quantity in enumerate(DRAWN):
            line(axes, number, sizes, [float(np.mean(repetitions)) for repetitions in by_quantity[quantity]], quantity)
        line(axes, len(DRAWN), sizes, [constant * (bound_shape("ResMem", n, d, bound) or 0.0) for n in sizes], "Theorem 5.3")
        for quantity in DRAWN:
            label = "predicted" if quantity == DRAWN[0] else None
            style: dict[str, Any] = {"color": f"{INK}0", "linestyle": (0, (5, 3)), "linewidth": 0.7, "zorder": 3, "label": label}
            axes.plot(sizes, [predicted(quantity, n, d, bound) for n in sizes], **style)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("n")
        axes.set_title(f"d = {d}, L = {bound:g}", fontsize=10)
    figure.get_axes()[0].set_ylabel("test risk")
    legend_above(figure)
