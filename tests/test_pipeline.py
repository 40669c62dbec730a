"""The whole pipeline, end to end, on a tiny configuration."""

import json
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from resmem_lm.cli import main
from resmem_lm.evaluation.neighbors import open_queries
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.memory.encoder import Encoder, query_head
from resmem_lm.memory.exact_index import ExactIndex
from resmem_lm.model.checkpoints import load_model
from resmem_lm.report.tables import METHOD_TITLES
from resmem_lm.resmem import merge_sparse, neighbor_weights, predict
from resmem_lm.text.shards import read_shard, shard_paths
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.workdir.run import Run
from tests.tiny import arguments, shard_folder


def stamps(workdir):
    """Return the times of all files but those that every command writes."""
    rewritten = ("config.gin", "config.json", ".lock")
    return {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file() and p.name not in rewritten}


def test_results_have_every_number_and_agree_with_each_other(tiny_run):
    results = json.loads((tiny_run / "results.json").read_text())
    test = results["splits"]["test"]
    assert list(test["methods"]) == list(METHOD_TITLES)
    assert all(test["methods"][name]["perplexity"] > 1 for name in ("deepnet", "knnlm", "resmem_calibrated", "resmem_adaptive"))
    assert len(test["differences"]) == 5
    assert 0.9 <= test["recall_at_k"] <= 1
    deepnet = test["methods"]["deepnet"]["accuracy"]
    for method in test["methods"].values():
        assert method["accuracy"] == pytest.approx(deepnet + method["gain"])
        assert method["gain"] == pytest.approx(method["tpr"] - method["fpr"])
        for value, interval in (("accuracy", "accuracy_ci95"), ("gain", "gain_ci95")):
            assert method[interval][0] <= method[value] + 1e-9
            assert method[value] <= method[interval][1] + 1e-9
        assert method["certified"] > 0.99
    assert test["methods"]["resmem_lambda1"]["hyperparameters"]["lambda"] == 1
    assert test["methods"]["resmem_paper"]["hyperparameters"] == {"k": 12, "sigma": 1, "temperature": 1, "lambda": 1}
    assert set(results["seconds"]) == {"documents", "vocabulary", "train", "build", "index", "search"}
    assert results["datastore"]["rows"] == open_datastore(tiny_run / "datastore").rows
    assert "jax" in results["versions"]
    assert (tiny_run / "report.html").stat().st_size > 10_000


def test_tuned_methods_are_best_on_validation(tiny_run):
    methods = json.loads((tiny_run / "results.json").read_text())["splits"]["validation"]["methods"]
    assert methods["resmem"]["accuracy"] >= methods["resmem_lambda1"]["accuracy"]
    assert methods["knnlm"]["accuracy"] >= methods["knn"]["accuracy"]


def test_deepnet_in_the_table_has_the_predictions_of_the_model(tiny_run):
    queries = open_queries(Run(tiny_run), "test")
    model, vocabulary = load_model(tiny_run / "checkpoints"), load_vocabulary(Run(tiny_run))
    tokens = [vocabulary.encode(d.text) for shard in shard_paths(Run(tiny_run), "test") for d in read_shard(shard)]
    predictions = np.empty(sum(map(len, tokens)), np.int64)
    encoder = Encoder(model, open_datastore(tiny_run / "datastore").binding.window, query_head)
    for positions, (_, hidden) in encoder(tokens):
        predictions[positions] = np.asarray(model.logits(model.parameters, jnp.asarray(hidden))).argmax(-1)
    accuracy = json.loads((tiny_run / "results.json").read_text())["splits"]["test"]["methods"]["deepnet"]["accuracy"]
    assert accuracy == pytest.approx(np.mean(predictions == queries.tokens))
    np.testing.assert_array_equal(queries.tokens, np.concatenate(tokens))


def test_remark_3_2_training_tokens_as_queries_with_one_neighbor_are_all_right(tiny_run):
    """Omit rows with equal keys and different tokens (the first tokens of documents), because no method can separate them."""
    model, vocabulary = load_model(tiny_run / "checkpoints"), load_vocabulary(Run(tiny_run))
    datastore = open_datastore(tiny_run / "datastore")
    tokens = vocabulary.encode_documents(read_shard(shard_paths(Run(tiny_run), "train")[0]))
    keys = np.empty((sum(map(len, tokens)), model.config.emb_dim), np.float32)
    hidden = np.empty_like(keys)
    for positions, (some_keys, some_hidden) in Encoder(model, datastore.binding.window, query_head)(tokens):
        keys[positions], hidden[positions] = some_keys, some_hidden
    rows, distances = ExactIndex(datastore).search(keys, 2)
    alone = distances[:, 1] > 2 * distances[:, 0] + 0.02
    assert alone.mean() > 0.8
    assert (rows[alone, 0] == np.flatnonzero(alone)).all()

    logits = np.asarray(model.logits(model.parameters, jnp.asarray(hidden)))
    base = np.exp(logits - logits.max(-1, keepdims=True))
    base /= base.sum(-1, keepdims=True)
    scores = merge_sparse(
        jnp.asarray(base),
        neighbor_weights(jnp.asarray(distances[:, :1]), 0.01),
        *map(jnp.asarray, datastore.residuals(rows[:, :1])),
    )
    assert (np.asarray(predict(scores)) == np.concatenate(tokens))[alone].all()


def test_a_second_run_changes_no_file(tiny_copy, capsys):
    before = stamps(tiny_copy)
    assert main(["run", *arguments(tiny_copy.parent, tiny_copy)[:1], f"--workdir={tiny_copy}", text_of(tiny_copy)]) == 0
    assert stamps(tiny_copy) == before
    assert "ResMem" in capsys.readouterr().out


def text_of(workdir):
    """Return the --gin.TEXT of the run."""
    line = next(line for line in (workdir / "config.gin").read_text().splitlines() if line.startswith("prepare_documents.text"))
    return f"--gin.TEXT={line.split(' = ')[1]}"


def test_the_written_configuration_reproduces_the_results_step_by_step(tiny_run, tmp_path):
    for command in ("train", "build", "index", "evaluate", "report"):
        assert main([command, f"--gin_file={tiny_run / 'config.gin'}", f"--workdir={tmp_path}"]) == 0
    first, second = (json.loads((w / "results.json").read_text()) for w in (tiny_run, tmp_path))
    assert first["splits"]["test"]["methods"]["deepnet"] == second["splits"]["test"]["methods"]["deepnet"]
    assert first["splits"]["test"]["methods"]["resmem"]["accuracy"] == second["splits"]["test"]["methods"]["resmem"]["accuracy"]


def test_changed_evaluation_settings_rerun_the_evaluation_only(tiny_copy):
    before = stamps(tiny_copy)
    command = [f"--gin_file={tiny_copy.parent / 'tiny.gin'}", f"--workdir={tiny_copy}", text_of(tiny_copy)]
    assert main(["run", *command, "--gin.evaluate.ks=(1, 2)"]) == 0
    changed = {str(path.relative_to(tiny_copy)) for path, stamp in stamps(tiny_copy).items() if before.get(path) != stamp}
    assert changed == {"gates.npz", "results.json", "report.html", "stages/evaluate.json", "stages/report.json"}


def damage_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "setting", "message"),
    [
        (None, "--gin.train.steps=31", "train.steps = 30, now it is 31"),
        (None, "--gin.search.neighbors=10", "search.neighbors"),
        (lambda w: damage_a_byte(shard_folder(w, 1) / "quantized_residuals.npy"), "--gin.evaluate.ks=(1,)", "was altered"),
        (lambda w: os.truncate(shard_folder(w, 1) / "quantized_keys.npy", 999), "--gin.evaluate.ks=(1,)", "has 999 bytes"),
        (lambda w: shutil.rmtree(w / "neighbors"), "--gin.evaluate.ks=(1, 4, 12, 50)", "neighbors is missing although"),
    ],
)
def test_conflicting_settings_and_damaged_files_are_refused_in_one_line(tiny_copy, capsys, change, setting, message):
    if change:
        change(tiny_copy)
    before = stamps(tiny_copy)
    command = [f"--gin_file={tiny_copy.parent / 'tiny.gin'}", f"--workdir={tiny_copy}", text_of(tiny_copy)]
    assert main(["run", *command, setting]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert {k: v for k, v in stamps(tiny_copy).items() if k.name != "evaluate.json"} == {
        k: v for k, v in before.items() if k.name != "evaluate.json"
    }


def test_more_neighbors_than_rows_are_refused(tiny_copy, capsys):
    for name in ("stages/search.json", "stages/evaluate.json"):
        (tiny_copy / name).unlink()
    command = [f"--gin_file={tiny_copy.parent / 'tiny.gin'}", f"--workdir={tiny_copy}", text_of(tiny_copy)]
    assert main(["evaluate", *command, "--gin.search.neighbors=10000000"]) == 2
    assert "rows: take 1 to" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_datastore_of_another_checkpoint_is_refused(tiny_copy, capsys):
    command = [f"--gin_file={tiny_copy.parent / 'tiny.gin'}", f"--workdir={tiny_copy}", text_of(tiny_copy), "--gin.train.seed=1"]
    for path in [tiny_copy / "stages/train.json", *(tiny_copy / "checkpoints").glob("*/**/*"), tiny_copy / "checkpoints/model.json"]:
        if path.is_file():
            path.unlink()
    subprocess.run(["rm", "-r", str(tiny_copy / "checkpoints")], check=True)
    assert main(["train", *command]) == 0
    assert main(["build", *command]) == 2
    assert "was made from another train" in capsys.readouterr().err.strip().splitlines()[-1]


def test_importing_the_command_does_not_import_tensorflow():
    code = "import sys, resmem_lm.commands; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
