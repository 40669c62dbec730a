import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmem_lm.memory import quantization


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.01, 1.0, 300.0]))
def test_a_dequantized_key_is_within_half_a_step(seed, scale):
    keys = (scale * np.random.default_rng(seed).normal(size=(20, 32))).astype(np.float32)
    step = np.abs(keys).max(axis=1, keepdims=True) / 127
    found = quantization.dequantize_keys(*map(np.asarray, quantization.quantize_keys(jnp.asarray(keys))))
    assert (np.abs(found - keys) <= 0.55 * step).all()


def test_a_key_of_zeros_is_dequantized_to_zeros():
    assert not quantization.dequantize_keys(*quantization.quantize_keys(jnp.zeros((2, 4)))).any()


@given(st.integers(0, 2**32 - 1))
def test_the_error_of_a_dequantized_probability_shrinks_with_it(seed):
    p = np.random.default_rng(seed).uniform(size=(5, 40)).astype(np.float32) ** 8
    found = np.asarray(quantization.dequantize_probabilities(quantization.quantize_probabilities(jnp.asarray(p))))
    root, step = np.cbrt(p.astype(np.float64)), 0.501 / 255
    assert (np.abs(found - p) <= (root + step) ** 3 - root**3 + 1e-7).all()
    assert (np.abs(found - p) < 0.006).all()
    bound = quantization.upper_probabilities(np.asarray(quantization.quantize_probabilities(jnp.asarray(p))))
    assert (bound * (1 + 1e-6) >= p).all()
    assert (bound >= found).all()


def test_every_quantized_value_survives_a_round_trip():
    every = np.arange(256, dtype=np.uint8)[None]
    np.testing.assert_array_equal(quantization.quantize_probabilities(jnp.asarray(quantization.dequantize_probabilities(every))), every)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_powers_are_those_of_the_probabilities(temperature):
    every = np.arange(256, dtype=np.uint8)
    found = np.asarray(quantization.dequantize_powers(every, temperature))
    assert found[0] == 0
    np.testing.assert_allclose(found, quantization.dequantize_probabilities(every) ** (1 / temperature), rtol=1e-5)
