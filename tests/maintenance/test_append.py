import json
import shutil

import numpy as np
import pytest

from beam_pipelines import build_datastore as datastore_module
from resmem_lm.cli import main
from resmem_lm.errors import UserError
from resmem_lm.maintenance import append as module
from resmem_lm.maintenance.append import append
from resmem_lm.maintenance.delete import delete
from resmem_lm.maintenance.verify import verify
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.memory.schema import ARRAYS
from resmem_lm.text.shards import position, read_shard, shard_paths
from resmem_lm.workdir.artifacts import publish
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json, write_json

WORDS = ["amber", "basalt", "cedar", "dune", "ember", "fjord", "glacier", "harbor", "island", "jungle"]


@pytest.fixture
def more(tiny_copy):
    """Write nine new documents, a copy of one of them, an empty document, and a document of the test split."""
    test = json.loads(shard_paths(Run(tiny_copy), "test")[0].read_text().splitlines()[0])["text"]
    rng = np.random.default_rng(0)
    texts = [f"Letter {n}: " + " ".join(rng.choice(WORDS, 40)) for n in range(9)]
    path = tiny_copy.parent / "more.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, " ", test, texts[0]]))
    return path


def command(workdir, *rest):
    text = read_json(workdir / "stages/documents.json")["settings"]["text"]
    return [*rest, f"--gin_file={workdir.parent / 'tiny.gin'}", f"--workdir={workdir}", f"--gin.TEXT='{text}'"]


def test_new_documents_are_added_once_and_earlier_rows_are_unchanged(tiny_copy, more, capsys):
    before = open_datastore(tiny_copy / "datastore")
    arrays = {name: np.asarray(before.array(name)) for name in ARRAYS}
    assert main(command(tiny_copy, "build", f"--append={more}")) == 0
    assert "9 documents added; skipped: 2 near-duplicates, 1 empty, 0 of groups in validation or test" in capsys.readouterr().out
    after = open_datastore(tiny_copy / "datastore", checksums=True)
    assert after.rows > before.rows
    for name in ARRAYS:
        np.testing.assert_array_equal(np.asarray(after.array(name))[: before.rows], arrays[name])
    added = {d.id for path in shard_paths(Run(tiny_copy), "added") for d in read_shard(path)}
    assert added == {d["id"] for shard in range(3, len(after.shards)) for d in after.documents(shard)}
    assert len(added) == 9
    rows = after.rows
    assert append(Run(tiny_copy), str(more)) == {"added": 0, "empty": 1, "duplicate": 11, "held_out": 0, "rows": rows}

    assert main(command(tiny_copy, "evaluate")) == 2
    assert "run `resmem index`" in capsys.readouterr().err
    for stage in ("index", "evaluate"):
        assert main(command(tiny_copy, stage)) == 0
    assert read_json(tiny_copy / "results.json")["datastore"]["rows"] == rows
    assert main(command(tiny_copy, "build")) == 0  # finished
    assert open_datastore(tiny_copy / "datastore").rows == rows
    assert verify(Run(tiny_copy)) == []


def test_index_shards_of_old_rows_are_not_rebuilt_after_an_append(tiny_copy, more, monkeypatch):
    monkeypatch.setattr("beam_pipelines.build_index.group_shards", lambda rows, most: [(shard, 1) for shard in range(len(rows))])
    (tiny_copy / "stages/index.json").unlink()
    assert main(command(tiny_copy, "index")) == 0
    folders = {shard["folder"] for shard in read_json(tiny_copy / "index/index.json")["shards"]}
    append(Run(tiny_copy), str(more))
    assert main(command(tiny_copy, "index")) == 0
    after = {shard["folder"] for shard in read_json(tiny_copy / "index/index.json")["shards"]}
    assert len(folders) == 3
    assert folders < after


@pytest.mark.parametrize("moment", ["write_manifest", "encode_units", "datastore_summary"])
def test_a_killed_append_resumes(tiny_copy, more, monkeypatch, moment):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            append(Run(tiny_copy), str(more))
    append(Run(tiny_copy), str(more))
    datastore = open_datastore(tiny_copy / "datastore", checksums=True)
    assert sum(len(read_shard(path)) for path in shard_paths(Run(tiny_copy), "added")) == 9
    assert len(datastore.shards) > 3
    for stage in ("index", "evaluate", "report"):
        assert main(command(tiny_copy, stage)) == 0
    assert verify(Run(tiny_copy)) == []


def test_append_without_a_datastore_is_refused(tmp_path, more):
    with pytest.raises(UserError, match="the stage build has not finished"):
        append(Run(tmp_path), str(more))


def test_a_deleted_document_stays_deleted_if_an_abandoned_worker_publishes_its_shard_again(tiny_copy, more):
    datastore = open_datastore(tiny_copy / "datastore")
    record = datastore.shards[1]
    delete(Run(tiny_copy), document=datastore.documents(1)[0]["id"])
    live = open_datastore(tiny_copy / "datastore").live_rows
    with publish(tiny_copy / "datastore", "shard-00001-of-00003", record["provenance"]) as attempt:
        for file in (tiny_copy / "datastore" / record["folder"]).iterdir():
            shutil.copy(file, attempt.folder)
        attempt.facts |= {"rows": record["rows"], "counts": record["counts"]}
    added = append(Run(tiny_copy), str(more))
    datastore = open_datastore(tiny_copy / "datastore")
    assert datastore.live_rows == added["rows"] == live + sum(shard["rows"] for shard in datastore.shards[3:])
    for stage in ("index", "evaluate", "report"):
        assert main(command(tiny_copy, stage)) == 0
    assert verify(Run(tiny_copy)) == []


@pytest.mark.parametrize("moment", [(module, "encode_units"), (datastore_module, "write_manifest")])
def test_documents_of_a_killed_append_can_be_deleted(tiny_copy, more, monkeypatch, moment):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*moment, killed)
        with pytest.raises(KeyboardInterrupt):
            append(Run(tiny_copy), str(more))
    delete(Run(tiny_copy), source=f"{more}")
    append(Run(tiny_copy), str(tiny_copy.parent / "corpus.jsonl"))  # completes the killed append and adds nothing else
    assert open_datastore(tiny_copy / "datastore").live_rows == read_json(tiny_copy / "stages/build.json")["result"]["rows"]
    assert not [d for path in shard_paths(Run(tiny_copy), "added") for d in read_shard(path)]
    datastore = open_datastore(tiny_copy / "datastore")
    assert not [d for shard in range(3, len(datastore.shards)) for d in datastore.documents(shard)]


def test_documents_of_a_held_out_group_are_not_added(tiny_copy, tmp_path):
    record = read_json(tiny_copy / "stages/documents.json")
    record["settings"]["group"] = "work"
    write_json(tiny_copy / "stages/documents.json", record)
    path = tmp_path / "parts.jsonl"
    works = [f"work {n}" for n in range(30)]
    path.write_text(
        "".join(json.dumps({"text": f"A part of {work}, new and unlike others {work}.", "work": work}) + "\n" for work in works)
    )
    held_out = sum(position(work) < 0.2 for work in works)  # the fractions of tests.tiny
    found = append(Run(tiny_copy), str(path))
    assert found["held_out"] == held_out > 0
    assert found["added"] + found["duplicate"] == len(works) - held_out
    path.write_text(json.dumps({"text": "A part of no work."}) + "\n")
    with pytest.raises(UserError, match='has no field "work"'):
        append(Run(tiny_copy), str(path))


def test_documents_added_to_sampled_text_are_named_by_their_addresses(tiny_copy, more):
    record = read_json(tiny_copy / "stages/documents.json")
    record["settings"]["held_out"] = "c4-validation.json"
    write_json(tiny_copy / "stages/documents.json", record)
    page = tiny_copy.parent / "page.jsonl"
    page.write_text(json.dumps({"text": "A page that nobody has seen before, about nothing.", "url": "https://site/page"}) + "\n")
    append(Run(tiny_copy), str(page))
    assert delete(Run(tiny_copy), source="https://site")["documents"] == 1
