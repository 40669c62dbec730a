import numpy as np
import pytest

from resmem_lm.datastore import Datastore, open_datastore
from resmem_lm.errors import UserError
from resmem_lm.index import ExactIndex, ScannIndex, _build_scann, open_index, scann_parameters
from resmem_lm.search import recall


class Keys(Datastore):
    """Just the keys of a datastore, in two shards."""

    def __init__(self, keys):
        self.keys, cut = keys.astype(np.float16), len(keys) // 3
        self.offsets = np.array([0, cut, len(keys)])
        self._arrays = {"keys": [self.keys[:cut], self.keys[cut:]]}


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


def test_exact_search_is_brute_force_over_all_shards(monkeypatch):
    monkeypatch.setattr("resmem_lm.index.EXACT_BLOCK", 100)
    monkeypatch.setattr("resmem_lm.index.QUERY_BLOCK", 8)
    datastore, queries = Keys(clustered(700, 16, one_norm=False)), clustered(20, 16)
    rows, distances = ExactIndex(datastore).search(queries, 9)
    expected_rows, expected_distances = brute_force(datastore.keys, queries, 9)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-4)


@pytest.mark.parametrize(("rows", "one_norm"), [(3_000, True), (30_000, True), (30_000, False)])
def test_scann_finds_nearly_all_that_exact_search_finds_at_true_distances(tmp_path, rows, one_norm):
    keys = clustered(rows + 100, 64, one_norm=one_norm)
    datastore, queries = Keys(keys[100:]), keys[:100]
    facts = _build_scann(datastore, tmp_path, 200, 10_000)
    assert facts["measure"] == ("dot_product" if one_norm else "squared_l2")
    found, distances = ScannIndex(datastore, tmp_path, 200).search(queries, 10)
    exact, exact_distances = ExactIndex(datastore).search(queries, 10)
    assert recall(found, exact) >= 0.95
    same = found == exact
    np.testing.assert_allclose(distances[same], exact_distances[same], rtol=1e-5)
    assert (np.diff(distances, axis=1) >= 0).all()


def test_leaves_that_hold_too_few_rows_give_no_row_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("resmem_lm.index.scann_parameters", lambda rows, dimensions: {"leaves": 1000, "leaves_to_search": 1, "block": 2})
    keys = clustered(30_000, 32)
    datastore = Keys(keys)
    _build_scann(datastore, tmp_path, 100, 10_000)
    rows, distances = ScannIndex(datastore, tmp_path, 100).search(keys[:100], 100)
    assert (rows < 0).any()
    assert np.isinf(distances[rows < 0]).all()
    assert all(len(np.unique(row[row >= 0])) == (row >= 0).sum() for row in rows)


def test_a_moved_index_still_opens(tiny_copy):
    datastore = open_datastore(tiny_copy / "datastore")
    keys = np.asarray(datastore.shard_arrays("keys")[0][:20], np.float32)
    rows, _ = open_index(tiny_copy, datastore).search(keys, 1)
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
    for file in (tiny_copy / "index").glob("*.pb"):
        file.write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read"):
        open_index(tiny_copy, datastore)
    facts = tiny_copy / "index/index.json"
    facts.write_text(facts.read_text().replace('"datastore": "', '"datastore": "0'))
    with pytest.raises(UserError, match="made from another datastore"):
        open_index(tiny_copy, datastore)
