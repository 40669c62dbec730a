"""A model with a memory of a text that it was not trained on."""

import json
import shutil

import numpy as np
import pytest

from resmem_lm.errors import UserError
from resmem_lm.maintenance.verify import verify
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.model.checkpoints import load_model
from resmem_lm.studies.shift import TITLES, begin_from, right_predictions, study_shift
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import files_below, read_json, remove, write_json
from tests.tiny import sentences

SETTINGS = {"shards": 2, "steps": 12, "learning_rates": (0.0001, 0.05)}


def write_other(path, word):
    """Write a second text: the same sentences with other words."""
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(sentences(50)):
            file.write(json.dumps({"text": f"{word} {number}: {text.replace('The', word).replace('the', 'no')}"}) + "\n")
    return str(path)


def rows_of(workdir):
    return read_json(workdir / "studies/shift/results.json")["rows"]


def memory_of(workdir):
    return max((workdir / "derived/shift").glob("memory-*"), key=lambda path: path.stat().st_ctime_ns)


def tuned_of(workdir):
    return sorted((memory_of(workdir) / "derived/fine-tuned").glob("*-steps-at-*"))


@pytest.fixture(scope="module")
def studied(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shift")
    shutil.copytree(tiny_run, folder / "run", symlinks=True)
    study_shift(folder / "run", text=write_other(folder / "other.jsonl", "Some"), **SETTINGS)
    return folder / "run"


@pytest.fixture
def copy(studied, tmp_path):
    shutil.copytree(studied.parent, tmp_path / "shift", symlinks=True)
    return tmp_path / "shift/run"


def test_the_run_s_model_has_a_memory_of_the_second_text(studied):
    memory = memory_of(studied)
    assert load_model(memory / "checkpoints").fingerprint == load_model(studied / "checkpoints").fingerprint
    documents = [d["id"] for shard in range(2) for d in open_datastore(memory / "datastore").documents(shard)]
    assert len(documents) == read_json(memory / "stages/documents.json")["result"]["documents"]["train"]
    assert all("other.jsonl" in name for name in documents)
    assert [verify(Run(workdir)) for workdir in (studied, memory, *tuned_of(studied))] == [[]] * 4


def test_rows_equal_the_evaluation_of_the_memory_and_the_best_fine_tuned_model(studied):
    *rows, fine_tuned = rows_of(studied)
    memory = memory_of(studied)
    methods = read_json(memory / "results.json")["splits"]["test"]["methods"]
    for row, name in zip(rows, TITLES, strict=True):
        assert row["second text, %"] == pytest.approx(100 * methods[name]["accuracy"])
    window = open_datastore(memory / "datastore").binding.window
    models = [load_model(path / "checkpoints") for path in tuned_of(studied)]
    accuracy = [right_predictions(model, Run(memory), "validation", window)[0].mean() for model in models]
    chosen = models[int(np.argmax(accuracy))]
    for column, workdir in (("second text, %", memory), ("first text, %", studied)):
        assert fine_tuned[column] == pytest.approx(100 * right_predictions(chosen, Run(workdir), "test", window)[0].mean())
    assert fine_tuned["gain, %"] == pytest.approx(fine_tuned["second text, %"] - rows[0]["second text, %"])
    assert "12 steps" in fine_tuned["method"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_deepnet_has_the_accuracy_of_the_evaluation(tiny_run, split):
    window = open_datastore(tiny_run / "datastore").binding.window
    right, numbers = right_predictions(load_model(tiny_run / "checkpoints"), Run(tiny_run), split, window)
    found = read_json(tiny_run / "results.json")["splits"][split]
    assert (len(right), len(np.unique(numbers)), len(numbers)) == (found["tokens"], found["documents"], found["tokens"])
    assert right.mean() == pytest.approx(found["methods"]["deepnet"]["accuracy"])


def test_fine_tuning_begins_with_the_model_of_the_run_and_changes_it(studied, tmp_path):
    base = load_model(studied / "checkpoints")
    shutil.copytree(studied / "vocabulary", tmp_path / "vocabulary")
    begin_from(base, Run(tmp_path))
    before = {file: file.stat().st_mtime_ns for file in files_below(tmp_path)}
    begin_from(base, Run(tmp_path))
    assert {file: file.stat().st_mtime_ns for file in files_below(tmp_path)} == before
    assert load_model(tmp_path / "checkpoints").fingerprint == base.fingerprint
    fine_tuned = [load_model(path / "checkpoints").parameters["decoder"]["token_embedder"]["embedding"] for path in tuned_of(studied)]
    moved = [float(np.abs(x - base.parameters["decoder"]["token_embedder"]["embedding"]).mean()) for x in fine_tuned]
    assert 0 < moved[0] < moved[1]  # a larger learning rate moves parameters farther


def test_a_study_reuses_finished_work_and_another_text_has_another_memory(copy):
    text = read_json(copy / "stages/study-shift.json")["settings"]["text"]
    before = rows_of(copy)
    memory, tuned = memory_of(copy), tuned_of(copy)
    stamps = [(path / "stages/train.json").stat().st_mtime_ns for path in tuned]
    remove(copy / "stages/study-shift.json")
    study_shift(copy, text=text, **SETTINGS)
    assert rows_of(copy) == before
    assert [(path / "stages/train.json").stat().st_mtime_ns for path in tuned] == stamps
    study_shift(copy, text=[write_other(copy.parent / "third.jsonl", "Any")], **SETTINGS | {"learning_rates": [0.01]})
    assert memory_of(copy) != memory
    assert len(tuned_of(copy)) == 1
    assert any("third.jsonl" in document["id"] for document in open_datastore(memory_of(copy) / "datastore").documents(0))
    assert [(path / "stages/train.json").stat().st_mtime_ns for path in tuned] == stamps


def test_a_missing_text_deletes_nothing(copy):
    before = [(path, path.read_bytes()) for path in files_below(memory_of(copy))]
    with pytest.raises(UserError, match="no text found"):
        study_shift(copy, text="nowhere/*.tx", **SETTINGS)
    assert [(path, path.read_bytes()) for path, _ in before] == before


def test_the_steps_are_measured_once(copy):
    text = read_json(copy / "stages/study-shift.json")["settings"]["text"]
    settings = SETTINGS | {"text": text, "steps": None, "learning_rates": (0.05,)}
    memory = memory_of(copy)
    before = tuned_of(copy)
    for seconds in (0.1, 5.0):
        for stage in ("build", "index"):
            path = memory / "stages" / f"{stage}.json"
            write_json(path, read_json(path) | {"seconds": seconds})
        remove(copy / "stages/study-shift.json")
        study_shift(copy, **settings)
        assert rows_of(copy)[1]["seconds"] == 2 * seconds
    facts = read_json(memory / "derived/fine-tuned/steps.json")
    assert facts["seconds"] == 0.2
    assert facts["steps"] == max(1, round(0.2 / facts["seconds_per_step"]))
    assert {path.name for path in tuned_of(copy)} == {path.name for path in before} | {f"{facts['steps']}-steps-at-0.05"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "study_shift.steps = 0"),
        ({"learning_rates": ()}, "study_shift.learning_rates"),
        ({"learning_rates": (0.1, 0.0)}, "above 0"),
    ],
)
def test_unusable_settings_are_refused(tiny_run, settings, message):
    with pytest.raises(UserError, match=message):
        study_shift.function(Run(tiny_run), **settings)


def test_the_text_of_the_run_is_refused(tiny_run):
    text = read_json(tiny_run / "stages/documents.json")["settings"]["text"]
    with pytest.raises(UserError, match="name another"):
        study_shift.function(Run(tiny_run), text=text)
