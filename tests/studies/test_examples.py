import base64
import csv
import hashlib
import re

import numpy as np
import pytest

from resmem_lm.cli import main
from resmem_lm.errors import UserError
from resmem_lm.evaluation.candidates import DEEPNET, Setting
from resmem_lm.evaluation.examples import corrected_tokens
from resmem_lm.evaluation.neighbors import open_queries
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.maintenance.verify import verify
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.report.report import FILTER, write_report
from resmem_lm.studies.examples import study_examples
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json, remove, write_json
from tests.report.test_report import HOSTILE, Elements, page_of, some_results


def examples_of(workdir):
    return read_json(workdir / "studies/examples/results.json")["examples"]


def test_exactly_the_corrected_tokens_of_small_rank_are_shown(tiny_copy):
    study_examples(tiny_copy, examples=10_000, near=3)
    shown = examples_of(tiny_copy)
    chosen = read_json(tiny_copy / "results.json")["splits"]["test"]["methods"]["resmem"]["hyperparameters"]
    setting = Setting("resmem", *chosen.values())
    queries = open_queries(Run(tiny_copy), "test")
    found = SplitScorer("test", queries, open_datastore(tiny_copy / "datastore")).predict([DEEPNET, setting])
    corrected = (found[DEEPNET][0] != queries.tokens) & (found[setting][0] == queries.tokens)
    near = (np.sort(np.asarray(queries.candidate_logits)[:, :32], axis=1)[:, -3] <= np.asarray(queries.target_logits)) & corrected
    assert 0 < len(shown) == near.sum() < corrected.sum()
    for example in shown:
        assert example["target"] == example["resmem"] != example["deepnet"]
        assert 2 <= example["rank"] <= 3
        assert 0 < example["probability"] < 0.5
        assert {neighbor["token"] for neighbor in example["neighbors"]} <= {example["target"]}
        assert sum(neighbor["weight"] for neighbor in example["neighbors"]) <= 1 + 1e-6
    assert any(example["neighbors"] for example in shown)
    with (tiny_copy / "studies/examples/table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["document"], row["context"], row["token"]) for row in rows] == [(e["document"], e["context"], e["target"]) for e in shown]
    study_examples(tiny_copy, examples=4, near=3)
    few = examples_of(tiny_copy)
    assert len(few) == 4
    assert all(example in shown for example in few)


def test_the_neighbors_shown_add_most(tiny_run):
    queries, datastore = open_queries(Run(tiny_run), "test"), open_datastore(tiny_run / "datastore")
    setting = Setting("resmem", 12, 4.0, 1.0, 1.0)
    chosen = np.arange(len(queries.tokens))[::9]
    targets = np.asarray(queries.tokens)
    reordered = 0
    for query, example in zip(chosen, corrected_tokens(Run(tiny_run), queries, datastore, setting, targets, targets, chosen), strict=True):
        helps = np.asarray(queries.neighbor_tokens)[query] == targets[query]
        weights = np.exp(-np.asarray(queries.distances)[query] / setting.sigma)
        weights = (weights / weights.sum())[helps]
        p = np.exp(datastore.take("target_log_probability", np.asarray(queries.rows)[query][helps]).astype(np.float64))
        most = np.argsort(-weights * (1 - p), kind="stable")[:3]
        np.testing.assert_allclose([neighbor["weight"] for neighbor in example["neighbors"]], weights[most], rtol=1e-4)
        reordered += (np.diff(most) < 0).any()
    assert reordered > 0  # else the test would pass if the nearest were shown


def test_the_report_lists_the_examples_and_the_command_prints_their_number(tiny_copy, capsys):
    before = (tiny_copy / "report.html").read_text()
    assert "<script" not in before
    assert main(["study", "examples", f"--workdir={tiny_copy}", "--gin.study_examples.examples=5"]) == 0
    assert "5 examples" in capsys.readouterr().out
    page = (tiny_copy / "report.html").read_text()
    section = page[page.index('class="filtered"') :]
    assert section.count('class="example"') == 5
    assert 'type="search"' in section
    assert verify(Run(tiny_copy)) == []
    assert read_json(tiny_copy / "results.json")["examples"] != examples_of(tiny_copy)
    remove(tiny_copy / "studies")
    assert main(["report", f"--gin_file={tiny_copy.parent / 'tiny.gin'}", f"--workdir={tiny_copy}", text_of(tiny_copy)]) == 0


def text_of(workdir):
    return f"--gin.TEXT='{read_json(workdir / 'stages/documents.json')['settings']['text']}'"


def write_some(workdir, examples):
    write_json(workdir / "studies/examples/results.json", {"title": "Examples", "text": "Some.", "rows": [], "examples": examples})
    write_json(workdir / "stages/study-examples.json", {"finished": True, "inputs": {}, "result": {}})


def test_only_the_script_of_the_page_may_run_and_text_stays_text(tmp_path):
    hostile = some_results()["examples"][0] | {"context": HOSTILE, "rank": 2, "probability": 0.25}
    write_some(tmp_path, [hostile])
    page = page_of(tmp_path, some_results())
    elements = Elements(page)
    assert [tag for tag, _ in elements.found].count("script") == 1
    assert HOSTILE in elements.text
    script = page[page.index("<script>") + len("<script>") : page.index("</script>")]
    assert script == FILTER
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'\"" in page
    assert page_of(tmp_path, some_results()) == page


def test_a_page_without_examples_has_no_script(tmp_path):
    write_json(tmp_path / "studies/other/results.json", {"title": "Other", "text": "Some.", "rows": [{"a": 1}]})
    page = page_of(tmp_path, some_results())
    assert "<script" not in page
    assert not re.search(r'class="filtered"', page)


def test_the_report_marks_a_corrected_token_without_a_neighbor_that_has_it(tiny_copy):
    datastore, queries = open_datastore(tiny_copy / "datastore"), open_queries(Run(tiny_copy), "test")
    chosen = read_json(tiny_copy / "results.json")["splits"]["test"]["methods"]["resmem"]["hyperparameters"]
    without = np.flatnonzero((np.asarray(queries.neighbor_tokens) != np.asarray(queries.tokens)[:, None]).all(axis=1))[:1]
    targets = np.asarray(queries.tokens)
    shown = corrected_tokens(Run(tiny_copy), queries, datastore, Setting.of("resmem", chosen), targets, targets, without)
    assert [example["neighbors"] for example in shown] == [[]]
    results = read_json(tiny_copy / "results.json")
    write_json(tiny_copy / "results.json", results | {"examples": shown})
    remove(tiny_copy / "stages/report.json")
    write_report(tiny_copy)
    assert "no neighbor has the target" in (tiny_copy / "report.html").read_text()


def test_no_examples_give_an_empty_list(tmp_path):
    write_some(tmp_path, [])
    assert 'class="filtered"' in page_of(tmp_path, some_results())


@pytest.mark.parametrize("settings", [{"near": 1}, {"near": 33}, {"examples": 0}])
def test_unusable_settings_are_refused(tiny_run, settings):
    with pytest.raises(UserError, match=f"study_examples.{next(iter(settings))}"):
        study_examples.function(Run(tiny_run), **settings)
