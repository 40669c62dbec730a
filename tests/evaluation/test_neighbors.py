from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmem_lm.errors import UserError
from resmem_lm.evaluation.candidates import Setting
from resmem_lm.evaluation.neighbors import Queries, open_queries, recall, truncate_neighbors
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json, write_json


def test_recall_ignores_the_order():
    assert recall(np.array([[3, 1, 2], [9, 8, 7]]), np.array([[1, 2, 3], [7, 5, 6]])) == pytest.approx((1 + 1 / 3) / 2)


def test_truncated_neighbors_equal_a_search_for_fewer(tiny_run):
    datastore, queries = open_datastore(tiny_run / "datastore"), open_queries(Run(tiny_run), "test")
    whole = SplitScorer("test", queries, datastore)
    for k in (1, 5, 12):
        few = truncate_neighbors(queries, k)
        assert few.rows.shape[1] == few.distances.shape[1] == few.neighbor_tokens.shape[1] == k
        assert few.candidate_ids.shape[1] == few.candidate_logits.shape[1] == queries.candidate_ids.shape[1] - 12 + k
        np.testing.assert_array_equal(np.asarray(few.candidate_ids)[:, -k:], np.asarray(few.neighbor_tokens))
        setting = Setting("resmem", k, 1.0, 1.0, 1.0)
        predictions, certified = SplitScorer("test", few, datastore).predict([setting])[setting]
        np.testing.assert_array_equal(predictions[certified], whole.predict([setting])[setting][0][certified])
        assert certified.mean() > 0.5
    for k in (0, 13):
        with pytest.raises(UserError, match=f"k = {k}: 12 neighbors were searched; choose from 1 to 12"):
            truncate_neighbors(queries, k)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), min_size=1, max_size=12))
def test_groups_are_numbered_in_order_of_appearance(documents):
    drawn = np.random.default_rng(0).permutation(5) * 10**17
    groups, lengths = (np.array(part) for part in zip(*documents, strict=True))
    found = Queries.groups.fget(SimpleNamespace(document_groups=drawn[groups], document_lengths=lengths))
    expected = {group: number for number, group in enumerate(dict.fromkeys(groups.tolist()))}
    assert found.tolist() == [
        expected[group] for group, length in zip(groups.tolist(), lengths.tolist(), strict=True) for _ in range(length)
    ]


def test_neighbors_of_another_version_are_an_error_with_its_fix(tiny_copy):
    facts = read_json(tiny_copy / "neighbors/neighbors.json")
    for split in ("validation", "test"):
        (shard,) = facts[split]["shards"]
        del shard["files"]["document_groups.npy"]
    write_json(tiny_copy / "neighbors/neighbors.json", facts)
    with pytest.raises(UserError, match="made by another version, without document_groups: delete"):
        open_queries(Run(tiny_copy), "test")


def test_damaged_neighbors_are_an_error_with_its_fix(tiny_copy):
    (shard,) = read_json(tiny_copy / "neighbors/neighbors.json")["test"]["shards"]
    for name in Queries._fields:
        path = tiny_copy / "neighbors" / shard["folder"] / f"{name}.npy"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=rf"{name}.npy was altered: .* run `resmem evaluate`"):
            open_queries(Run(tiny_copy), "test")
        path.write_bytes(content)
    facts = tiny_copy / "neighbors/neighbors.json"
    write_json(facts, read_json(facts) | {"datastore": "0" * 64})
    with pytest.raises(UserError, match="made from another datastore"):
        open_queries(Run(tiny_copy), "test")
