"""DeepNet and ResMem for models of growing size."""

import re
import shutil

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resmem_lm.errors import UserError
from resmem_lm.maintenance.append import append
from resmem_lm.maintenance.verify import verify
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.model.checkpoints import load_config, load_model
from resmem_lm.model.config import ModelConfig
from resmem_lm.studies.model_size import count_parameters, equal_deepnet, resized, study_model_size
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json, write_json

POINTS = st.lists(st.tuples(st.integers(1, 10**9), st.floats(0, 1)), min_size=1, max_size=6, unique_by=lambda point: point[0]).map(sorted)


def multiple(shown):
    return float(re.fullmatch(r"(?:at most |more than )?([\d.e+-]+)x", shown)[1])


@given(POINTS, st.floats(0, 1), st.integers(1, 10**9))
def test_the_equal_deepnet_is_between_a_less_and_a_more_accurate_one(points, accuracy, own):
    parameters, deepnet = zip(*points, strict=True)
    shown = equal_deepnet(parameters, deepnet, own, accuracy)
    assert shown.startswith("more than") == (max(deepnet) < accuracy)
    assert shown.startswith("at most") == (deepnet[0] > accuracy)
    reached = next((i for i, value in enumerate(deepnet) if value >= accuracy), len(points) - 1)
    about = 1.06  # two digits are shown
    assert parameters[max(0, reached - 1)] / own / about <= multiple(shown) <= parameters[reached] / own * about


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=6, unique=True).map(sorted), st.integers(0, 5))
def test_a_deepnet_equals_itself(parameters, number):
    number %= len(parameters)
    deepnet = [0.1 * rank for rank in range(len(parameters))]
    assert equal_deepnet(parameters, deepnet, parameters[number], deepnet[number]) == "1x"


@given(st.integers(1, 600), st.integers(1, 600), st.integers(1, 64), st.integers(1, 4))
@settings(max_examples=6)  # each traces two models
def test_resizing_changes_the_width_only(width, other, head_dim, ratio):
    model = ModelConfig(128, width, max(1, width // head_dim), 2, head_dim, ratio * width)
    assert resized(model, width) == model
    changed = resized(model, other)
    assert (changed.emb_dim, changed.mlp_dim) == (other, ratio * other)
    assert (count_parameters(changed) > count_parameters(model)) == (other > width)


@pytest.fixture(scope="module")
def studied(tiny_run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("model-size") / "run"
    shutil.copytree(tiny_run, workdir, symlinks=True)
    study_model_size(workdir, widths=(16, 32))
    return workdir


def test_rows_equal_the_evaluations_and_the_model_of_the_run_is_not_trained_again(studied):
    rows = read_json(studied / "studies/model-size/results.json")["rows"]
    assert [row["model"] for row in rows] == ["emb 16", "emb 32"]
    assert sorted(path.name for path in (studied / "derived/model-size").iterdir()) == ["emb-16"]
    for row, workdir in zip(rows, (studied / "derived/model-size/emb-16", studied), strict=True):
        methods = read_json(workdir / "results.json")["splits"]["test"]["methods"]
        assert row["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(load_model(workdir / "checkpoints").parameters))
        for name, title in (("deepnet", "DeepNet"), ("resmem_paper", "ResMem (paper)"), ("resmem", "ResMem")):
            assert row[f"{title}, %"] == pytest.approx(100 * methods[name]["accuracy"])
        assert row["gain, %"] == pytest.approx(row["ResMem, %"] - row["DeepNet, %"])
    assert verify(Run(studied)) == []


def test_other_models_have_the_settings_of_the_run(studied):
    derived = studied / "derived/model-size/emb-16"
    assert load_config(derived / "checkpoints") == resized(load_config(studied / "checkpoints"), 16)
    assert open_datastore(derived / "datastore").rows == open_datastore(studied / "datastore").rows
    for stage in ("documents", "vocabulary", "build", "index", "search", "evaluate", "train"):
        own, other = (read_json(workdir / "stages" / f"{stage}.json")["settings"] for workdir in (studied, derived))
        assert own | {"model": None} == other | {"model": None}
    assert verify(Run(derived)) == []


def test_finished_models_are_not_trained_again(studied):
    stages = sorted((studied / "derived/model-size/emb-16/stages").iterdir())
    before = [path.stat().st_mtime_ns for path in stages]
    study_model_size(studied, widths=[16])
    assert [path.stat().st_mtime_ns for path in stages] == before


def test_a_model_that_was_trained_elsewhere_is_refused(tiny_copy):
    record = read_json(tiny_copy / "stages/train.json")
    elsewhere = {"model": record["settings"]["model"], "checkpoint": "elsewhere"}
    write_json(tiny_copy / "stages/train.json", record | {"settings": elsewhere})
    with pytest.raises(UserError, match="took its checkpoint from elsewhere"):
        study_model_size(tiny_copy)


def test_an_evaluation_of_another_datastore_is_refused(tiny_copy):
    (tiny_copy / "more.txt").write_text("Another document, with other words than those before it: nothing of it was there.")
    append(Run(tiny_copy), [str(tiny_copy / "more.txt")])
    with pytest.raises(UserError, match="the datastore has changed since the evaluation"):
        study_model_size(tiny_copy)


@pytest.mark.parametrize("widths", [(), (16, 0)])
def test_unusable_widths_are_refused(tiny_run, widths):
    with pytest.raises(UserError, match="take one or more numbers of 1 or more"):
        study_model_size.function(Run(tiny_run), widths=widths)
