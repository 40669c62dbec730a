import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resmem_lm.errors import UserError
from resmem_lm.evaluation.neighbors import recall
from resmem_lm.memory import index as index_module
from resmem_lm.memory.datastore import Datastore, open_datastore
from resmem_lm.memory.exact_index import ExactIndex
from resmem_lm.memory.faiss_index import FILE
from resmem_lm.memory.index import SMALL, ApproximateIndex, Tree
from resmem_lm.memory.index_kinds import group_shards, index_bytes, index_memory, largest_index, library
from resmem_lm.memory.nearest import merge_nearest
from resmem_lm.memory.open_index import index_manifest, open_index
from resmem_lm.memory.quantization import quantize_keys
from resmem_lm.memory.scann_index import block
from resmem_lm.memory.schema import Binding, shard_name
from resmem_lm.text.windows import WindowSpec
from resmem_lm.workdir.artifacts import publish
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json, write_json

BINDING = Binding("model", "vocabulary", WindowSpec(32, 8), (1.0,), 16).to_json()


def write_keys(folder, keys, deleted=()):
    """Write a datastore of two shards with keys only. `deleted` has the deleted row ranges of the first shard."""
    shards = []
    for number, part in enumerate(np.split(keys, [len(keys) // 3])):
        with publish(folder, shard_name(number, 2), BINDING) as attempt:
            # Pad the keys to avoid a compilation for each shape.
            padded = np.pad(part, ((0, max(256, 1 << len(part).bit_length()) - len(part)), (0, 0)))
            for name, array in zip(("quantized_keys", "key_scales"), quantize_keys(jnp.asarray(padded)), strict=True):
                np.save(attempt.folder / f"{name}.npy", np.asarray(array)[: len(part)])
            attempt.facts |= {"rows": len(part), "deleted": [] if number else list(deleted)}
        shards.append(read_json(folder / f"{shard_name(number, 2)}.json"))
    return Datastore(folder, BINDING | {"shards": shards})


def clustered(rows, dimensions, *, one_norm=True):
    """Return clustered keys, as a language model has."""
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(200, dimensions))[rng.integers(0, 200, rows)] + 0.5 * rng.normal(size=(rows, dimensions))
    if one_norm:
        keys *= 8 / np.linalg.norm(keys, axis=1, keepdims=True)
    return keys.astype(np.float32)


def brute_force(keys, queries, k):
    distances = np.sqrt(((queries[:, None].astype(np.float64) - keys[None].astype(np.float64)) ** 2).sum(-1))
    rows = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return rows, np.take_along_axis(distances, rows, 1)


def test_exact_search_equals_brute_force_over_all_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("resmem_lm.memory.exact_index.EXACT_BLOCK", 100)
    monkeypatch.setattr("resmem_lm.memory.exact_index.QUERY_BLOCK", 8)
    keys, queries = clustered(700, 16, one_norm=False), clustered(20, 16)
    datastore = write_keys(tmp_path, keys)
    rows, distances = ExactIndex(datastore).search(queries, 9)
    expected_rows, expected_distances = brute_force(datastore.keys(np.arange(700)), queries, 9)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-4)


KINDS = ["faiss", "scann"]


def build(kind, datastore, folder, *, candidates=300, training_rows=10_000):
    folder.mkdir(exist_ok=True)
    return library(kind).build(datastore, folder, {"candidates": candidates, "training_rows": training_rows, "threads": 0})


def build_and_open(kind, datastore, folder, *, candidates=300, training_rows=10_000):
    if kind == "exact":
        return ExactIndex(datastore)
    facts = build(kind, datastore, folder, candidates=candidates, training_rows=training_rows)
    return ApproximateIndex(datastore, library(kind).Searcher(datastore, folder, facts), candidates)


@pytest.fixture
def few_are_indexed(monkeypatch):
    """Make faiss build an index of few rows."""
    monkeypatch.setattr("resmem_lm.memory.faiss_index.SMALL", 16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "one_norm"), [(3_000, True), (30_000, True), (30_000, False)])
def test_approximate_search_finds_nearly_all_exact_neighbors_at_true_distances(tmp_path, few_are_indexed, kind, rows, one_norm):
    keys = clustered(rows + 100, 64, one_norm=one_norm)
    datastore, queries = write_keys(tmp_path / "datastore", keys[100:]), keys[:100]
    found, distances = build_and_open(kind, datastore, tmp_path / "index").search(queries, 10)
    exact, exact_distances = ExactIndex(datastore).search(queries, 10)
    assert recall(found, exact) >= 0.95
    same = found == exact
    np.testing.assert_allclose(distances[same], exact_distances[same], rtol=1e-5)
    assert (np.diff(distances, axis=1) >= 0).all()


@pytest.mark.parametrize(("one_norm", "measure"), [(True, "dot_product"), (False, "squared_l2")])
def test_scann_uses_inner_products_if_all_norms_are_equal(tmp_path, one_norm, measure):
    assert build("scann", write_keys(tmp_path / "datastore", clustered(300, 16, one_norm=one_norm)), tmp_path)["measure"] == measure


@pytest.mark.parametrize("kind", KINDS)
def test_two_builds_of_an_index_find_the_same_neighbors(tmp_path, kind):
    """Use clusters of very different sizes, as a language model has. With them, k-means depends on its initial centers."""
    rng = np.random.default_rng(0)
    keys = clustered(30_000, 32)[(30_000 * rng.power(0.3, 30_000)).astype(int)]
    datastore = write_keys(tmp_path / "datastore", keys)
    found = [build_and_open(kind, datastore, tmp_path / name, candidates=20).search(keys[:300], 20) for name in ("first", "second")]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert recall(found[0][0], ExactIndex(datastore).search(keys[:300], 20)[0]) < 1  # the search is approximate, so the builds could differ


def test_two_builds_of_faiss_are_equal_in_every_byte(tmp_path):
    datastore = write_keys(tmp_path / "datastore", clustered(25_000, 16))
    files = []
    for name in ("first", "second"):
        build("faiss", datastore, tmp_path / name)
        files.append((tmp_path / name / FILE).read_bytes())
    assert files[0] == files[1]


def test_faiss_finds_neighbors_if_few_dimensions_have_most_of_the_variance(tmp_path):
    """Use keys like principal components."""
    keys = clustered(40_000, 32) * (0.7 ** np.arange(32, dtype=np.float32))
    datastore = write_keys(tmp_path / "datastore", keys)
    queries = keys[::200] + 0.01
    found = build_and_open("faiss", datastore, tmp_path / "index").search(queries, 20)[0]
    assert recall(found, ExactIndex(datastore).search(queries, 20)[0]) > 0.97


def test_leaves_with_too_few_rows_give_no_row_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("resmem_lm.memory.scann_index.tree", lambda *_: Tree(leaves=1000, probed=1, sample=10_000, rounds=12))
    keys = clustered(30_000, 32)
    datastore = write_keys(tmp_path / "datastore", keys)
    rows, distances = build_and_open("scann", datastore, tmp_path / "index", candidates=100).search(keys[:100], 100)
    assert (rows < 0).any()
    assert np.isinf(distances[rows < 0]).all()
    assert all(len(np.unique(row[row >= 0])) == (row >= 0).sum() for row in rows)


@pytest.mark.parametrize("spread", [1.0, 0.7], ids=["as much variance everywhere", "most in few dimensions"])
def test_the_probed_lists_of_faiss_are_few_and_have_the_neighbors(tmp_path, spread):
    keys = clustered(40_000, 32) * spread ** np.arange(32, dtype=np.float32)
    datastore = write_keys(tmp_path / "datastore", keys)
    facts, queries = build("faiss", datastore, tmp_path), keys[::200] + 0.01
    truth = ExactIndex(datastore).search(queries, 50)[0]
    found = {}
    for probe_radius in (facts["probe_radius"], np.inf):
        searcher = library("faiss").Searcher(datastore, tmp_path, facts | {"probe_radius": probe_radius})
        found[probe_radius] = ApproximateIndex(datastore, searcher, 1000).search(queries, 50)[0]
        counts = searcher.lists(searcher.rotation.apply(queries))[2]
        assert counts.min() >= 1
        assert counts.mean() == facts["leaves_to_search"] if np.isinf(probe_radius) else counts.mean() < 0.7 * facts["leaves_to_search"]
    assert recall(found[facts["probe_radius"]], truth) > recall(found[np.inf], truth) - 0.02


def test_faiss_accepts_keys_that_are_all_equal(tmp_path, few_are_indexed):
    datastore = write_keys(tmp_path / "datastore", np.zeros((200, 8), np.float32))
    rows, distances = build_and_open("faiss", datastore, tmp_path / "index").search(clustered(20, 8), 5)
    assert (rows >= 0).all()
    np.testing.assert_allclose(distances, np.linalg.norm(clustered(20, 8), axis=1, keepdims=True).repeat(5, axis=1), rtol=1e-5)


def test_faiss_probes_more_lists_if_they_have_too_few_rows(tmp_path, few_are_indexed, monkeypatch):
    monkeypatch.setattr("resmem_lm.memory.faiss_index.tree", lambda *_: Tree(leaves=100, probed=1, sample=3000, rounds=10))
    keys = clustered(3000, 16)
    rows, distances = build_and_open("faiss", write_keys(tmp_path / "datastore", keys), tmp_path / "index").search(keys[:100], 200)
    assert (rows >= 0).all()
    assert np.isfinite(distances).all()
    assert all(len(np.unique(row)) == 200 for row in rows)


@pytest.mark.parametrize("kind", ["exact", *KINDS])
def test_the_nearest_live_rows_are_found_and_deleted_rows_are_not(tmp_path, few_are_indexed, kind):
    keys = clustered(3000, 48)
    deleted, queries, k = np.r_[0:400, 500:900], keys[:50], 10
    datastore = write_keys(tmp_path / "datastore", keys, [[0, 400], [500, 400]])
    index = build_and_open(kind, datastore, tmp_path / "index", candidates=20 if kind == "scann" else 300)
    rows, distances = index.search(queries, k)
    assert not np.isin(rows, deleted).any()
    live = np.setdiff1d(np.arange(3000), deleted)
    expected, expected_distances = brute_force(datastore.keys(live), queries, k)
    # With few keys, ScaNN searches exactly. faiss compares codes.
    same = rows == live[expected]
    assert same.mean() > 0.97 if kind == "faiss" else same.all()
    np.testing.assert_allclose(distances[same], expected_distances[same], rtol=1e-3)


@pytest.mark.parametrize("kind", ["exact", *KINDS])
def test_fewer_than_k_live_rows_give_fewer_neighbors(tmp_path, few_are_indexed, kind):
    keys = clustered(60, 16)
    datastore = write_keys(tmp_path / "datastore", keys, [[0, 20]])
    rows, distances = build_and_open(kind, datastore, tmp_path / "index", candidates=20).search(keys[:5], 50)
    assert all(set(some.tolist()) == {-1, *range(20, 60)} for some in rows)
    assert np.isinf(distances[rows < 0]).all()
    assert np.isfinite(distances[rows >= 0]).all()


@settings(max_examples=15)
@given(
    rows=st.integers(16, 200),
    dimensions=st.sampled_from([1, 2, 3, 5]),
    k=st.sampled_from([1, 250]),
    training_rows=st.sampled_from([1, 10**6]),
    deleted=st.integers(0, 5),
)
def test_faiss_finds_each_row_once_for_any_number_of_rows_and_dimensions(rows, dimensions, k, training_rows, deleted):
    keys = np.random.default_rng(rows).normal(size=(rows, dimensions)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("resmem_lm.memory.faiss_index.SMALL", 16)
        datastore = write_keys(Path(folder) / "datastore", keys, [[0, deleted]])
        index = build_and_open("faiss", datastore, Path(folder) / "index", training_rows=training_rows)
        found, distances = index.search(keys[:3], k)
    live = rows - deleted
    assert found.shape == (min(3, rows), k)
    for some, far in zip(found, distances, strict=True):
        assert len(set(some[some >= 0].tolist())) == (some >= 0).sum() == min(k, live)
        assert np.isfinite(far[some >= 0]).all()
    assert not np.isin(found, np.arange(deleted)).any()


def test_faiss_writes_no_file_for_few_rows(tmp_path):
    datastore = write_keys(tmp_path / "datastore", clustered(300, 16))
    assert build("faiss", datastore, tmp_path / "index") == {}
    assert list((tmp_path / "index").iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dimensions", [32, 75])
def test_index_bytes_is_the_size_of_the_files(tmp_path, kind, dimensions):
    rows = SMALL + 5_001
    build(kind, write_keys(tmp_path / "datastore", clustered(rows, dimensions)), tmp_path / "index")
    found = sum(path.stat().st_size for path in (tmp_path / "index").iterdir())
    assert index_bytes(kind, rows, dimensions) == pytest.approx(found, rel=0.01)


def test_a_moved_index_still_opens(tiny_copy):
    datastore = open_datastore(tiny_copy / "datastore")
    keys = datastore.shard_keys(0, slice(20))
    index, first_row = open_index(Run(tiny_copy), datastore, index_manifest(Run(tiny_copy), datastore), 0)
    rows, _ = index.search(keys, 1)
    assert first_row == 0
    assert (rows[:, 0] < datastore.rows).all()


@pytest.mark.parametrize("kind", ["exact", *KINDS])
def test_the_neighbors_do_not_depend_on_the_number_of_cores(tmp_path, few_are_indexed, monkeypatch, kind):
    keys = clustered(3000, 16)
    index = build_and_open(kind, write_keys(tmp_path / "datastore", keys), tmp_path / "index")
    found = []
    for cores in (1, 2, 7):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        found.append(index.search(keys[:500] + 0.01, 20))
    for rows, distances in found[1:]:
        np.testing.assert_array_equal(rows, found[0][0])
        np.testing.assert_array_equal(distances, found[0][1])


@pytest.mark.parametrize("kind", KINDS)
def test_trees_grow_with_the_rows(kind):
    for rows in (20_000, 10**6, 10**9):
        found = library(kind).tree(rows, 512, 100_000)
        assert 8 <= found.probed <= found.leaves <= found.sample <= rows
    assert library(kind).tree(10**8, 512, 100_000).leaves > library(kind).tree(10**6, 512, 100_000).leaves


def test_scann_has_few_enough_codes_for_its_fast_path():
    assert all(-(-dimensions // block(dimensions)) <= 256 for dimensions in (32, 128, 512, 768, 1024))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [0, 4, 100, 2000, -1])
def test_a_damaged_index_or_one_of_another_datastore_is_refused(tmp_path, few_are_indexed, kind, cut):
    if kind == "scann" and cut > 4:
        pytest.skip("its files are smaller")
    datastore, folder = write_keys(tmp_path / "datastore", clustered(400, 16)), tmp_path / "index"
    provenance = {"folders": [shard["folder"] for shard in datastore.shards]}
    with publish(folder, "shard", provenance) as attempt:
        attempt.facts |= build(kind, datastore, attempt.folder) | {"rows": 400}
    manifest = {"kind": kind, "candidates": 300, "shards": [read_json(folder / "shard.json")]}
    write_json(folder / "index.json", manifest)
    assert isinstance(open_index(Run(tmp_path), datastore, index_manifest(Run(tmp_path), datastore), 0)[0], ApproximateIndex)
    for file in [*folder.glob("*/*.faiss"), *folder.glob("*/*.pb")]:
        file.write_bytes(file.read_bytes()[:cut] if kind == "faiss" else b"damaged")
    with pytest.raises(UserError, match="cannot be read") as caught:
        open_index(Run(tmp_path), datastore, manifest, 0)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"has \d+ bytes, its manifest has .* run `resmem index`"):
        index_manifest(Run(tmp_path), datastore)
    manifest["shards"][0]["provenance"]["folders"][1] = "shard-00001-of-00003.00000000"
    write_json(folder / "index.json", manifest)
    with pytest.raises(UserError, match="made from another datastore"):
        index_manifest(Run(tmp_path), datastore)


def test_scann_that_is_not_installed_is_an_error_with_the_command_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scann.scann_ops.py", None)
    with pytest.raises(UserError, match=r"pip install 'resmem_lm\[scann\]', or set build_index.kind = 'faiss'"):
        build("scann", write_keys(tmp_path / "datastore", clustered(100, 16)), tmp_path / "index")


SHARD_ROWS = st.lists(st.integers(0, 100), min_size=1, max_size=20)


@given(SHARD_ROWS, SHARD_ROWS, st.integers(1, 200))
def test_groups_are_consecutive_as_large_as_fits_and_stay_when_shards_are_added(rows, added, most):
    groups = group_shards(rows, most)
    assert [shard for first, shards in groups for shard in range(first, first + shards)] == list(range(len(rows)))
    sizes = [sum(rows[first : first + shards]) for first, shards in groups]
    assert all(size <= most or shards == 1 for size, (_, shards) in zip(sizes, groups, strict=True))
    assert all(size + rows[first] > most for size, (first, _) in zip(sizes, groups[1:], strict=False))
    longer = group_shards(rows + added, most)
    assert longer[: len(groups) - 1] == groups[:-1]
    assert longer[len(groups) - 1][0] == groups[-1][0]


# results of an index: each row once, many ties, and rows of -1 at infinite distances
FOUND = st.permutations(range(12)).flatmap(
    lambda rows: st.lists(st.sampled_from([0.5, 1.0, 2.0, np.inf]), min_size=12, max_size=12).map(lambda d: list(zip(rows, d, strict=True)))
)


@given(FOUND, st.sampled_from([1, 3, 4]), st.integers(1, 12))
def test_merging_equals_sorting_everything(found, parts, k):
    pairs = np.array([(distance, -1 if np.isinf(distance) else row) for row, distance in found])
    split = [(part[None, :, 1].astype(np.int64), part[None, :, 0].astype(np.float32)) for part in np.split(pairs, parts)]
    rows, distances = merge_nearest(split, k)
    expected = sorted(map(tuple, pairs.tolist()))[:k]
    assert list(zip(distances[0].tolist(), rows[0].tolist(), strict=True)) == expected


@given(st.sampled_from(KINDS), st.integers(1, 10**10), st.integers(1, 10**9), st.sampled_from([32, 128, 512]))
def test_an_index_of_the_most_rows_fits_and_one_more_does_not(kind, memory, more, emb):
    rows = largest_index(kind, memory, emb, 100_000)
    assert largest_index(kind, memory + more, emb, 100_000) >= rows
    assert rows == 0 or index_memory(kind, rows, emb, 100_000) <= memory
    # ScaNN stores whole keys if there are few rows, and smaller codes if there are more.
    fewer_bytes = kind == "scann" and index_bytes(kind, rows + 1, emb) < index_bytes(kind, rows, emb)
    assert index_memory(kind, rows + 1, emb, 100_000) > memory or fewer_bytes


def test_a_query_in_a_large_deleted_cluster_does_not_widen_the_search_of_scann_for_others(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    keys = clustered(7_500, 16)
    keys[:2500] = keys[0] + 1e-3 * rng.normal(size=(2500, 16))
    datastore = write_keys(tmp_path / "datastore", keys, [(0, 2500)])
    index = build_and_open("scann", datastore, tmp_path / "index", candidates=20, training_rows=1000)
    widths = []
    real = index_module.rank_candidates
    monkeypatch.setattr(
        index_module, "rank_candidates", lambda d, q, candidates, k: widths.append(candidates.shape[1]) or real(d, q, candidates, k)
    )
    rows, _ = index.search(np.concatenate([keys[:3], keys[5000:5010]]), 10)
    assert max(widths) == 20
    assert (rows >= 2500).all()
