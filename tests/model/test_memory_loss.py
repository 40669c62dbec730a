import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmem_lm.model import memory_loss as module
from resmem_lm.model.config import ModelConfig
from resmem_lm.model.decoder import init_parameters
from resmem_lm.model.memory_loss import memory_loss, memory_residuals, query_places, visible
from resmem_lm.model.train_loop import MEMORY, joint_loss_and_metrics, loss_and_metrics
from resmem_lm.resmem import neighbor_weights

BATCH, LENGTH, EMB, VOCAB = 3, 8, 4, 11
MODEL = ModelConfig(vocab_size=VOCAB, emb_dim=16, num_heads=2, num_layers=1, head_dim=8, mlp_dim=32, dropout_rate=0.0)
ALL = jnp.arange(LENGTH)
SEEDS = st.integers(0, 2**31 - 1)


def example(seed, padding=0):
    """Return logits, keys, targets and segment ids. The last row ends with `padding` tokens of padding."""
    rng = np.random.default_rng(seed)
    segment_ids = np.ones((BATCH, LENGTH), np.int32)
    segment_ids[-1, LENGTH - padding :] = 0
    logits, keys = (jnp.asarray(rng.normal(size=(BATCH, LENGTH, width)), jnp.float32) for width in (VOCAB, EMB))
    return logits, keys, jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32), jnp.asarray(segment_ids)


def own_rows(*rows):
    return jnp.asarray([row in rows for row in range(BATCH)])


def residuals(logits, keys, targets, segment_ids, own_row):
    return memory_residuals(logits, keys, targets, ALL, visible(segment_ids, ALL, own_row))


@given(SEEDS, st.integers(0, LENGTH))
def test_residuals_are_those_of_the_formula(seed, padding):
    logits, keys, targets, segment_ids = example(seed, padding)
    found = residuals(logits, keys, targets, segment_ids, own_rows(1))
    p = np.asarray(jax.nn.softmax(logits)).astype(np.float64)
    for row, place in np.ndindex(BATCH, LENGTH):
        weights, total = np.zeros((BATCH, LENGTH)), np.zeros(VOCAB)
        for other, j in np.ndindex(BATCH, LENGTH):
            if segment_ids[other, j] and (other != row or (row == 1 and j < place)):
                weights[other, j] = np.exp(-np.linalg.norm(np.asarray(keys[row, place] - keys[other, j], np.float64)))
                total += weights[other, j] * (np.eye(VOCAB)[targets[other, j]] - p[other, j])
        np.testing.assert_allclose(found[row, place], total / weights.sum(), atol=1e-5)


@given(st.lists(st.booleans(), min_size=BATCH, max_size=BATCH), st.integers(0, LENGTH))
def test_a_token_sees_other_rows_and_earlier_tokens_but_neither_itself_nor_padding(own, padding):
    segment_ids = example(0, padding)[3]
    seen = np.asarray(visible(segment_ids, ALL, jnp.asarray(own)))
    for row in range(BATCH):
        assert (seen[row, :, row] == np.tril(np.full((LENGTH, LENGTH), own[row]), -1) * np.asarray(segment_ids[row] > 0)).all()
        for other in set(range(BATCH)) - {row}:
            assert (seen[row, :, other] == np.asarray(segment_ids[other] > 0)).all()


@given(SEEDS)
def test_weights_sum_to_1_unless_no_token_is_seen(seed):
    far = np.random.default_rng(seed).uniform(0, 9, (2, 5)).astype(np.float32)
    far[0] = np.inf
    np.testing.assert_allclose(neighbor_weights(jnp.asarray(far), 1.0).sum(axis=1), [0, 1], rtol=1e-6)


@given(SEEDS)
def test_the_residuals_of_a_row_do_not_depend_on_its_later_tokens(seed):
    logits, keys, targets, segment_ids = example(seed)
    changed = logits.at[1, 5:].add(1.0), keys.at[1, 5:].add(1.0), targets.at[1, 5:].add(1) % VOCAB, segment_ids
    before, after = (residuals(*some, own_rows(0, 1, 2)) for some in ((logits, keys, targets, segment_ids), changed))
    np.testing.assert_array_equal(before[1, :5], after[1, :5])
    assert (before[1, 6:] != after[1, 6:]).any()


@given(SEEDS)
def test_a_left_out_row_does_not_see_its_own_tokens(seed):
    logits, keys, targets, segment_ids = example(seed)
    changed = logits.at[1, 0].add(1.0), keys, targets.at[1, 0].add(1) % VOCAB, segment_ids
    before, after = (residuals(*some, own_rows(0)) for some in ((logits, keys, targets, segment_ids), changed))
    np.testing.assert_array_equal(before[1], after[1])
    assert (before[0] != after[0]).any()


@given(SEEDS, st.integers(1, LENGTH))
def test_padding_changes_nothing(seed, padding):
    logits, keys, targets, segment_ids = example(seed, padding)
    key = jax.random.key(seed)
    noise = (logits.at[-1, LENGTH - padding :].add(3.0), keys.at[-1, LENGTH - padding :].add(3.0), targets, segment_ids)
    loss, changed = (memory_loss(*some, 2.0, key, stride=1) for some in ((logits, keys, targets, segment_ids), noise))
    np.testing.assert_allclose(loss, changed, rtol=1e-6)


@given(SEEDS)
def test_lambda_0_gives_the_cross_entropy_and_the_loss_depends_on_its_key_alone(seed):
    logits, keys, targets, segment_ids = example(seed, 2)
    plain = -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0] * (segment_ids > 0))
    key = jax.random.key(seed)
    np.testing.assert_allclose(memory_loss(logits, keys, targets, segment_ids, 0.0, key, stride=1), plain, rtol=1e-5)
    assert memory_loss(logits, keys, targets, segment_ids, 1.0, key) == memory_loss(logits, keys, targets, segment_ids, 1.0, key)


def test_the_loss_of_a_stride_has_the_expectation_of_the_whole_loss(monkeypatch):
    monkeypatch.setattr(module, "OWN_ROW", 1.0)
    logits, keys, targets, segment_ids = example(0, 2)
    loss = jax.jit(functools.partial(memory_loss, stride=4))
    firsts = {}
    for seed in range(200):  # enough for each of the 8 first places
        key = jax.random.key(seed)
        place = int(query_places(jax.random.split(key)[0], LENGTH, 4)[0])
        firsts.setdefault(place, key)
    assert len(firsts) == LENGTH
    whole = memory_loss(logits, keys, targets, segment_ids, 1.5, jax.random.key(0), stride=1)
    np.testing.assert_allclose(np.mean([loss(logits, keys, targets, segment_ids, 1.5, key) for key in firsts.values()]), whole, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 5, 8, 20])
def test_queries_are_different_places_of_the_row(length):
    places = np.asarray(query_places(jax.random.key(3), length))
    assert len(set(places.tolist())) == len(places) == max(1, length // module.STRIDE)
    assert places.min() >= 0
    assert places.max() < length


def test_the_gradient_reaches_keys_logits_and_lambda_but_not_the_residuals():
    logits, keys, targets, segment_ids = example(0)
    gradient = jax.grad(memory_loss, argnums=(0, 1, 4))
    by_logits, by_keys, by_lambda = gradient(logits, keys, targets, segment_ids, 1.0, jax.random.key(0))
    assert (np.abs(by_keys).sum(-1) > 0).all()
    assert by_lambda != 0
    assert (np.abs(by_logits).sum(-1) > 0).sum() == BATCH  # one query in each row


def test_equal_keys_and_a_batch_of_padding_have_finite_gradients():
    logits, keys, targets, segment_ids = example(0)
    for some_keys, some_ids in ((jnp.zeros_like(keys), segment_ids), (keys, jnp.zeros_like(segment_ids))):
        found = jax.grad(memory_loss, argnums=(0, 1, 4))(logits, some_keys, targets, some_ids, 1.0, jax.random.key(0))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_a_weight_of_0_gives_the_plain_loss_and_gradient():
    parameters = init_parameters(MODEL, 0)
    _, _, targets, segment_ids = example(0)
    batch = {"decoder_input_tokens": jnp.roll(targets, 1, 1), "decoder_target_tokens": targets, "decoder_segment_ids": segment_ids}
    joint = parameters | {MEMORY: {"lambda": jnp.ones(())}}

    def loss(weight):
        return lambda p: joint_loss_and_metrics(MODEL, p, batch, None, jax.random.key(0), weight)

    plain = jax.value_and_grad(lambda p: loss_and_metrics(MODEL, p, batch, None), has_aux=True)(parameters)
    none = jax.value_and_grad(loss(0.0), has_aux=True)(joint)
    assert none[1].pop(MEMORY) == {"lambda": 0}
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), plain, none)
    some = jax.grad(loss(1.0), has_aux=True)(joint)[0]
    assert some[MEMORY]["lambda"] != 0
