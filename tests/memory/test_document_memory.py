import numpy as np
import pytest

from resmem_lm.memory import document_memory
from resmem_lm.memory.document_memory import nearest_earlier


@pytest.fixture
def keys():
    return np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(document_memory, "BLOCK", 7)


def test_neighbors_are_the_nearest_earlier_rows_of_the_document(keys):
    lengths = np.array([25, 1, 34])
    back, distances = nearest_earlier(keys, lengths, 3)
    first = 0
    for length in lengths:
        for place in range(length):
            expected = np.sort(np.linalg.norm(keys[first : first + place] - keys[first + place], axis=1))[:3]
            np.testing.assert_allclose(distances[first + place, : len(expected)], expected, rtol=1e-5)
            assert (back[first + place, len(expected) :] == 0).all()
            assert np.isinf(distances[first + place, len(expected) :]).all()
            rows = first + place - back[first + place, : len(expected)]
            np.testing.assert_allclose(np.linalg.norm(keys[rows] - keys[first + place], axis=1), expected, rtol=1e-5)
        first += length


def test_later_tokens_change_nothing(keys):
    before = nearest_earlier(keys, np.array([60]), 5)
    changed = keys.copy()
    changed[40:] = 100.0
    for found, expected in zip(nearest_earlier(changed, np.array([60]), 5), before, strict=True):
        np.testing.assert_array_equal(found[:40], expected[:40])


def test_a_long_document_keeps_the_most_recent_tokens(keys, monkeypatch):
    monkeypatch.setattr(document_memory, "MOST_TOKENS", 10)
    back, _ = nearest_earlier(keys, np.array([60]), 10)
    assert back.max() == 10
    assert (np.sort(back[10:], axis=1) == np.arange(1, 11)).all()


def test_no_neighbors_give_arrays_without_columns(keys):
    back, distances = nearest_earlier(keys, np.array([60]), 0)
    assert back.shape == distances.shape == (60, 0)
