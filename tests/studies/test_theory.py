import csv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resmem_lm.cli import main
from resmem_lm.errors import UserError
from resmem_lm.maintenance.verify import verify
from resmem_lm.studies.theory import PREDICTORS, bounded_least_squares, in_unit_ball, nearest_points, predicted, risks, slope, study_theory
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(0.05, 3.0))
def test_the_bounded_fit_is_the_best_point_of_the_ball(seed, d, bound):
    rng = np.random.default_rng(seed)
    x, theta = rng.normal(size=(40, d)), rng.normal(size=d)
    y = x @ theta + 0.1 * rng.normal(size=40)
    fitted = bounded_least_squares(x, y, bound)
    assert np.linalg.norm(fitted) <= bound * (1 + 1e-6)
    others = in_unit_ball(rng, 200, d) * bound
    assert np.sum((x @ fitted - y) ** 2) <= np.sum((x @ others.T - y[:, None]) ** 2, axis=0).min() + 1e-6


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 60))
def test_the_nearest_point_has_the_smallest_distance(seed, d, n):
    rng = np.random.default_rng(seed)
    x, queries = rng.normal(size=(n, d)), rng.normal(size=(7, d))
    distances = np.linalg.norm(queries[:, None] - x[None], axis=-1)
    np.testing.assert_allclose(distances[np.arange(7), nearest_points(x, queries)], distances.min(axis=1), rtol=1e-6)


def test_points_fill_the_ball_uniformly():
    radius = np.linalg.norm(in_unit_ball(np.random.default_rng(0), 20_000, 3), axis=1)
    assert radius.max() <= 1
    assert np.mean(radius < 0.5) == pytest.approx(0.125, abs=0.01)


def test_the_slope_of_a_power_law_is_its_exponent():
    sizes = [10, 100, 1000]
    fitted, error = slope(sizes, [[n**-0.7] * 3 for n in sizes])
    assert fitted == pytest.approx(-0.7)
    assert error == pytest.approx(0, abs=1e-9)


@given(st.sampled_from([1, 2, 3]), st.floats(0.05, 0.95), st.integers(0, 2**32 - 1))
@settings(max_examples=6)
def test_risks_match_the_prediction_and_the_surface_increases_them(d, bound, seed):
    n, rng = 3000, np.random.default_rng(seed)
    measured = np.mean([risks(rng, n, d, bound, 1000) for _ in range(6)], axis=0)
    for method, risk in zip(PREDICTORS, measured, strict=True):
        wanted = predicted(method, n, d, bound)
        assert 0.8 * wanted < risk < (1.25 if method == "DeepNet" else 1.25 + 2 * n ** (-1 / d)) * wanted


@given(st.integers(1, 10), st.integers(1, 10_000), st.floats(0.05, 0.95))
def test_the_predictions_differ_by_the_part_that_the_model_learned(d, n, bound):
    deepnet, alone, resmem = (predicted(method, n, d, bound) for method in PREDICTORS)
    assert resmem == pytest.approx((1 - bound) ** 2 * alone)
    assert predicted("nearest neighbor", 2**d * n, d, bound) == pytest.approx(alone / 4)  # half the distance
    assert deepnet == predicted("DeepNet", 2 * n, d, bound)


def test_the_prediction_matches_measured_distances_in_one_dimension():
    x = in_unit_ball(np.random.default_rng(0), 400_000, 1)[:, 0].reshape(-1, 200)  # 199 points for each query
    squares = np.min(np.square(x[:, 1:] - x[:, :1]), axis=1)
    assert predicted("nearest neighbor", 199, 1, 0.5) == pytest.approx(squares.mean(), rel=0.15)


def test_deepnet_stays_flat_and_resmem_improves_on_the_neighbor_alone(tmp_path):
    small = {"sizes": (100, 1000, 4000), "dimensions": (2, 4), "bounds": (0.5,), "repetitions": 4, "queries": 500}
    first = study_theory(tmp_path, **small)
    rows = read_json(tmp_path / "studies/theory/results.json")["rows"]
    assert len(rows) == 2 * len(PREDICTORS)
    for row in rows:
        if row["method"] == "DeepNet":
            assert abs(row["slope"]) < 0.1
            assert row["risk at largest n"] == pytest.approx((1 - 0.5) ** 2 / (row["d"] + 2), rel=0.15)
        if row["method"] == "ResMem":
            assert row["predicted slope"] == -2 / row["d"]
            assert row["slope"] == pytest.approx(row["predicted slope"], rel=0.15)
            assert row["risk at largest n"] == pytest.approx(row["predicted at largest n"], rel=0.25)
            alone = next(other for other in rows if other["d"] == row["d"] and other["method"] == "nearest neighbor")
            assert row["risk at largest n"] < alone["risk at largest n"]
    with (tmp_path / "studies/theory/table.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == [row["method"] for row in rows]
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
        {"sizes": (0, 10)},
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
