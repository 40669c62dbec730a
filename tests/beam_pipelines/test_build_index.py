import os
import re
import shutil

import numpy as np
import pytest

from beam_pipelines.build_index import build_index
from resmem_lm.errors import UserError
from resmem_lm.maintenance.append import append
from resmem_lm.maintenance.delete import delete
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.memory.open_index import index_manifest, open_index
from resmem_lm.memory.suffix_index import open_suffixes
from resmem_lm.workdir.run import Run
from tests.tiny import index_memory_gib, shard_folder, write_corpus


def shard_rows(workdir):
    return [shard["rows"] for shard in open_datastore(workdir / "datastore").shards]


def folders(workdir):
    return sorted(path.name for path in (workdir / "index").glob("shard-*/"))


@pytest.fixture
def unindexed(tiny_copy, monkeypatch):
    """A run without an index. faiss writes files although there are few rows."""
    monkeypatch.setattr("resmem_lm.memory.faiss_index.SMALL", 16)
    shutil.rmtree(tiny_copy / "index")
    (tiny_copy / "stages/index.json").unlink()
    return tiny_copy


@pytest.mark.parametrize("kind", ["faiss", "scann", "exact"])
@pytest.mark.parametrize("fit", [1, 2])
def test_an_index_shard_covers_as_many_datastore_shards_as_the_memory_holds(unindexed, kind, fit):
    groups = [(0, 1), (1, 1), (2, 1)] if fit == 1 else [(0, 2), (2, 1)]
    found = build_index(unindexed, kind=kind, memory_gib=index_memory_gib(unindexed, fit, kind))
    datastore = open_datastore(unindexed / "datastore")
    assert [shard["rows"] for shard in found["shards"]] == [datastore.part(*group).rows for group in groups]
    manifest = index_manifest(Run(unindexed), datastore)
    assert sorted(shard["folder"] for shard in manifest["shards"]) == folders(unindexed)
    for number, (first, _) in enumerate(groups):
        index, first_row = open_index(Run(unindexed), datastore, manifest, number)
        keys = index.datastore.keys(np.arange(30))
        rows, distances = index.search(keys, 1)
        assert first_row == datastore.offsets[first]
        np.testing.assert_array_equal(distances, 0)
        np.testing.assert_array_equal(datastore.keys(rows + first_row)[:, 0], keys)


def test_the_memory_that_an_error_suggests_is_enough(unindexed):
    with pytest.raises(UserError, match=r"memory_gib = 1 is too small for the largest shard of the datastore, of \d+ rows") as caught:
        build_index(unindexed, memory_gib=1)
    assert f"of {max(shard_rows(unindexed))} rows" in str(caught.value)
    build_index(unindexed, memory_gib=float(re.search(r"take ([\d.]+)", str(caught.value))[1]))


def test_added_rows_leave_other_index_shards_as_they_are(unindexed, tmp_path):
    memory_gib = index_memory_gib(unindexed, 1)
    build_index(unindexed, memory_gib=memory_gib)
    before = folders(unindexed)
    write_corpus(tmp_path / "more.jsonl", documents=70)
    assert append(Run(unindexed), str(tmp_path / "more.jsonl"))["added"] > 0
    with pytest.raises(UserError, match="made from another datastore: run `resmem index`"):
        index_manifest(Run(unindexed), open_datastore(unindexed / "datastore"))
    build_index(unindexed, memory_gib=memory_gib)
    assert len(before) == 3
    assert set(before) < set(folders(unindexed))
    index_manifest(Run(unindexed), open_datastore(unindexed / "datastore"))


def test_shards_of_a_killed_build_are_kept_if_complete_and_removed_if_not(unindexed):
    memory_gib = index_memory_gib(unindexed, 1)
    build_index(unindexed, memory_gib=memory_gib)
    before = folders(unindexed)
    shutil.rmtree(unindexed / "index" / before[1])
    (unindexed / "index" / "shard-0123456789ab.0123abcd").mkdir()
    for name in ("index/index.json", "stages/index.json"):
        (unindexed / name).unlink()
    build_index(unindexed, memory_gib=memory_gib)
    after = folders(unindexed)
    assert len(after) == len(before)
    assert set(before) - set(after) == {before[1]}


def test_altered_keys_are_refused(unindexed):
    path = shard_folder(unindexed, 2) / "quantized_keys.npy"
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(UserError, match=r"quantized_keys.npy was altered: .* run `resmem build`"):
        build_index(unindexed)
    assert folders(unindexed) == []


@pytest.mark.parametrize("memory_gib", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_memory_is_refused(unindexed, memory_gib):
    with pytest.raises(UserError, match=r"memory_gib = .*: take a number above 0"):
        build_index(unindexed, memory_gib=memory_gib)


def test_the_suffix_index_has_the_tokens_of_live_rows_and_is_rebuilt_after_a_deletion(tiny_copy):
    run = Run(tiny_copy)
    datastore = open_datastore(run.datastore)
    (suffixes,) = open_suffixes(run, datastore, index_manifest(run, datastore))
    np.testing.assert_array_equal(suffixes.tokens, np.concatenate(datastore.shard_arrays("tokens")))
    assert sorted(suffixes.ends.tolist()) == list(range(datastore.rows - 1))

    delete(run, document=datastore.documents(0)[0]["id"])
    datastore = open_datastore(run.datastore)
    with pytest.raises(UserError, match="was built before documents were deleted: run `resmem index`"):
        open_suffixes(run, datastore, index_manifest(run, datastore))
    keys = {path.name for path in run.index.glob("shard-*")}
    build_index(run)
    (suffixes,) = open_suffixes(run, datastore, index_manifest(run, datastore))
    assert len(suffixes.tokens) == datastore.live_rows < datastore.rows
    assert {path.name for path in run.index.glob("shard-*")} == keys  # the index of the keys is kept


def test_an_index_without_a_suffix_index_is_refused(tiny_copy):
    run = Run(tiny_copy)
    datastore = open_datastore(run.datastore)
    manifest = {name: value for name, value in index_manifest(run, datastore).items() if name != "suffixes"}
    with pytest.raises(UserError, match=r"has no suffix index, because another version built it: delete .*index"):
        open_suffixes(run, datastore, manifest)
