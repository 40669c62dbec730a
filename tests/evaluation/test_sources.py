import numpy as np
import pytest

from resmem_lm.evaluation.neighbors import open_queries
from resmem_lm.evaluation.sources import document_arrays, positions_of, proposed_tokens
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.memory.encoder import QueryRows
from resmem_lm.text.shards import QUERY_SPLITS
from resmem_lm.workdir.run import Run

EOS = 1
LENGTHS = np.array([30, 1, 20])


@pytest.fixture
def encoded():
    rng = np.random.default_rng(0)
    count = int(LENGTHS.sum())
    arrays = {name: np.zeros((count, 2), np.float32) for name in QueryRows._fields}
    arrays["keys"] = rng.standard_normal((count, 4)).astype(np.float32)
    tokens = rng.integers(2, 5, count)
    tokens[np.cumsum(LENGTHS) - 1] = EOS
    return arrays | {"tokens": tokens, "document_lengths": LENGTHS}


def test_later_tokens_change_nothing(encoded):
    """A query knows the tokens before it, not its own."""
    query = 12
    changed = encoded | {name: encoded[name].copy() for name in ("tokens", "keys")}
    changed["tokens"][query:30] = 7
    changed["keys"][query + 1 : 30] = 9.0
    before, after = document_arrays(encoded, 5), document_arrays(changed, 5)
    for name in ("document_back", "document_distances", "document_matches"):
        np.testing.assert_array_equal(after[name][: query + 1], before[name][: query + 1])
    neighbors, continuations = np.zeros((51, 1), np.int32), np.zeros((51, 2), np.int32)
    proposed = [proposed_tokens(arrays | found, neighbors, continuations) for arrays, found in ((encoded, before), (changed, after))]
    np.testing.assert_array_equal(proposed[1][: query + 1], proposed[0][: query + 1])


def test_documents_do_not_see_each_other(encoded):
    changed = encoded | {"tokens": encoded["tokens"].copy(), "keys": encoded["keys"].copy()}
    changed["tokens"][:29], changed["keys"][:31] = 7, 9.0
    for name in ("document_back", "document_distances", "document_matches"):
        np.testing.assert_array_equal(document_arrays(changed, 5)[name][31:], document_arrays(encoded, 5)[name][31:])


@pytest.mark.parametrize("split", QUERY_SPLITS)
def test_cached_matches_are_the_equal_tokens_before_row_and_query(tiny_run, split):
    q, datastore = open_queries(Run(tiny_run), split), open_datastore(tiny_run / "datastore")
    positions, memory = positions_of(q.document_lengths), np.concatenate(datastore.shard_arrays("tokens"))
    rows, matches = np.asarray(q.rows), np.asarray(q.matches)
    assert matches.max() > 3
    for query in range(0, len(positions), 37):
        for row, length in zip(rows[query], matches[query].tolist(), strict=True):
            np.testing.assert_array_equal(memory[row - length : row], q.tokens[query - length : query])
            if length < min(32, positions[query], row):
                assert memory[row - 1 - length] != q.tokens[query - 1 - length]


def test_exact_probabilities_are_probabilities(tiny_run):
    q = open_queries(Run(tiny_run), "test")
    p = np.exp(np.asarray(q.exact_log_probability).astype(np.float64))
    ids = np.asarray(q.candidate_ids)
    for query in range(0, len(ids), 53):
        _, first = np.unique(ids[query], return_index=True)
        assert 0 < p[query, first].sum() < 1.01
    assert (np.asarray(q.exact_match)[:, 0] <= positions_of(q.document_lengths)).all()
