import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resmem_lm.model.config import ModelConfig
from resmem_lm.model.decoder import Decoder, init_parameters, relative_buckets
from resmem_lm.text.packing import shift_right

TINY = ModelConfig(vocab_size=50, emb_dim=16, num_heads=2, num_layers=2, head_dim=8, mlp_dim=32)
TINY_1_1 = dataclasses.replace(TINY, mlp_activations=("gelu", "linear"), logits_via_embedding=False)
CONFIGS = pytest.mark.parametrize("config", [TINY, TINY_1_1], ids=["t5", "t5_1_1"])


def tokens(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(1, 50, shape), jnp.int32)


@functools.cache
def initial_parameters(config):
    return jax.jit(lambda: init_parameters(config, 0))()


@functools.partial(jax.jit, static_argnums=0)
def hidden(config, parameters, inputs, segment_ids):
    return Decoder(config).apply({"params": parameters}, inputs, segment_ids, method="hidden")


@functools.partial(jax.jit, static_argnums=0)
def call(config, parameters, inputs, segment_ids=None, dropout_key=None):
    return Decoder(config).apply(
        {"params": parameters},
        inputs,
        inputs,
        decoder_segment_ids=segment_ids,
        enable_dropout=dropout_key is not None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )


@CONFIGS
def test_no_gradient_flows_from_an_output_to_a_later_input(config):
    parameters = initial_parameters(config)

    def outputs(change):
        # Input token i has embedding row i, so the gradient of that row is the gradient of that input.
        changed = jax.tree.map(lambda x: x, parameters)
        table = changed["decoder"]["token_embedder"]["embedding"]
        changed["decoder"]["token_embedder"]["embedding"] = table.at[:12].add(change)
        keys, h = hidden(config, changed, jnp.arange(12)[None], jnp.ones((1, 12), jnp.int32))
        return keys[0].sum(-1) + h[0].sum(-1)

    jacobian = np.abs(np.asarray(jax.jit(jax.jacobian(outputs))(jnp.zeros((12, 16))))).sum(-1)
    assert (np.triu(jacobian, 1) == 0).all()
    assert (np.diagonal(jacobian) > 0).all()
    assert jacobian[11, 0] > 0


@CONFIGS
def test_segments_do_not_see_each_other(config):
    parameters = initial_parameters(config)
    first, second = tokens((1, 7), 1), tokens((1, 5), 2)
    together = hidden(config, parameters, jnp.concatenate([first, second], 1), jnp.array([[1] * 7 + [2] * 5]))
    for alone, part in ((first, slice(0, 7)), (second, slice(7, 12))):
        for a, b in zip(hidden(config, parameters, alone, jnp.ones_like(alone)), together, strict=True):
            np.testing.assert_allclose(a, b[:, part], atol=2e-5)


@CONFIGS
def test_the_call_is_logits_of_hidden_and_the_key_is_a_normalized_vector(config):
    parameters = initial_parameters(config)
    inputs, segments = tokens((2, 9)), jnp.ones((2, 9), jnp.int32)
    keys, h = hidden(config, parameters, inputs, segments)
    logits = Decoder(config).apply({"params": parameters}, h, method="logits")
    called = call(config, parameters, inputs, segments)
    np.testing.assert_allclose(logits, called, atol=1e-6)
    assert logits.shape == (2, 9, 50)
    # The LayerNorm's scale is 1 before training: every key has norm sqrt(emb_dim).
    np.testing.assert_allclose(jnp.linalg.norm(keys, axis=-1), 4.0, rtol=1e-3)


def test_parameter_names_are_those_of_t5x():
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(initial_parameters(TINY))
    }
    layer = "decoder/layers_1"
    assert {
        "decoder/token_embedder/embedding",
        "decoder/relpos_bias/rel_embedding",
        "decoder/decoder_norm/scale",
        f"{layer}/pre_self_attention_layer_norm/scale",
        f"{layer}/self_attention/query/kernel",
        f"{layer}/self_attention/out/kernel",
        f"{layer}/pre_mlp_layer_norm/scale",
        f"{layer}/mlp/wi/kernel",
        f"{layer}/mlp/wo/kernel",
    } <= names
    gated = jax.tree_util.tree_leaves_with_path(initial_parameters(TINY_1_1))
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in gated}
    assert {f"{layer}/mlp/wi_0/kernel", f"{layer}/mlp/wi_1/kernel", "decoder/logits_dense/kernel"} <= names


def test_bfloat16_activations_give_float32_logits_near_those_of_float32():
    parameters = initial_parameters(TINY)
    inputs = tokens((2, 9))
    low, full = (call(config, parameters, inputs) for config in (dataclasses.replace(TINY, dtype="bfloat16"), TINY))
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, full, atol=0.1)


def test_dropout_changes_logits_and_depends_on_its_key_alone():
    parameters = initial_parameters(TINY)
    inputs = tokens((2, 9))

    def run(seed):
        return call(TINY, parameters, inputs, None, jax.random.key(seed))

    assert (run(0) == run(0)).all()
    assert (run(0) != run(1)).any()


def test_relative_buckets_are_exact_to_16_and_end_at_128():
    buckets = relative_buckets(300)
    assert (np.diagonal(buckets, -7) == 7).all()
    assert (np.triu(buckets, 1) == 0).all()
    assert buckets[299, 0] == buckets[200, 60] == 31
    assert (np.diff(buckets[299, ::-1]) >= 0).all()


def test_shift_right_begins_every_segment_with_zero():
    targets, segments = np.array([[5, 6, 7, 8, 0]]), np.array([[1, 1, 2, 2, 0]])
    np.testing.assert_array_equal(shift_right(targets, segments), [[0, 5, 0, 7, 0]])


def test_decoding_is_refused():
    inputs = tokens((1, 4))
    with pytest.raises(NotImplementedError, match="only scores"):
        Decoder(TINY).apply({"params": initial_parameters(TINY)}, inputs, inputs, decode=True, enable_dropout=False)
