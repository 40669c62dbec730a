import pytest

from beam_pipelines.build_datastore import build_datastore
from resmem_lm.errors import UserError
from resmem_lm.maintenance.append import append
from resmem_lm.maintenance.verify import verify
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.model.checkpoints import load_model
from resmem_lm.studies.derived import derive
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json, write_json

COMMON = ("documents", "vocabulary", "train")


def test_a_derived_work_directory_continues_from_the_copied_stages(tiny_copy):
    derived = derive(Run(tiny_copy), "some/other", COMMON)
    assert load_model(derived.checkpoints).fingerprint == load_model(tiny_copy / "checkpoints").fingerprint
    build_datastore(derived, **Run(tiny_copy).finished("build")["settings"] | {"entries": 4})
    assert open_datastore(derived.datastore).binding.entries == 4
    assert derive(Run(tiny_copy), "some/other", COMMON) == derived
    assert (derived.path / "datastore/manifest.json").exists()
    assert verify(derived) == []
    assert verify(Run(tiny_copy)) == []


def test_a_copy_of_other_results_is_replaced(tiny_copy):
    derived = derive(Run(tiny_copy), "some", COMMON)
    (derived.path / "old").write_text("old")
    record = read_json(tiny_copy / "stages/train.json")
    write_json(tiny_copy / "stages/train.json", record | {"result": {"fingerprint": "another"}})
    assert not (derive(Run(tiny_copy), "some", COMMON).path / "old").exists()


def test_a_copy_of_fewer_documents_is_replaced(tiny_copy):
    derived = derive(Run(tiny_copy), "some", COMMON)
    (derived.path / "old").write_text("old")
    (tiny_copy / "more.txt").write_text("Another document, with other words than those before it: nothing of it was there.")
    append(Run(tiny_copy), [str(tiny_copy / "more.txt")])
    assert derive(Run(tiny_copy), "some", COMMON) == derived
    assert not (derived.path / "old").exists()
    assert read_json(derived.path / "documents/manifest.json") == read_json(tiny_copy / "documents/manifest.json")
    (derived.path / "old").write_text("old")
    derive(Run(tiny_copy), "some", COMMON)
    assert (derived.path / "old").exists()


def test_a_stage_that_has_not_finished_is_an_error(tmp_path):
    with pytest.raises(UserError, match="the stage documents has not finished"):
        derive(Run(tmp_path), "some", COMMON)
