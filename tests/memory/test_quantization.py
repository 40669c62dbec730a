import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmem_lm.memory import quantization as codes


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.01, 1.0, 300.0]))
def test_a_key_comes_back_within_half_a_step_of_its_largest_component(seed, scale):
    keys = (scale * np.random.default_rng(seed).normal(size=(20, 32))).astype(np.float32)
    step = np.abs(keys).max(axis=1, keepdims=True) / 127
    found = codes.dequantize_keys(*map(np.asarray, codes.quantize_keys(jnp.asarray(keys))))
    assert (np.abs(found - keys) <= 0.55 * step).all()


def test_a_key_of_zeros_stays_one():
    assert not codes.dequantize_keys(*codes.quantize_keys(jnp.zeros((2, 4)))).any()


@given(st.integers(0, 2**32 - 1))
def test_a_probability_comes_back_the_nearer_the_smaller_it_is(seed):
    p = np.random.default_rng(seed).uniform(size=(5, 40)).astype(np.float32) ** 8
    found = np.asarray(codes.dequantize_probabilities(codes.quantize_probabilities(jnp.asarray(p))))
    root, step = np.cbrt(p.astype(np.float64)), 0.501 / 255
    assert (np.abs(found - p) <= (root + step) ** 3 - root**3 + 1e-7).all()
    assert (np.abs(found - p) < 0.006).all()
    bound = codes.upper_probabilities(np.asarray(codes.quantize_probabilities(jnp.asarray(p))))
    assert (bound * (1 + 1e-6) >= p).all()
    assert (bound >= found).all()


def test_every_code_comes_back():
    every = np.arange(256, dtype=np.uint8)[None]
    np.testing.assert_array_equal(codes.quantize_probabilities(jnp.asarray(codes.dequantize_probabilities(every))), every)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_powers_are_those_of_the_probabilities(temperature):
    every = np.arange(256, dtype=np.uint8)
    found = np.asarray(codes.dequantize_powers(every, temperature))
    assert found[0] == 0
    np.testing.assert_allclose(found, codes.dequantize_probabilities(every) ** (1 / temperature), rtol=1e-5)
