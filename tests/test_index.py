import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmem_lm import index as index_module
from resmem_lm.codes import encode_keys
from resmem_lm.datastore import Binding, Datastore, open_datastore, shard_name
from resmem_lm.errors import UserError
from resmem_lm.index import (
    ExactIndex,
    ScannIndex,
    build_scann,
    group_shards,
    index_bytes,
    index_manifest,
    index_memory,
    largest_index,
    merge_nearest,
    open_index,
    scann_parameters,
)
from resmem_lm.published import publish
from resmem_lm.search import recall
from resmem_lm.storage import read_json, write_json
from resmem_lm.windows import WindowSpec

BINDING = Binding("model", "vocabulary", WindowSpec(32, 8), (1.0,), 16).to_json()


def write_keys(folder, keys, forgotten=()):
    """Just the keys of a datastore, in two shards; `forgotten` are ranges of rows of the first."""
    shards = []
    for number, part in enumerate(np.split(keys, [len(keys) // 3])):
        with publish(folder, shard_name(number, 2), BINDING) as attempt:
            for name, array in zip(("key_codes", "key_scales"), encode_keys(jnp.asarray(part)), strict=True):
                np.save(attempt.folder / f"{name}.npy", array)
            attempt.facts |= {"rows": len(part), "forgotten": [] if number else list(forgotten)}
        shards.append(read_json(folder / f"{shard_name(number, 2)}.json"))
    return Datastore(folder, BINDING | {"shards": shards})


def clustered(rows, dimensions, *, one_norm=True):
    """Keys in clusters, as a language model's are."""
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(200, dimensions))[rng.integers(0, 200, rows)] + 0.5 * rng.normal(size=(rows, dimensions))
    if one_norm:
        keys *= 8 / np.linalg.norm(keys, axis=1, keepdims=True)
    return keys.astype(np.float32)


def brute_force(keys, queries, k):
    distances = np.sqrt(((queries[:, None].astype(np.float64) - keys[None].astype(np.float64)) ** 2).sum(-1))
    rows = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return rows, np.take_along_axis(distances, rows, 1)


def test_exact_search_is_brute_force_over_all_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("resmem_lm.index.EXACT_BLOCK", 100)
    monkeypatch.setattr("resmem_lm.index.QUERY_BLOCK", 8)
    keys, queries = clustered(700, 16, one_norm=False), clustered(20, 16)
    datastore = write_keys(tmp_path, keys)
    rows, distances = ExactIndex(datastore).search(queries, 9)
    expected_rows, expected_distances = brute_force(datastore.keys(np.arange(700)), queries, 9)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-4)


@pytest.mark.parametrize(("rows", "one_norm"), [(3_000, True), (30_000, True), (30_000, False)])
def test_scann_finds_nearly_all_that_exact_search_finds_at_true_distances(tmp_path, rows, one_norm):
    keys = clustered(rows + 100, 64, one_norm=one_norm)
    datastore, queries = write_keys(tmp_path / "datastore", keys[100:]), keys[:100]
    facts = build_scann(datastore, tmp_path, 200, 10_000)
    assert facts["measure"] == ("dot_product" if one_norm else "squared_l2")
    found, distances = ScannIndex(datastore, tmp_path, 200).search(queries, 10)
    exact, exact_distances = ExactIndex(datastore).search(queries, 10)
    assert recall(found, exact) >= 0.95
    same = found == exact
    np.testing.assert_allclose(distances[same], exact_distances[same], rtol=1e-5)
    assert (np.diff(distances, axis=1) >= 0).all()


def test_two_builds_of_an_index_find_the_same(tmp_path):
    """Clusters of very different sizes, some of one point only, as a language model's keys are: random centres would end elsewhere."""
    rng = np.random.default_rng(0)
    keys = clustered(30_000, 32)[(30_000 * rng.power(0.3, 30_000)).astype(int)]
    datastore = write_keys(tmp_path / "datastore", keys)
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        build_scann(datastore, tmp_path / name, 20, 10_000)
        found.append(ScannIndex(datastore, tmp_path / name, 20).search(keys[:300], 20))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert recall(found[0][0], ExactIndex(datastore).search(keys[:300], 20)[0]) < 1  # so that it could differ


def test_leaves_that_hold_too_few_rows_give_no_row_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("resmem_lm.index.scann_parameters", lambda rows, dimensions: {"leaves": 1000, "leaves_to_search": 1, "block": 2})
    keys = clustered(30_000, 32)
    datastore = write_keys(tmp_path / "datastore", keys)
    build_scann(datastore, tmp_path, 100, 10_000)
    rows, distances = ScannIndex(datastore, tmp_path, 100).search(keys[:100], 100)
    assert (rows < 0).any()
    assert np.isinf(distances[rows < 0]).all()
    assert all(len(np.unique(row[row >= 0])) == (row >= 0).sum() for row in rows)


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_forgotten_rows_are_passed_over_and_the_next_nearest_are_found(tmp_path, kind):
    keys = clustered(3000, 16)
    forgotten, queries, k = np.r_[0:400, 500:900], keys[:50], 10
    datastore = write_keys(tmp_path / "datastore", keys, [[0, 400], [500, 400]])
    build_scann(datastore, tmp_path, 20, 1000)
    index = ExactIndex(datastore) if kind == "exact" else ScannIndex(datastore, tmp_path, 20)
    rows, distances = index.search(queries, k)
    remembered = np.setdiff1d(np.arange(3000), forgotten)
    expected, expected_distances = brute_force(datastore.keys(remembered), queries, k)
    np.testing.assert_array_equal(rows, remembered[expected])
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-3)


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_where_too_few_rows_are_remembered_there_are_fewer_neighbours(tmp_path, kind):
    keys = clustered(60, 16)
    datastore = write_keys(tmp_path / "datastore", keys, [[0, 20]])
    build_scann(datastore, tmp_path, 20, 1000)
    index = ExactIndex(datastore) if kind == "exact" else ScannIndex(datastore, tmp_path, 20)
    rows, distances = index.search(keys[:5], 50)
    assert all(set(some.tolist()) == {-1, *range(20, 60)} for some in rows)
    assert np.isinf(distances[rows < 0]).all()
    assert np.isfinite(distances[rows >= 0]).all()


def test_a_moved_index_still_opens(tiny_copy):
    datastore = open_datastore(tiny_copy / "datastore")
    keys = datastore.shard_keys(0, slice(20))
    index, first_row = open_index(tiny_copy, datastore, index_manifest(tiny_copy, datastore), 0)
    rows, _ = index.search(keys, 1)
    assert first_row == 0
    assert (rows[:, 0] < datastore.rows).all()


def test_parameters_keep_scanns_fast_path_and_grow_with_the_rows():
    for rows in (20_000, 10**6, 10**9):
        for dimensions in (32, 128, 512, 768, 1024):
            found = scann_parameters(rows, dimensions)
            assert -(-dimensions // found["block"]) <= 256
            assert 8 <= found["leaves_to_search"] <= found["leaves"] <= rows
    assert scann_parameters(10**8, 512)["leaves"] > scann_parameters(10**6, 512)["leaves"]


def test_an_index_of_another_datastore_or_a_damaged_one_is_refused(tiny_copy):
    datastore = open_datastore(tiny_copy / "datastore")
    manifest = index_manifest(tiny_copy, datastore)
    for file in (tiny_copy / "index").glob("*/*.pb"):
        file.write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read"):
        open_index(tiny_copy, datastore, manifest, 0)
    with pytest.raises(UserError, match=r"has 7 bytes, its manifest says .* run `resmem index`"):
        index_manifest(tiny_copy, datastore)
    manifest["shards"][0]["made_from"]["folders"][1] = "shard-00001-of-00003.00000000"
    write_json(tiny_copy / "index/index.json", manifest)
    with pytest.raises(UserError, match="made from another datastore"):
        index_manifest(tiny_copy, datastore)


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


# As indexes give them: each row once, few distances, and none where there are fewer.
FOUND = st.permutations(range(12)).flatmap(
    lambda rows: st.lists(st.sampled_from([0.5, 1.0, 2.0, np.inf]), min_size=12, max_size=12).map(lambda d: list(zip(rows, d, strict=True)))
)


@given(FOUND, st.sampled_from([1, 3, 4]), st.integers(1, 12))
def test_merging_gives_what_sorting_everything_gives(found, parts, k):
    pairs = np.array([(distance, -1 if np.isinf(distance) else row) for row, distance in found])
    split = [(part[None, :, 1].astype(np.int64), part[None, :, 0].astype(np.float32)) for part in np.split(pairs, parts)]
    rows, distances = merge_nearest(split, k)
    expected = sorted(map(tuple, pairs.tolist()))[:k]
    assert list(zip(distances[0].tolist(), rows[0].tolist(), strict=True)) == expected


@given(st.integers(1, 10**10), st.integers(1, 10**9), st.sampled_from([32, 128, 512]))
def test_an_index_of_the_most_rows_fits_and_one_more_does_not(memory, more, emb):
    rows = largest_index(memory, emb, 100_000)
    assert largest_index(memory + more, emb, 100_000) >= rows
    assert rows == 0 or index_memory(rows, emb, 100_000) <= memory
    # The tree's files take less for each row than the keys do that are kept where rows are few.
    assert index_memory(rows + 1, emb, 100_000) > memory or index_bytes(rows + 1, emb) < index_bytes(rows, emb)


def test_a_query_in_a_large_forgotten_cluster_does_not_widen_the_search_of_others(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    keys = clustered(7_500, 16)
    keys[:2500] = keys[0] + 1e-3 * rng.normal(size=(2500, 16))
    datastore = write_keys(tmp_path / "datastore", keys, [(0, 2500)])
    (tmp_path / "index").mkdir()
    build_scann(datastore, tmp_path / "index", 20, 1000)
    index = ScannIndex(datastore, tmp_path / "index", 20)
    widths = []
    real = index_module.nearest
    monkeypatch.setattr(
        index_module, "nearest", lambda d, q, candidates, k: widths.append(candidates.shape[1]) or real(d, q, candidates, k)
    )
    rows, _ = index.search(np.concatenate([keys[:3], keys[5000:5010]]), 10)
    assert max(widths) == 20
    assert (rows >= 2500).all()
