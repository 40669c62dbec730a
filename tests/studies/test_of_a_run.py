"""Studies of a finished run."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmem_lm.cli import main
from resmem_lm.errors import UserError
from resmem_lm.evaluation import adaptive
from resmem_lm.evaluation.candidates import DEEPNET, Setting
from resmem_lm.evaluation.features import MEMORY
from resmem_lm.evaluation.neighbors import open_queries
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.maintenance.verify import verify
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.memory.schema import ARRAYS
from resmem_lm.studies.decomposition import choose, study_decomposition
from resmem_lm.studies.residual_size import largest_dropped, predict_with, study_residual_size
from resmem_lm.studies.sensitivity import LINES, study_sensitivity
from resmem_lm.studies.sources import TITLES, selections, study_sources
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json, write_json


def rows_of(workdir, name):
    return read_json(workdir / "studies" / name / "results.json")["rows"]


def sensitivity_of(workdir):
    return {(row["method"], row["varied"], row["value"]): row["test accuracy, %"] for row in rows_of(workdir, "sensitivity")}


def test_sensitivity_equals_the_results_at_the_chosen_hyperparameters(tiny_copy):
    grid = {"lambdas": (0.0, 0.5, 1.0), "boosts": (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)}
    study_sensitivity(tiny_copy, ks=(1, 4, 12), sigmas=(0.5, 1.0, 4.0), gate_ks=(2, 12, 50), gate_sigmas=(0.5, 1.0, 4.0), **grid)
    methods = read_json(tiny_copy / "results.json")["splits"]["test"]["methods"]
    found = sensitivity_of(tiny_copy)
    for name, title in LINES.items():
        if name not in methods:  # Adaptive ResMem with the neighbors alone
            assert {varied for method, varied, _ in found if method == title} == {"k", "sigma"}
            continue
        chosen, accuracy = methods[name]["hyperparameters"], pytest.approx(100 * methods[name]["accuracy"])
        applying = {axis: key for axis, key in KEYS.items() if key in chosen}
        assert {varied for method, varied, _ in found if method == title} == set(applying)
        for axis, key in applying.items():
            assert found[title, axis, chosen[key]] == accuracy
        if "lambda" in chosen:
            assert found[title, "lambda", 0.0] == pytest.approx(100 * methods["deepnet"]["accuracy"])
            assert {value for method, varied, value in found if (method, varied) == (title, "T")} == {0.5, 0.7, 1.0, 1.4, 2.0}
    assert {value for method, varied, value in found if (method, varied) == ("Adaptive ResMem", "k")} == {2, 12}


KEYS = {"k": "k", "sigma": "sigma", "T": "temperature", "lambda": "lambda"}


@pytest.mark.parametrize(("form", "axis"), [("boosted", (0.0, 4.0)), ("clipped", (0.0, 1.0))])
def test_calibrated_resmem_varies_in_its_chosen_form(tiny_copy, form, axis):
    results = read_json(tiny_copy / "results.json")
    results["splits"]["test"]["methods"]["resmem_calibrated"]["form"] = form
    write_json(tiny_copy / "results.json", results)
    few = {"ks": (4,), "sigmas": (1.0,), "gate_ks": (4,), "gate_sigmas": (1.0,)}
    study_sensitivity.function(Run(tiny_copy), lambdas=(0.0, 1.0), boosts=(0.0, 4.0), **few)
    varied = [value for method, varied, value in sensitivity_of(tiny_copy) if (method, varied) == ("Calibrated ResMem", "lambda")]
    assert tuple(varied) == axis
    text = read_json(tiny_copy / "studies/sensitivity/results.json")["text"]
    assert ("a factor in the logits" in text) == (form == "boosted")


@pytest.mark.parametrize(
    ("name", "values"), [("ks", ()), ("sigmas", (0.0,)), ("lambdas", (-0.5,)), ("gate_ks", (0, 4)), ("gate_sigmas", ())]
)
def test_unusable_values_for_sensitivity_are_refused(tiny_run, name, values):
    with pytest.raises(UserError, match=f"study_sensitivity.{name} = .*take one or more numbers"):
        study_sensitivity.function(Run(tiny_run), **{name: values})


def test_counts_among_some_tokens_equal_the_predictions(tiny_run):
    scorer = SplitScorer("validation", open_queries(Run(tiny_run), "validation"), open_datastore(tiny_run / "datastore"))
    among = np.random.default_rng(0).random(len(scorer.queries.tokens)) < 0.5
    counts = scorer.count_correct([4, 12], [1.0], [1.0, 1.4], {"resmem": [0.5, 1.0]}, among=among)
    for setting, (predictions, _) in scorer.predict(list(counts)).items():
        assert counts[setting] == ((predictions == scorer.queries.tokens) & among).sum()


def test_the_decomposition_adds_up_and_its_first_rule_equals_the_results(tiny_copy):
    grid = {"ks": (1, 4, 12), "sigmas": (0.5, 1.0, 4.0), "temperatures": (1.0, 1.4), "lambdas": (0.5, 1.0)}
    study_decomposition(tiny_copy, **grid)
    rows = rows_of(tiny_copy, "decomposition")
    methods = read_json(tiny_copy / "results.json")["splits"]["test"]["methods"]
    for row in rows:
        assert row["gain, %"] == pytest.approx(row["TPR, %"] - row["FPR, %"])
        assert row["accuracy, %"] == pytest.approx(100 * methods["deepnet"]["accuracy"] + row["gain, %"])
    assert rows[0]["accuracy, %"] == pytest.approx(100 * methods["resmem"]["accuracy"])
    assert {row["method"] for row in rows} == {"ResMem", "kNN-LM", "Calibrated ResMem", "Adaptive ResMem"}


@given(st.dictionaries(st.integers(1, 50), st.tuples(st.integers(0, 60), st.integers(0, 40)), min_size=1), st.floats(0.001, 0.5))
def test_each_rule_chooses_the_best_allowed_setting(counts, most_fpr):
    settings = {Setting("resmem", k, 1.0, 1.0, 1.0): pair for k, pair in counts.items()}
    right, both = {s: corrected + kept for s, (corrected, kept) in settings.items()}, {s: kept for s, (_, kept) in settings.items()}
    gain, bounded = choose(right, both, 40, 100, most_fpr).values()
    assert right[gain] == max(right.values())
    allowed = [s for s in settings if (40 - both[s]) / 100 < most_fpr]
    assert (bounded is None) == (not allowed)
    assert bounded is None or settings[bounded][0] == max(settings[s][0] for s in allowed)
    assert bounded is None or bounded in allowed


def test_the_gates_of_all_sources_are_those_of_the_results(tiny_copy, monkeypatch):
    monkeypatch.setattr(adaptive, "STEPS", adaptive.CHECK_STEPS)
    study_sources(tiny_copy)
    rows = {row["sources"]: row for row in rows_of(tiny_copy, "sources")}
    assert len(rows) == 4 + 4 + 1
    assert rows["neighbors"]["over the first row"] == 0
    assert {"the memory", "the memory and the document", "the memory and the document without exact matches"} <= set(rows)
    assert all(0 < row["accuracy, %"] < 100 and row["perplexity"] > 1 for row in rows.values())
    study_sources(tiny_copy, rows=("neighbors", "the memory"))
    assert rows_of(tiny_copy, "sources") == [{**rows[title]} for title in ("neighbors", "the memory")]
    with pytest.raises(UserError, match=r"study_sources.rows has no \['the past'\]: take some of \['neighbors'"):
        study_sources(tiny_copy, rows=("the past",))


def test_without_the_document_its_source_is_not_studied():
    assert set(selections(MEMORY).values()) == {
        *(TITLES[source] for source in MEMORY),
        *(f"the memory without {TITLES[source]}" for source in MEMORY),
        "the memory",
    }


def test_deepnet_is_resmem_without_memory(tiny_run):
    scorer = SplitScorer("test", open_queries(Run(tiny_run), "test"), open_datastore(tiny_run / "datastore"))
    accuracy = (scorer.predict([DEEPNET])[DEEPNET][0] == scorer.queries.tokens).mean()
    assert accuracy == pytest.approx(read_json(tiny_run / "results.json")["splits"]["test"]["methods"]["deepnet"]["accuracy"])


def test_a_study_runs_again_only_when_its_inputs_have_changed(tiny_copy, capsys):
    for _ in range(2):
        assert main(["study", "examples", f"--workdir={tiny_copy}"]) == 0
    stamp = (tiny_copy / "studies/examples/results.json").stat().st_mtime_ns
    text = read_json(tiny_copy / "stages/documents.json")["settings"]["text"]
    command = [f"--gin_file={tiny_copy.parent / 'tiny.gin'}", f"--workdir={tiny_copy}", f"--gin.TEXT='{text}'", "--gin.evaluate.ks=(1, 2)"]
    assert main(["study", "examples", f"--workdir={tiny_copy}"]) == 0
    assert (tiny_copy / "studies/examples/results.json").stat().st_mtime_ns == stamp
    assert read_json(tiny_copy / "studies/examples/results.json")["title"] in (tiny_copy / "report.html").read_text("utf-8")
    capsys.readouterr()
    assert main(["run", *command]) == 0
    assert "omits the study examples, whose inputs have changed" in capsys.readouterr().err
    assert read_json(tiny_copy / "studies/examples/results.json")["title"] not in (tiny_copy / "report.html").read_text("utf-8")
    assert main(["study", "examples", f"--workdir={tiny_copy}"]) == 0
    assert (tiny_copy / "studies/examples/results.json").stat().st_mtime_ns > stamp
    assert verify(Run(tiny_copy)) == []


def test_a_damaged_study_is_reported_and_runs_again(tiny_copy, capsys):
    assert main(["study", "decomposition", f"--workdir={tiny_copy}"]) == 0
    path = tiny_copy / "studies/decomposition/results.json"
    sound = path.read_bytes()
    path.write_bytes(sound[:100] + b"?" + sound[101:])
    assert any("resmem study decomposition" in problem for problem in verify(Run(tiny_copy)))
    assert main(["study", "decomposition", f"--workdir={tiny_copy}"]) == 2
    assert f"{path}" in capsys.readouterr().err
    path.unlink()
    assert main(["study", "decomposition", f"--workdir={tiny_copy}"]) == 0
    assert path.read_bytes() == sound
    assert verify(Run(tiny_copy)) == []


def test_without_a_run_the_error_names_the_needed_stage(tmp_path, capsys):
    assert main(["study", "decomposition", f"--workdir={tmp_path}"]) == 2
    assert "needs the stage search, which has not finished" in capsys.readouterr().err


def test_all_entries_equal_the_evaluation_and_more_entries_certify_more(tiny_copy):
    study_residual_size(tiny_copy, sizes=(1, 4, 8, 16, 500))
    rows = rows_of(tiny_copy, "residual-size")
    assert [row["entries"] for row in rows] == [1, 4, 8, 16]
    paper = read_json(tiny_copy / "results.json")["splits"]["test"]["methods"]["resmem_paper"]
    assert rows[-1]["test accuracy, %"] == pytest.approx(100 * paper["accuracy"])
    datastore = open_datastore(tiny_copy / "datastore")
    arrays = sum(file["bytes"] for name, file in datastore.shards[0]["files"].items() if name.endswith(".npy")) - 128 * len(ARRAYS)
    assert rows[-1]["bytes per row"] == arrays / datastore.shards[0]["rows"]
    shares = [row["certified, %"] for row in rows]
    assert shares == sorted(shares)
    assert shares[-1] > shares[0]


def test_a_certified_prediction_equals_the_prediction_of_the_full_residual(tiny_run):
    datastore, queries = open_datastore(tiny_run / "datastore"), open_queries(Run(tiny_run), "validation")
    setting = Setting("resmem", 12, 1.0, 1.0, 1.0)
    wanted = SplitScorer("validation", queries, datastore).predict([setting])[setting][0]
    certified = 0
    for entries in (1, 2, 6):
        scorer = SplitScorer("validation", queries, datastore, entries=entries)
        for some, (candidates, neighbors, *_) in scorer.blocks("test"):
            rows = np.maximum(queries.rows[np.arange(some.start, some.stop)], 0)
            dropped = np.zeros(neighbors.distances.shape, np.float32)
            dropped[: len(rows)] = largest_dropped(datastore, rows, entries)
            kept = predict_with(candidates, neighbors, jnp.asarray(dropped), setting, scorer.unit_number)
            sure = np.asarray(kept.certified)[: len(rows)]
            np.testing.assert_array_equal(np.asarray(kept.predictions)[: len(rows)][sure], wanted[some][sure])
            certified += sure.sum()
    assert certified > 100
