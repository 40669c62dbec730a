import numpy as np
import pytest

from resmem_lm.errors import UserError
from resmem_lm.search import Queries, open_queries, recall
from resmem_lm.storage import read_json, write_json


def test_recall_counts_what_was_found_in_any_order():
    assert recall(np.array([[3, 1, 2], [9, 8, 7]]), np.array([[1, 2, 3], [7, 5, 6]])) == pytest.approx((1 + 1 / 3) / 2)


def test_damaged_neighbours_are_named_with_the_mend(tiny_copy):
    (shard,) = read_json(tiny_copy / "neighbors/neighbors.json")["test"]["shards"]
    for name in Queries._fields:
        path = tiny_copy / "neighbors" / shard["folder"] / f"{name}.npy"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=rf"{name}.npy was altered: .* run `resmem evaluate`"):
            open_queries(tiny_copy, "test")
        path.write_bytes(content)
    facts = tiny_copy / "neighbors/neighbors.json"
    write_json(facts, read_json(facts) | {"datastore": "0" * 64})
    with pytest.raises(UserError, match="made from another datastore"):
        open_queries(tiny_copy, "test")
