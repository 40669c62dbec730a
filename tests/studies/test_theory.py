import csv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resmem_lm.cli import main
from resmem_lm.errors import UserError
from resmem_lm.maintenance.verify import verify
from resmem_lm.studies.theory import QUANTITIES, BoundedLeastSquares, bound_shape, in_ball, measure, predicted, slope, study_theory
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(0.05, 3.0))
def test_the_bounded_fit_is_the_best_point_of_the_ball(seed, d, bound):
    rng = np.random.default_rng(seed)
    x, theta = rng.normal(size=(40, d)), rng.normal(size=d)
    y = x @ theta + 0.1 * rng.normal(size=40)
    fitted = BoundedLeastSquares(bound).fit(x, y).coef_
    assert np.linalg.norm(fitted) <= bound * (1 + 1e-6)
    others = in_ball(rng, 200, d) * bound / np.sqrt(d + 2)
    assert np.sum((x @ fitted - y) ** 2) <= np.sum((x @ others.T - y[:, None]) ** 2, axis=0).min() + 1e-6


def test_points_fill_the_ball_uniformly_and_have_variance_1():
    x = in_ball(np.random.default_rng(0), 20_000, 3)
    radius = np.linalg.norm(x, axis=1) / np.sqrt(5)
    assert radius.max() <= 1
    assert np.mean(radius < 0.5) == pytest.approx(0.125, abs=0.01)
    np.testing.assert_allclose(np.cov(x, rowvar=False), np.eye(3), atol=0.03)


def test_the_slope_of_a_power_law_is_its_exponent():
    sizes = [10, 100, 1000]
    fitted, error = slope(sizes, [[n**-0.7] * 3 for n in sizes])
    assert fitted == pytest.approx(-0.7)
    assert error == pytest.approx(0, abs=1e-9)


@given(st.sampled_from([1, 2, 3]), st.floats(0.05, 0.95), st.integers(0, 2**32 - 1))
@settings(max_examples=6)
def test_measurements_match_the_prediction_and_the_surface_increases_them(d, bound, seed):
    n, rng = 3000, np.random.default_rng(seed)
    measured = dict(zip(QUANTITIES, np.mean([measure(rng, n, d, bound, 1000) for _ in range(6)], axis=0), strict=True))
    assert measured["ResMem"] <= 3 * (measured["T1"] + measured["T2"])  # equation 10
    for quantity in ("DeepNet", "nearest neighbor", "T2", "squared distance"):
        wanted = predicted(quantity, n, d, bound)
        assert 0.8 * wanted < measured[quantity] < (1.25 if quantity == "DeepNet" else 1.25 + 2 * n ** (-1 / d)) * wanted
    assert measured["T2"] == pytest.approx((1 - bound) ** 2 * measured["nearest neighbor"])


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([0.3, 0.6, 0.9]))
@settings(max_examples=4)
def test_the_estimation_error_falls_as_1_over_n(d, bound):
    n, rng = 2000, np.random.default_rng(0)
    measured = np.mean([measure(rng, n, d, bound, 200)[QUANTITIES.index("T1")] for _ in range(60)])
    assert measured == pytest.approx(predicted("T1", n, d, bound), rel=0.35, abs=1e-20)


@given(st.integers(1, 10), st.integers(2, 10_000), st.floats(0.05, 0.95))
def test_the_predictions_differ_by_the_part_that_the_model_learned(d, n, bound):
    deepnet, alone, resmem = (predicted(quantity, n, d, bound) for quantity in QUANTITIES[:3])
    assert resmem == predicted("T2", n, d, bound) == pytest.approx((1 - bound) ** 2 * alone)
    assert predicted("squared distance", n, d, bound) == pytest.approx(d * alone)
    assert bound_shape("ResMem", n, d, bound) == pytest.approx(sum(bound_shape(term, n, d, bound) for term in ("T1", "T2")))
    assert predicted("nearest neighbor", 2**d * n, d, bound) == pytest.approx(alone / 4)  # half the distance
    assert deepnet == predicted("DeepNet", 2 * n, d, bound)


def test_the_prediction_matches_measured_distances_in_one_dimension():
    x = in_ball(np.random.default_rng(0), 400_000, 1)[:, 0].reshape(-1, 200)  # 199 points for each query
    squares = np.min(np.square(x[:, 1:] - x[:, :1]), axis=1)
    assert predicted("nearest neighbor", 199, 1, 0.5) == pytest.approx(squares.mean(), rel=0.15)


def test_deepnet_stays_flat_and_resmem_improves_on_the_neighbor_alone(tmp_path):
    small = {"sizes": (100, 1000, 4000), "dimensions": (2, 4), "bounds": (0.5,), "repetitions": 4, "queries": 500}
    first = study_theory(tmp_path, **small)
    rows = read_json(tmp_path / "studies/theory/results.json")["rows"]
    assert len(rows) == 2 * len(QUANTITIES)
    of = {(row["d"], row["quantity"]): row for row in rows}
    for d in (2, 4):
        deepnet, resmem = of[d, "DeepNet"], of[d, "ResMem"]
        assert abs(deepnet["slope"]) < 0.1
        assert deepnet["at largest n"] == pytest.approx((1 - 0.5) ** 2, rel=0.15)
        assert resmem["predicted slope"] == -2 / d
        assert resmem["slope"] == pytest.approx(-2 / d, rel=0.15)
        assert resmem["at largest n"] == pytest.approx(resmem["predicted at largest n"], rel=0.3)
        assert resmem["at largest n"] < of[d, "nearest neighbor"]["at largest n"]
        for bounded in ("ResMem", "squared distance"):  # the bounds hold and are slower
            assert of[d, bounded]["at largest n"] <= of[d, bounded]["bound at largest n"]
            assert of[d, bounded]["slope"] < of[d, bounded]["slope of the bound"]
        assert of[d, "T1"]["slope"] == pytest.approx(-1, abs=0.4)
    with (tmp_path / "studies/theory/table.csv").open() as file:
        assert [row["quantity"] for row in csv.DictReader(file)] == [row["quantity"] for row in rows]
    assert (tmp_path / "studies/theory/figure.svg").read_text().startswith("<svg")
    assert study_theory(tmp_path / "again", **small) == first


def test_the_command_prints_the_table_and_the_report_has_it(tiny_copy, capsys):
    small = ["--gin.study_theory.sizes=(50, 100, 200)", "--gin.study_theory.dimensions=(2,)", "--gin.study_theory.repetitions=2"]
    assert main(["study", "theory", f"--workdir={tiny_copy}", *small]) == 0
    printed = capsys.readouterr().out
    assert "Linear regression (section 5)" in printed
    assert printed.count("nearest neighbor") == 3
    page = (tiny_copy / "report.html").read_text()
    assert "Linear regression (section 5)" in page
    assert page.count("<svg") == 2
    assert verify(Run(tiny_copy)) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"bounds": (0.0,)},
        {"bounds": ()},
        {"bounds": (0.5, 1.0)},
        {"dimensions": (0,)},
        {"dimensions": ()},
        {"sizes": ()},
        {"sizes": (1, 10)},
        {"sizes": (10, 10)},
        {"sizes": (10, 20), "repetitions": 1},
        {"repetitions": 0},
        {"queries": 0},
    ],
)
def test_unusable_settings_are_refused(tmp_path, settings):
    with pytest.raises(UserError, match=f"study_theory.{next(iter(settings))} = "):
        study_theory(tmp_path, **settings)


def test_the_study_needs_no_run_and_an_unknown_setting_is_an_error(tmp_path, capsys):
    assert main(["study", "theory", f"--workdir={tmp_path}", "--gin.study_theory.size=3"]) == 2
    assert "doesn't have a parameter named 'size'" in capsys.readouterr().err
