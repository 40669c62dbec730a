import shutil

import numpy as np
import pytest

from beam_pipelines.build_datastore import build_datastore
from beam_pipelines.build_index import build_index
from beam_pipelines.runner import LOCAL_RUNNER
from beam_pipelines.search_neighbors import search
from resmem_lm.errors import UserError
from resmem_lm.evaluation.neighbors import open_queries
from resmem_lm.maintenance.append import append
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.text.shards import QUERY_SPLITS, group_numbers, read_shard, shard_content, shard_paths, write_manifest
from resmem_lm.text.sources import Document
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json
from tests.tiny import index_memory_gib, write_corpus


def arrays(workdir):
    return {
        (split, name): np.asarray(array) for split in QUERY_SPLITS for name, array in open_queries(Run(workdir), split)._asdict().items()
    }


def assert_same(found, expected):
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=str(name))


@pytest.fixture
def unsearched(tiny_copy):
    """A run without neighbors."""
    shutil.rmtree(tiny_copy / "neighbors")
    (tiny_copy / "stages/search.json").unlink()
    return tiny_copy


def kill_when_queries_are_encoded(workdir, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("beam_pipelines.search_neighbors.query_shards", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            search(workdir, neighbors=12)


def reindex(workdir, **settings):
    (workdir / "stages/index.json").unlink()
    return build_index(workdir, **settings)


@pytest.mark.parametrize("options", ["", f"--runner={LOCAL_RUNNER} --direct_num_workers=1"])
def test_an_index_in_several_shards_finds_the_same_neighbors(tiny_run, unsearched, options):
    """The index compares a query with every key because it has few rows."""
    assert len(reindex(unsearched, memory_gib=index_memory_gib(unsearched, 1))["shards"]) > 1
    found = search(unsearched, neighbors=12, pipeline_options=options)
    assert_same(arrays(unsearched), arrays(tiny_run))
    assert found["test"]["recall_at_k"] == 1
    names = {path.name for path in (unsearched / "neighbors").iterdir() if path.is_dir()}
    assert names == {
        shard["folder"] for split in QUERY_SPLITS for shard in read_json(unsearched / "neighbors/neighbors.json")[split]["shards"]
    }


def test_an_exact_index_finds_the_same_neighbors_and_their_tokens(tiny_run, unsearched):
    reindex(unsearched, kind="exact")
    search(unsearched, neighbors=12)
    datastore, expected, found = open_datastore(unsearched / "datastore"), arrays(tiny_run), arrays(unsearched)
    for split in QUERY_SPLITS:
        np.testing.assert_allclose(found[split, "distances"], expected[split, "distances"], rtol=1e-3)
        np.testing.assert_array_equal(datastore.take("tokens", found[split, "rows"]), found[split, "neighbor_tokens"])
        assert (np.diff(found[split, "distances"], axis=1) >= 0).all()


def test_a_search_for_fewer_neighbors_changes_the_result_of_the_stage(tiny_copy):
    before = read_json(tiny_copy / "stages/search.json")["result"]
    shutil.rmtree(tiny_copy / "neighbors")
    (tiny_copy / "stages/search.json").unlink()
    after = search(tiny_copy, neighbors=5)
    assert {name: after[name] for name in QUERY_SPLITS} == {name: before[name] for name in QUERY_SPLITS}
    assert after != before  # so that the evaluation runs again


def test_a_rebuilt_index_is_searched(tiny_copy):
    before = read_json(tiny_copy / "neighbors/neighbors.json")
    shutil.rmtree(tiny_copy / "index")
    reindex(tiny_copy, training_rows=1000)
    search(tiny_copy, neighbors=12)
    after = read_json(tiny_copy / "neighbors/neighbors.json")
    assert all(after[split]["shards"][0]["folder"] != before[split]["shards"][0]["folder"] for split in QUERY_SPLITS)


def test_encoded_queries_of_a_killed_search_are_not_used_with_projected_keys(unsearched, monkeypatch):
    kill_when_queries_are_encoded(unsearched, monkeypatch)
    for place in ("datastore", "index"):
        shutil.rmtree(unsearched / place)
    for stage in ("build", "index"):
        (unsearched / f"stages/{stage}.json").unlink()
    build_datastore(unsearched, window_length=32, window_context=8, entries=16, temperatures=(1.0, 1.4), key_dimensions=8)
    build_index(unsearched)
    assert search(unsearched, neighbors=12)["test"]["recall_at_k"] == 1


def test_encoded_queries_of_a_killed_search_are_not_used_for_other_documents(unsearched, monkeypatch):
    kill_when_queries_are_encoded(unsearched, monkeypatch)
    (path,) = shard_paths(Run(unsearched), "test")
    content = shard_content(read_shard(path)[1:]).encode()
    path.write_bytes(content)
    write_manifest(unsearched / "documents", {path.name: content})
    search(unsearched, neighbors=12)
    lengths = open_queries(Run(unsearched), "test").document_lengths
    assert lengths.tolist() == [len(tokens) for tokens in load_vocabulary(Run(unsearched)).encode_documents(read_shard(path))]


def test_documents_of_a_group_have_one_number_and_other_documents_their_own():
    documents = [Document("a", "one", "work"), Document("b", "two"), Document("work", "three"), Document("d", "four", "work")]
    numbers = group_numbers(documents)
    assert numbers[0] == numbers[3]
    assert len(set(numbers.tolist())) == 3


def test_a_search_without_a_query_to_compare_is_refused(unsearched):
    with pytest.raises(UserError, match="recall_queries = 0: take 1 or more"):
        search(unsearched, recall_queries=0)


def test_altered_tokens_of_the_datastore_are_refused(unsearched):
    path = next((unsearched / "datastore").glob("shard-*/tokens.npy"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokens.npy was altered"):
        search(unsearched, neighbors=12)


def test_published_neighbors_of_a_killed_search_are_kept(tiny_copy):
    before = arrays(tiny_copy)
    facts = read_json(tiny_copy / "neighbors/neighbors.json")
    (kept,), (lost,) = facts["validation"]["shards"], facts["test"]["shards"]
    shutil.rmtree(tiny_copy / "neighbors" / lost["folder"])
    (tiny_copy / "neighbors" / f"{kept['folder'].partition('.')[0]}.0123abcd").mkdir()
    (tiny_copy / "neighbors/neighbors.json").unlink()
    (tiny_copy / "stages/search.json").unlink()
    search(tiny_copy, neighbors=12)
    assert_same(arrays(tiny_copy), before)
    after = read_json(tiny_copy / "neighbors/neighbors.json")
    assert after["validation"] == facts["validation"]
    assert after["test"]["shards"][0]["folder"] != lost["folder"]
    assert len([path for path in (tiny_copy / "neighbors").iterdir() if path.is_dir()]) == 2


def test_added_rows_are_neighbors_after_index_and_search_run_again(tiny_copy, tmp_path):
    before, rows = arrays(tiny_copy), open_datastore(tiny_copy / "datastore").rows
    write_corpus(tmp_path / "more.jsonl", documents=90)
    append(Run(tiny_copy), str(tmp_path / "more.jsonl"))
    with pytest.raises(UserError, match="made from another datastore"):
        open_queries(Run(tiny_copy), "test")
    build_index(tiny_copy, **settings_of(tiny_copy, "index"))
    search(tiny_copy, **settings_of(tiny_copy, "search"))
    after = arrays(tiny_copy)
    for split in QUERY_SPLITS:
        assert (after[split, "rows"] >= rows).any()
        assert (after[split, "distances"] <= before[split, "distances"]).all()


def settings_of(workdir, stage):
    return read_json(workdir / "stages" / f"{stage}.json")["settings"]
