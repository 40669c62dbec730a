import json
import shutil

import numpy as np
import pytest

from beam_pipelines.build_index import build_index
from resmem_lm.cli import main
from resmem_lm.errors import UserError
from resmem_lm.evaluation.neighbors import open_queries
from resmem_lm.maintenance import compact as compact_module
from resmem_lm.maintenance import delete as delete_module
from resmem_lm.maintenance.compact import compact
from resmem_lm.maintenance.delete import delete
from resmem_lm.maintenance.verify import verify
from resmem_lm.memory.datastore import datastore_summary, open_datastore
from resmem_lm.memory.exact_index import ExactIndex
from resmem_lm.memory.open_index import index_manifest, open_index
from resmem_lm.memory.schema import ARRAYS
from resmem_lm.text.shards import read_shard, shard_paths
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json, sha256, write_json


def ids_of(workdir, shard=1):
    return [d["id"] for d in open_datastore(workdir / "datastore").documents(shard)]


def rows_of(datastore, name):
    """Return the datastore rows of a document."""
    found = []
    for shard, offset in zip(range(len(datastore.shards)), datastore.offsets, strict=False):
        for d in datastore.documents(shard):
            if d["id"] == name:
                found += range(offset + d["first_row"], offset + d["first_row"] + d["rows"])
    return found


def evaluate_again(workdir):
    for command in ("index", "evaluate"):
        text = read_json(workdir / "stages/documents.json")["settings"]["text"]
        assert main([command, f"--gin_file={workdir.parent / 'tiny.gin'}", f"--workdir={workdir}", f"--gin.TEXT='{text}'"]) == 0


@pytest.fixture
def with_faiss(tiny_copy, monkeypatch):
    """Return a finished run with a faiss index in spite of few rows."""
    monkeypatch.setattr("resmem_lm.memory.faiss_index.SMALL", 16)
    shutil.rmtree(tiny_copy / "index")
    (tiny_copy / "stages/index.json").unlink()
    build_index(tiny_copy)
    return tiny_copy


@pytest.mark.parametrize("kind", ["faiss", "exact"])
def test_a_deleted_document_is_never_a_neighbor_even_of_its_own_keys(with_faiss, kind):
    tiny_copy = with_faiss
    before = open_datastore(tiny_copy / "datastore")
    name = ids_of(tiny_copy)[0]
    gone = rows_of(before, name)
    index, first = open_index(Run(tiny_copy), before, index_manifest(Run(tiny_copy), before), 0)
    index = index if kind == "faiss" else ExactIndex(before)
    keys = before.keys(np.array(gone))
    assert np.isin(index.search(keys, 12)[0], gone).any()
    assert delete(Run(tiny_copy), document=name) == {"documents": 1, "rows": len(gone)}

    datastore = open_datastore(tiny_copy / "datastore")
    index = (
        open_index(Run(tiny_copy), datastore, index_manifest(Run(tiny_copy), datastore), 0)[0] if kind == "faiss" else ExactIndex(datastore)
    )
    rows, distances = index.search(keys, 12)
    assert first == 0
    assert not np.isin(rows, gone).any()
    assert (rows >= 0).all()
    assert np.isfinite(distances).all()
    assert datastore.live_rows == before.rows - len(gone)


def test_k_neighbors_are_found_if_more_rows_are_deleted_than_faiss_proposes(with_faiss):
    tiny_copy = with_faiss
    for name in ids_of(tiny_copy, 0) + ids_of(tiny_copy, 1) + ids_of(tiny_copy, 2)[3:]:
        delete(Run(tiny_copy), document=name)
    datastore = open_datastore(tiny_copy / "datastore")
    index, _ = open_index(Run(tiny_copy), datastore, index_manifest(Run(tiny_copy), datastore), 0)
    keys = datastore.keys(np.arange(50))
    found, _ = index.search(keys, 12)
    assert (found >= 0).all()
    assert not datastore.is_deleted(found).any()


def test_outputs_that_may_show_a_deleted_document_are_removed(tiny_copy):
    name = ids_of(tiny_copy)[0]
    delete(Run(tiny_copy), document=name)
    assert not any((tiny_copy / place).exists() for place in ("neighbors", "results.json", "report.html", "stages/search.json"))
    assert name not in [d.id for path in shard_paths(Run(tiny_copy), "train") for d in read_shard(path)]
    assert verify(Run(tiny_copy)) == []
    evaluate_again(tiny_copy)
    datastore = open_datastore(tiny_copy / "datastore")
    for split in ("validation", "test"):
        assert not datastore.is_deleted(np.asarray(open_queries(Run(tiny_copy), split).rows)).any()
    assert read_json(tiny_copy / "results.json")["datastore"]["rows"] == datastore.live_rows
    assert verify(Run(tiny_copy)) == []


def test_compact_removes_deleted_rows_from_the_files_and_keeps_the_others(tiny_copy):
    before = open_datastore(tiny_copy / "datastore")
    name = ids_of(tiny_copy)[1]
    kept = np.setdiff1d(np.arange(before.rows), rows_of(before, name))
    arrays = {array: before.take(array, kept) for array in ARRAYS}
    untouched = before.shards[0]["folder"]
    delete(Run(tiny_copy), document=name)
    evaluate_again(tiny_copy)
    wanted = read_json(tiny_copy / "results.json")
    assert compact(Run(tiny_copy)) == {"shards": 1, "rows_before": before.rows, "rows": len(kept)}
    after = open_datastore(tiny_copy / "datastore", checksums=True)
    assert after.rows == after.live_rows == len(kept)
    for array in ARRAYS:
        np.testing.assert_array_equal(np.asarray(after.array(array)), arrays[array])
    assert after.shards[0]["folder"] == untouched
    assert name not in [d["id"] for shard in range(3) for d in after.documents(shard)]
    assert len(list((tiny_copy / "datastore").glob("shard-*.????????"))) == 3
    evaluate_again(tiny_copy)
    assert read_json(tiny_copy / "results.json")["splits"] == wanted["splits"]
    assert verify(Run(tiny_copy)) == []
    assert compact(Run(tiny_copy))["shards"] == 0  # nothing left to do
    assert (tiny_copy / "results.json").exists()


def test_a_shard_with_only_deleted_documents_is_compacted_to_no_rows(tiny_copy):
    for name in ids_of(tiny_copy, 0):
        delete(Run(tiny_copy), document=name)
    compact(Run(tiny_copy))
    datastore = open_datastore(tiny_copy / "datastore", checksums=True)
    assert datastore.shards[0]["rows"] == 0
    assert len(np.asarray(datastore.array("quantized_keys"))) == datastore.rows
    evaluate_again(tiny_copy)
    assert verify(Run(tiny_copy)) == []


def test_a_source_is_a_file_or_a_folder_and_not_any_prefix(tiny_copy):
    name = ids_of(tiny_copy)[0]
    source = name.partition("#")[0]
    for other in (source[:-1], source + "x", source.rpartition(".")[0]):
        with pytest.raises(UserError, match="has no source"):
            delete(Run(tiny_copy), source=other)
    rows = open_datastore(tiny_copy / "datastore").rows
    assert delete(Run(tiny_copy), source=source.rpartition("/")[0])["rows"] == rows
    assert open_datastore(tiny_copy / "datastore").live_rows == 0


@pytest.mark.parametrize("moment", ["write_json", "remove_text", "datastore_summary"])
def test_a_delete_that_is_killed_completes_when_it_is_run_again(tiny_copy, monkeypatch, moment):
    name = ids_of(tiny_copy)[0]
    calls = []

    def killed(*args):
        calls.append(args)
        if moment != "write_json" or len(calls) == 2:  # between a shard's record and the manifest
            raise KeyboardInterrupt
        return real(*args)

    real = getattr(delete_module, moment)
    with monkeypatch.context() as patch:
        patch.setattr(delete_module, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            delete(Run(tiny_copy), document=name)
    assert not (tiny_copy / "neighbors").exists()
    delete(Run(tiny_copy), document=name)
    datastore = open_datastore(tiny_copy / "datastore")
    assert datastore.is_deleted(np.array(rows_of(datastore, name))).all()
    assert verify(Run(tiny_copy)) == []


def test_text_left_by_a_killed_delete_is_reported_and_removed_by_compact(tiny_copy, monkeypatch):
    name = ids_of(tiny_copy)[0]
    with monkeypatch.context() as patch:
        patch.setattr(delete_module, "remove_text", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            delete(Run(tiny_copy), document=name)
    Run(tiny_copy).update_result("build", datastore_summary(Run(tiny_copy)))
    (problem,) = verify(Run(tiny_copy))
    assert f"still has the text of {name!r}, which is deleted: run the same `resmem delete` again, or `resmem compact`" in problem
    compact(Run(tiny_copy))
    assert name not in [d.id for path in shard_paths(Run(tiny_copy), "train") for d in read_shard(path)]
    evaluate_again(tiny_copy)
    assert verify(Run(tiny_copy)) == []


def test_a_killed_compact_resumes(tiny_copy, monkeypatch):
    names = [ids_of(tiny_copy, shard)[0] for shard in range(3)]
    for name in names:
        delete(Run(tiny_copy), document=name)
    live = open_datastore(tiny_copy / "datastore").live_rows
    calls = []

    def killed(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    real = compact_module._without_deleted
    with monkeypatch.context() as patch:
        patch.setattr(compact_module, "_without_deleted", killed)
        with pytest.raises(KeyboardInterrupt):
            compact(Run(tiny_copy))
    assert open_datastore(tiny_copy / "datastore").live_rows == live
    assert compact(Run(tiny_copy))["shards"] == 1
    assert open_datastore(tiny_copy / "datastore", checksums=True).rows == live
    evaluate_again(tiny_copy)
    assert verify(Run(tiny_copy)) == []


def test_a_killed_compact_resumes_after_another_delete(tiny_copy, monkeypatch):
    first, second = ids_of(tiny_copy, 0)[0], ids_of(tiny_copy, 1)[0]
    delete(Run(tiny_copy), document=first)
    with monkeypatch.context() as patch:
        patch.setattr(compact_module, "remove_derived", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compact(Run(tiny_copy))
    delete(Run(tiny_copy), document=second)
    live = open_datastore(tiny_copy / "datastore").live_rows
    assert compact(Run(tiny_copy))["shards"] == 2
    assert open_datastore(tiny_copy / "datastore", checksums=True).rows == live
    evaluate_again(tiny_copy)
    assert verify(Run(tiny_copy)) == []


def test_a_delete_that_is_killed_while_it_removes_text_without_rows_completes_when_it_is_run_again(tiny_copy, monkeypatch):
    path = shard_paths(Run(tiny_copy), "train")[2]
    document = read_shard(path)[0].id
    datastore = open_datastore(tiny_copy / "datastore")
    few = {"shards": datastore.shards[:1], "rows": datastore.shards[0]["rows"]}
    write_json(tiny_copy / "datastore/manifest.json", datastore.manifest | few)
    with monkeypatch.context() as patch:
        patch.setattr(delete_module, "write_bytes", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            delete(Run(tiny_copy), document=document)
    assert delete(Run(tiny_copy), document=document) == {"documents": 0, "rows": 0}
    assert document not in [d.id for d in read_shard(path)]
    assert read_json(tiny_copy / "documents/manifest.json")["files"][path.name]["sha256"] == sha256(path)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["delete", "--document=nobody"], "datastore has no document 'nobody'"),
        (["delete", "--source=nowhere"], "datastore has no source 'nowhere'"),
        (["delete", "--source="], "give either --document=ID or --source=..."),
        (["delete"], "give either --document=ID or --source=..."),
        (["delete", "--document=a", "--source=b"], "give either --document=ID or --source=..."),
    ],
)
def test_a_delete_without_a_match_is_an_error_of_one_line_and_removes_nothing(tiny_copy, capsys, command, message):
    assert main([*command, f"--workdir={tiny_copy}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("resmem: ")
    assert message in error
    assert (tiny_copy / "results.json").exists()


def test_text_is_also_removed_from_train_shards_without_rows(tiny_copy, tmp_path):
    document = read_shard(shard_paths(Run(tiny_copy), "train")[2])[0].id
    for place in ("datastore", "index", "neighbors"):
        shutil.rmtree(tiny_copy / place)
    for stage in ("build", "index", "search"):
        (tiny_copy / f"stages/{stage}.json").unlink()
    text = read_json(tiny_copy / "stages/documents.json")["settings"]["text"]
    command = [f"--gin_file={tiny_copy.parent / 'tiny.gin'}", f"--workdir={tiny_copy}", f"--gin.TEXT='{text}'"]
    assert main(["build", *command, "--gin.build_datastore.shards=1"]) == 0
    assert delete(Run(tiny_copy), document=document) == {"documents": 0, "rows": 0}
    assert document not in [d.id for path in shard_paths(Run(tiny_copy), "train") for d in read_shard(path)]


def test_delete_and_compact_without_a_work_directory_are_errors(tmp_path, capsys):
    for command in (["delete", "--document=a"], ["compact"]):
        assert main([*command, f"--workdir={tmp_path}"]) == 2
        assert "is not a work directory, because it has no stages/: name the directory of a run" in capsys.readouterr().err


def test_documents_of_validation_and_test_cannot_be_deleted(tiny_copy):
    held_out = json.loads(shard_paths(Run(tiny_copy), "test")[0].read_text().splitlines()[0])["id"]
    with pytest.raises(UserError, match="validation and test documents are not in it"):
        delete(Run(tiny_copy), document=held_out)
