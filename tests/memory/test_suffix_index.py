import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmem_lm.errors import UserError
from resmem_lm.memory import suffix_index
from resmem_lm.memory.suffix_index import build_suffixes, find_matches

EOS, VOCABULARY = 1, 8
document = st.lists(st.integers(2, 5), max_size=12).map(lambda tokens: np.array([*tokens, EOS], np.uint16))
documents = st.lists(document, min_size=1, max_size=8)


def following(tokens, context):
    """Return the tokens that follow each occurrence of a context."""
    n = len(context)
    return [int(tokens[end]) for end in range(n, len(tokens)) if (tokens[end - n : end] == context).all()]


def longest(tokens, query, position):
    """Return the longest n whose last n tokens occur with a token behind them."""
    return max(n for n in range(position + 1) if n == 0 or following(tokens, query[position - n : position]))


def matches_of(shards, query):
    suffixes = [build_suffixes(np.concatenate(some)) for some in shards]
    return find_matches(suffixes, query, np.arange(len(query)), VOCABULARY)


@given(documents, document)
def test_the_longest_match_and_its_continuations_are_those_of_a_scan(texts, query):
    tokens, matches = np.concatenate(texts), matches_of([texts], query)
    columns = np.zeros((len(query), 1), np.int32)
    _, facts = matches.smooth(columns, np.ones((len(query), 1)))
    for position, (length, occurrences, distinct) in enumerate(facts.tolist()):
        assert length == longest(tokens, query, position)
        if length:
            found = following(tokens, query[position - int(length) : position])
            assert (occurrences, distinct) == (len(found), len(set(found)))
            often = max(found.count(token) for token in found)
            assert found.count(int(matches.continuations()[position, 0])) == often


@given(documents, document)
def test_smoothing_is_witten_bell_backoff_to_the_given_probabilities(texts, query):
    tokens = np.concatenate(texts)
    base = np.random.default_rng(0).dirichlet(np.ones(VOCABULARY), len(query))
    every = np.tile(np.arange(VOCABULARY), (len(query), 1))
    smoothed, _ = matches_of([texts], query).smooth(every, base)
    np.testing.assert_allclose(smoothed.sum(axis=1), 1, rtol=1e-5)
    for position in range(len(query)):
        expected = base[position]
        for n in range(suffix_index.SHORTEST, longest(tokens, query, position) + 1):
            counts = np.bincount(following(tokens, query[position - n : position]), minlength=VOCABULARY)
            distinct = (counts > 0).sum()
            previous = following(tokens, query[position - n + 1 : position])
            if len(previous) == counts.sum():  # the same occurrences as those of the shorter match count once
                continue
            expected = (counts + distinct * expected) / (counts.sum() + distinct)
        np.testing.assert_allclose(smoothed[position], expected, rtol=1e-4, atol=1e-6)


@given(documents, documents, document)
def test_shards_give_the_matches_of_one_index(first, second, query):
    one, two = matches_of([first + second], query), matches_of([first, second], query)
    every = np.tile(np.arange(VOCABULARY), (len(query), 1))
    base = np.full(every.shape, 1 / VOCABULARY)
    for found, expected in zip(two.smooth(every, base), one.smooth(every, base), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_array_equal(two.continuations(), one.continuations())


def test_only_earlier_tokens_of_the_query_count():
    texts = [np.array([2, 3, 4, 5, EOS], np.uint16)] * 3
    before, after = np.array([2, 3, 4, 5, EOS]), np.array([2, 3, 4, 2, 2])
    found = [matches_of([texts], query).continuations()[:4] for query in (before, after)]
    np.testing.assert_array_equal(*found)


def test_a_shard_beyond_the_range_of_the_sort_is_refused(monkeypatch):
    monkeypatch.setattr(suffix_index, "MOST_BYTES", 10)
    with pytest.raises(UserError, match=r"sorts at most 5 rows, and an index shard has 6: take less build_index\.memory_gib"):
        build_suffixes(np.zeros(6, np.uint16))
