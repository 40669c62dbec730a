import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.nn import logsumexp

from resmem_lm import resmem


@st.composite
def problems(draw):
    """Draw random logits of queries and neighbors, with the tokens and distances of the neighbors."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    queries, k, vocab = draw(st.sampled_from([(2, 1, 5), (3, 4, 40)]))  # few shapes: each is compiled
    scale = draw(st.sampled_from([0.1, 1.0, 5.0]))
    return {
        "query_logits": (scale * rng.normal(size=(queries, vocab))).astype(np.float32),
        "logits": (scale * rng.normal(size=(queries, k, vocab))).astype(np.float32),
        "targets": rng.integers(0, vocab, (queries, k)),
        "distances": rng.gamma(2.0, size=(queries, k)).astype(np.float32),
        "entries": draw(st.sampled_from([1, 4, vocab])),
    }


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sparse(r, logits, targets, entries):
    """Return ids and values of a row's entries, its own token's first, and the largest value that is dropped."""
    others, probabilities, dropped = resmem.sparse_residual(logits, targets, logsumexp(logits, axis=-1), entries)
    ids = jnp.concatenate([targets[:, None], others], axis=1)
    return ids, jnp.concatenate([jnp.take_along_axis(r, targets[:, None], axis=1), -probabilities], axis=1), dropped


def rows_of(p):
    """Return the dense and the sparse residuals of the neighbors."""
    queries, k, vocab = p["logits"].shape
    logits, targets = jnp.asarray(p["logits"].reshape(-1, vocab)), jnp.asarray(p["targets"].reshape(-1))
    r = resmem.residual(logits, targets)
    ids, values, dropped = sparse(r, logits, targets, p["entries"])
    shape = (queries, k, p["entries"])
    return np.asarray(r).reshape(p["logits"].shape), ids.reshape(shape), values.reshape(shape), np.asarray(dropped).reshape(queries, k)


@given(problems())
def test_residual_is_onehot_minus_softmax_and_sums_to_zero(p):
    r, *_ = rows_of(p)
    np.testing.assert_allclose(r, np.eye(r.shape[-1])[p["targets"]] - softmax(p["logits"]), atol=1e-6)
    np.testing.assert_allclose(r.sum(-1), 0, atol=1e-5)


@given(problems())
def test_sparse_merge_equals_the_dense_zero_filled_formula(p):
    _, ids, values, _ = rows_of(p)
    base = softmax(p["query_logits"])
    weights = np.exp(-p["distances"] / 0.7) / np.exp(-p["distances"] / 0.7).sum(-1, keepdims=True)
    dense = np.zeros(p["logits"].shape)
    np.put_along_axis(dense, np.asarray(ids), np.asarray(values), axis=-1)
    expected = base + 0.8 * np.einsum("qk,qkv->qv", weights, dense)
    found = resmem.merge_sparse(jnp.asarray(base), resmem.neighbor_weights(jnp.asarray(p["distances"]), 0.7), ids, values, 0.8)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (resmem.predict(found) == np.asarray(found).argmax(-1)).all()


@given(problems())
def test_truncation_changes_no_score_by_more_than_the_largest_dropped_entry(p):
    r, ids, values, dropped = rows_of(p)
    weights = resmem.neighbor_weights(jnp.asarray(p["distances"]), 1.0)
    base = jnp.asarray(softmax(p["query_logits"]))
    whole = np.asarray(base) + np.einsum("qk,qkv->qv", np.asarray(weights), r)
    cut = resmem.merge_sparse(base, weights, ids, values)
    assert (np.abs(np.asarray(cut) - whole) <= dropped.max(-1, keepdims=True) + 1e-6).all()


@given(problems())
def test_the_stored_entries_are_the_targets_and_the_largest_others(p):
    r, ids, values, dropped = rows_of(p)
    np.testing.assert_allclose(values, np.take_along_axis(r, np.asarray(ids), axis=-1), atol=1e-6)
    np.testing.assert_array_equal(np.asarray(ids)[..., 0], p["targets"])
    others = np.abs(r)
    np.put_along_axis(others, p["targets"][..., None], -1.0, axis=-1)
    others = np.sort(others, axis=-1)[..., ::-1]
    np.testing.assert_allclose(-np.asarray(values)[..., 1:], others[..., : p["entries"] - 1], atol=1e-6)
    np.testing.assert_allclose(dropped, others[..., p["entries"] - 1] if p["entries"] < r.shape[-1] else 0, atol=1e-6)


@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 1), (9, 9), (9, 200), (5, 1000), (1, 333), (3, 77)]), st.sampled_from([3, 1000]))
def test_largest_is_top_k(seed, sizes, different):
    count, n = sizes
    values = np.random.default_rng(seed).integers(0, different, size=(3, n)).astype(np.float32)  # with ties
    found, places = resmem.largest(jnp.asarray(values), count)
    expected = np.argsort(-values, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_array_equal(found, np.take_along_axis(values, expected, axis=1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.4, 3.0])
@given(problems())
def test_residuals_at_a_temperature_follow_from_residuals_at_one(temperature, p):
    vocab = p["logits"].shape[-1]
    logits, targets = p["logits"].reshape(-1, vocab), p["targets"].reshape(-1)
    one = softmax(logits)
    found = resmem.at_temperature(
        jnp.asarray(one ** (1 / temperature)),
        jnp.eye(vocab, dtype=bool)[targets],
        jnp.asarray(np.log(one[np.arange(len(targets)), targets])),
        jnp.asarray(np.log((one ** (1 / temperature)).sum(-1))),
        temperature,
    )
    np.testing.assert_allclose(found, np.eye(vocab)[targets] - softmax(logits / temperature), atol=2e-5)


def test_at_any_temperature_a_probability_of_zero_is_no_entry_except_for_the_own_token():
    one = jnp.ones(1)
    found = resmem.at_temperature(jnp.sqrt(jnp.array([[0.0, 0.9, 0.0]])), jnp.array([[True, False, False]]), jnp.log(0.1 * one), one, 2.0)
    assert found[0, 2] == 0
    assert found[0, 1] < 0
    assert found[0, 0] > 0.8


@given(problems(), st.floats(0.05, 20))
def test_weights_sum_to_one_fall_with_distance_and_ignore_a_common_shift(p, sigma):
    weights = np.asarray(resmem.neighbor_weights(jnp.asarray(p["distances"]), sigma))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    order = np.argsort(p["distances"], axis=-1)
    assert (np.diff(np.take_along_axis(weights, order, -1), axis=-1) <= 1e-6).all()
    shifted = resmem.neighbor_weights(jnp.asarray(p["distances"]) + 3, sigma)
    np.testing.assert_allclose(shifted, weights, atol=1e-4)


def test_missing_neighbors_have_weight_zero_even_if_all_are_missing():
    weights = resmem.neighbor_weights(jnp.array([[1.0, 1.0, jnp.inf], [jnp.inf] * 3]), 0.5)
    np.testing.assert_allclose(weights, [[0.5, 0.5, 0], [0, 0, 0]])


@given(problems(), st.floats(0, 1))
def test_knn_lm_is_a_distribution(p, lambda_):
    weights = resmem.neighbor_weights(jnp.asarray(p["distances"]), 1.0)
    knn = resmem.knn_probabilities(weights, jnp.asarray(p["targets"]), p["logits"].shape[-1])
    mixed = resmem.knn_lm(jnp.asarray(softmax(p["query_logits"])), knn, lambda_)
    np.testing.assert_allclose(np.asarray(mixed).sum(-1), 1, rtol=1e-4)
    assert (np.asarray(mixed) >= 0).all()


def test_resmem_predicts_every_training_token_correctly_as_in_remark_3_2():
    """With k = 1, the nearest key of a training token is its own key, and p + onehot - p predicts its own token."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(4 * rng.normal(size=(500, 64)).astype(np.float32))
    targets = jnp.asarray(rng.integers(0, 64, 500))
    r = resmem.residual(logits, targets)
    base = jnp.asarray(softmax(np.asarray(logits)))
    weights = resmem.neighbor_weights(jnp.zeros((500, 1)), 1e-3)
    ids, values, _ = sparse(r, logits, targets, 8)
    scores = resmem.merge_sparse(base, weights, ids[:, None], values[:, None])
    assert (resmem.predict(scores) == targets).all()
