import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmem_lm.memory import kernels
from resmem_lm.memory.quantization import dequantize_keys


@given(
    shards=st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any),
    dimensions=st.integers(1, 40),
    wanted=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_distances_are_those_of_the_dequantized_keys_of_all_shards(shards, dimensions, wanted, seed):
    rng, count = np.random.default_rng(seed), sum(shards)
    quantized = rng.integers(-127, 128, (count, dimensions)).astype(np.int8)
    scales = rng.gamma(2.0, 0.1, count).astype(np.float16)
    queries = rng.normal(size=(3, dimensions)).astype(np.float32)
    rows = np.sort(rng.integers(-1, count, (3, wanted)), axis=1)
    cuts = np.cumsum(shards)[:-1]
    parts = numba.typed.List(np.split(quantized, cuts)), numba.typed.List(np.split(scales.view(np.uint16), cuts))
    found = kernels.distances(queries, *parts, np.concatenate([[0], np.cumsum(shards)]), rows)
    expected = np.linalg.norm(queries[:, None] - dequantize_keys(quantized, scales)[rows], axis=-1)
    np.testing.assert_allclose(found, np.where(rows < 0, np.inf, expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
@given(
    queries=st.integers(0, 4), k=st.integers(1, 4), others=st.integers(0, 9), candidates=st.integers(1, 9), seed=st.integers(0, 2**32 - 1)
)
def test_a_quantized_value_is_found_wherever_its_token_is_a_candidate(kind, queries, k, others, candidates, seed):
    rng, vocabulary = np.random.default_rng(seed), 12
    ids = rng.permuted(np.tile(np.arange(vocabulary), (queries, k, 1)), axis=2)[..., :others].astype(kind)
    quantized = rng.integers(0, 256, ids.shape).astype(np.uint8)
    some = rng.integers(0, vocabulary, (queries, candidates)).astype(np.int32)
    dense = np.zeros((queries, k, vocabulary), np.uint8)
    np.put_along_axis(dense, ids.astype(np.int64), quantized, axis=2)
    expected = np.take_along_axis(dense, np.repeat(some[:, None], k, axis=1), axis=2)
    np.testing.assert_array_equal(kernels.quantized_at(some, ids, quantized, vocabulary), expected)
