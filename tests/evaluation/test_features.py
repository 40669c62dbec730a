import jax.numpy as jnp
import numpy as np
import pytest

from resmem_lm.evaluation.features import DEEPNET_COLUMNS, EVERY, FEATURES, MEMORY, columns_of, features
from tests.evaluation.test_adaptive import CONTINUATIONS, OWN, ROWS, K, drawn


def names(sources, place):
    return [name for source in ("deepnet", *sources) for name in FEATURES[source][place]]


@pytest.mark.parametrize("sources", [("neighbors",), ("matches",), ("exact",), ("document",), MEMORY, EVERY])
def test_every_feature_has_a_name(sources):
    _, block = drawn(0)
    columns = columns_of(block, sources)
    found = features(block, columns, sources, 1.0, 0)
    assert found.of_column.shape[-1] == len(names(sources, 0))
    assert found.of_query.shape[-1] == len(names(sources, 1))


@pytest.mark.parametrize(
    ("sources", "width"),
    [(("neighbors",), K), (("matches",), K), (("exact",), CONTINUATIONS), (("document",), ROWS), (EVERY, CONTINUATIONS + ROWS + K)],
)
def test_the_columns_are_those_of_deepnet_and_of_the_sources(sources, width):
    _, block = drawn(0)
    assert len(columns_of(block, sources)) == min(OWN, DEEPNET_COLUMNS) + width


def feature(block, name, source):
    columns = columns_of(block, EVERY)
    found = features(block, columns, (source,), 1.0, 0)
    if name in names((source,), 0):
        return np.asarray(block.candidates.ids[:, columns]), np.asarray(found.of_column[..., names((source,), 0).index(name)])
    return np.asarray(found.of_query[:, names((source,), 1).index(name)])


def test_features_of_rows_equal_those_of_a_loop():
    _, block = drawn(1, absent=2)
    rows = block.neighbors
    weights = np.exp(-np.asarray(rows.distances)) * np.isfinite(rows.distances)
    weights /= weights.sum(axis=1, keepdims=True)
    ids, knn = feature(block, "log_knn", "neighbors")
    _, nearest = feature(block, "log_nearest", "neighbors")
    _, longest = feature(block, "longest_match", "matches")
    for query in range(len(ids)):
        for column, token in enumerate(ids[query]):
            same = (np.asarray(rows.tokens[query]) == token) & np.isfinite(rows.distances[query])
            np.testing.assert_allclose(knn[query, column], np.log(weights[query, same].sum() + 1e-4), rtol=1e-4)
            expected = np.log(np.asarray(rows.distances[query])[same].min(initial=np.inf) + 1e-2) if same.any() else 10
            np.testing.assert_allclose(nearest[query, column], expected, rtol=1e-4)
            np.testing.assert_allclose(longest[query, column], np.log1p((1.0 + np.asarray(rows.matches[query])[same]).max(initial=0)))


def test_a_document_without_earlier_tokens_has_finite_features():
    _, block = drawn(1)
    assert np.isinf(block.document.distances).all()
    found = features(block, columns_of(block, EVERY), EVERY, 1.0, 0)
    assert all(bool(jnp.isfinite(array).all()) for array in found)
