import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmem_lm.evaluation.calibrated import FLOOR, calibration_error, is_first, on_simplex, target_probability

VOCAB, QUERIES = 30, 5
ON_SIMPLEX = jax.jit(on_simplex, static_argnums=0)
TARGET_PROBABILITY = jax.jit(target_probability)


def drawn(seed, candidates=12):
    """Probabilities over a vocabulary, and candidates (some tokens occur twice) with their residuals."""
    rng = np.random.default_rng(seed)
    p = np.asarray(jax.nn.softmax(jnp.asarray(2 * rng.normal(size=(QUERIES, VOCAB)))))
    ids = rng.integers(0, VOCAB // 2, (QUERIES, candidates))
    r = rng.uniform(-1, 1, (QUERIES, VOCAB))
    of_ids = (jnp.asarray(np.take_along_axis(values, ids, axis=1), jnp.float32) for values in (p, r))
    return p, jnp.asarray(ids), r, *of_ids


@pytest.mark.parametrize("formula", ["boosted", "clipped", "knnlm"])
@given(seed=st.integers(0, 2**32 - 1), lambda_=st.floats(0, 8))
def test_a_distribution_equals_the_formula_over_the_whole_vocabulary(formula, seed, lambda_):
    lambda_ = lambda_ / 8 if formula == "knnlm" else lambda_
    p, ids, r, base, residual = drawn(seed)
    knn = jnp.full(base.shape, 1 / VOCAB)
    q = ON_SIMPLEX(formula, base, residual, knn, is_first(ids), lambda_)
    among = np.zeros((QUERIES, VOCAB), bool)
    np.put_along_axis(among, np.asarray(ids), True, axis=1)
    r = np.where(among, r, 0)
    dense = {
        "boosted": p * np.exp(lambda_ * r),
        "clipped": np.maximum(p + lambda_ * r, FLOOR * p),
        "knnlm": (1 - lambda_) * p + lambda_ * np.where(among, 1 / VOCAB, 0),
    }[formula]
    if formula != "knnlm":
        dense /= dense.sum(axis=1, keepdims=True)
    for token in range(0, VOCAB, 4):
        found = TARGET_PROBABILITY(q, ids == token, jnp.asarray(p[:, token]))
        np.testing.assert_allclose(found, dense[:, token], rtol=2e-4, atol=1e-7)


@given(st.integers(0, 2**32 - 1))
def test_lambda_0_is_deepnet(seed):
    _, ids, _, base, residual = drawn(seed)
    for formula in ("boosted", "clipped", "knnlm"):
        q = ON_SIMPLEX(formula, base, residual, jnp.zeros_like(base), is_first(ids), 0.0)
        np.testing.assert_allclose(q.candidates, base, rtol=1e-5)
        np.testing.assert_allclose(q.other, 1, rtol=1e-5)


@given(st.sampled_from([1, 2, 20]).flatmap(lambda size: st.lists(st.integers(0, 5), min_size=size, max_size=size)))  # each is compiled
def test_each_token_counts_at_its_first_candidate(ids):
    first = np.asarray(is_first(jnp.array([ids])))[0]
    assert [number for number, yes in zip(ids, first, strict=True) if yes] == list(dict.fromkeys(ids))


def test_the_calibration_error_is_the_mean_gap_of_the_bins():
    rng = np.random.default_rng(0)
    confidence = rng.random(200_000)
    assert calibration_error(confidence, rng.random(200_000) < confidence) < 0.01
    assert calibration_error(confidence, rng.random(200_000) < confidence**2) == pytest.approx(1 / 2 - 1 / 3, abs=0.01)
    assert calibration_error(np.array([1.0, 1.0, 0.5, 0.5]), np.array([True, False, True, False])) == pytest.approx(0.25)
