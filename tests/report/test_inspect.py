import numpy as np
import pytest

from resmem_lm.cli import main
from resmem_lm.errors import UserError
from resmem_lm.evaluation.neighbors import open_queries
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.report.inspect import format_influence, format_tokens, inspect
from resmem_lm.text.shards import read_shard, shard_paths
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json


def test_a_test_document_has_the_accuracy_of_the_evaluation(tiny_run):
    document = read_shard(shard_paths(Run(tiny_run), "test")[0])[0]
    described = inspect(Run(tiny_run), document.text)
    queries = open_queries(Run(tiny_run), "test")
    count = queries.document_lengths[0]
    assert len(described) == count
    best = np.asarray(queries.candidate_ids)[np.arange(count), np.asarray(queries.candidate_logits)[:count].argmax(1)]
    deepnet_right = np.array([t["deepnet"] == t["token"] for t in described])
    assert deepnet_right.mean() == pytest.approx(np.mean(best == queries.tokens[:count]))


def test_where_the_predictions_differ_the_neighbors_that_weigh_most_are_shown(tiny_run):
    text = " ".join(document.text for document in read_shard(shard_paths(Run(tiny_run), "test")[0]))
    described = inspect(Run(tiny_run), text)
    changed = [t for t in described if t["neighbors"]]
    assert changed
    ids = {d["id"] for shard in range(3) for d in open_datastore(tiny_run / "datastore").documents(shard)}
    for t in changed:
        assert t["deepnet"] != t["resmem"]
        weights = [n["weight"] for n in t["neighbors"]]
        assert weights == sorted(weights, reverse=True)
        assert {n["token"] for n in t["neighbors"]} == {t["resmem"]}
        assert {n["document"] for n in t["neighbors"]} <= ids
    assert all(not t["neighbors"] for t in described if t["deepnet"] == t["resmem"])


def test_the_command_prints_a_line_for_each_token(tiny_run, capsys):
    assert main(["inspect", f"--workdir={tiny_run}", "The array reads the shard."]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["token", "DeepNet", "ResMem", "Adaptive", "ResMem"]
    assert "␣array" in printed
    assert format_tokens(inspect(Run(tiny_run), "The array reads the shard.")) + "\n" == printed
    assert read_json(tiny_run / "results.json")["splits"]["test"]["methods"]["resmem"]["hyperparameters"]["k"] > 0


def test_an_empty_text_and_an_unfinished_run_are_errors(tiny_run, tmp_path):
    with pytest.raises(UserError, match="the text is empty: give a text"):
        inspect(Run(tiny_run), " ")
    with pytest.raises(UserError, match="is not UTF-8"):
        inspect(Run(tiny_run), "caf\udce9")
    with pytest.raises(UserError, match="the stage index has not finished"):
        inspect(Run(tmp_path), "text")


def test_the_sources_of_a_prediction_are_printed_in_points():
    influence = {"probability": 0.823, "neighbors": 0.001, "exact": 0.312, "document": -0.04}
    assert format_influence(influence) == "82 (exact match +31, document -4)"
    assert format_influence({"probability": 0.5, "neighbors": 0.0}) == "50"
