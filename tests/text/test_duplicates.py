import itertools
import random
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from resmem_lm.text.duplicates import Signatures, minhash

WORDS = ["".join(letters) for letters in itertools.product("bdfgklmnprst", "aeiou", "bdfgklmnprst")]


def long_text(seed, words=200):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def edited(text, edits, seed):
    """Return the text with a few words replaced."""
    words, chance = text.split(), random.Random(seed)
    for place in chance.sample(range(len(words)), edits):
        words[place] = f"edit{seed}"
    return " ".join(words)


def kept(texts, threshold=0.7):
    return list(filter(Signatures(threshold).add_new, texts))


def jaccard(a, b):
    """Return the true Jaccard similarity of two texts' word 5-grams."""

    def shingles(text):
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}

    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


@settings(max_examples=15)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(0, 1000))
def test_the_first_of_lightly_edited_copies_is_kept(families, seed):
    originals = [long_text(family) for family in families]
    copies = [edited(text, edits=2 if number else 0, seed=seed + number) for number, text in enumerate(originals)]
    firsts = [copies[families.index(family)] for family in dict.fromkeys(families)]
    assert kept(copies) == firsts


@settings(max_examples=15)
@given(st.integers(0, 30), st.integers(0, 1000))
def test_estimated_similarity_is_near_the_true_one(edits, seed):
    text = long_text(seed)
    copy = edited(text, edits, seed)
    assert abs(minhash(text).jaccard(minhash(copy)) - jaccard(text, copy)) < 0.2


SMALL_TEXTS = st.lists(st.text("ab ", max_size=30), max_size=15)


@given(SMALL_TEXTS)
def test_a_text_is_added_if_and_only_if_no_similar_one_was_added_before(texts):
    signatures, before = Signatures(0.7), []
    for text in texts:
        signature, added = minhash(text), signatures.add_new(text)
        assert added != any(signature.jaccard(other) >= 0.7 for other in before)
        if added:
            before.append(signature)


@settings(max_examples=20)
@given(st.lists(st.text(max_size=20), max_size=5))
def test_one_of_several_equal_texts_is_kept(texts):
    assert kept([*texts, *texts], threshold=1.0) == kept(texts, threshold=1.0)
    assert len(set(kept(texts))) == len(kept(texts))


def test_a_text_that_is_similar_to_a_dropped_text_only_is_kept():
    first = long_text(0)
    second = edited(first, 5, 1)
    third = edited(second, 5, 2)
    assert jaccard(first, third) < 0.65 < 0.75 < min(jaccard(first, second), jaccard(second, third))
    assert kept([first, second, third]) == [first, third]


def test_case_and_punctuation_make_no_difference():
    assert kept(["One, two; three four - five six.", "one two three FOUR five six"]) == ["One, two; three four - five six."]


def test_the_order_of_words_makes_a_difference():
    texts = ["one two three four five six seven", "seven six five four three two one"]
    assert kept(texts) == texts


def test_texts_below_five_words_are_compared_as_a_whole():
    assert kept(["one two", "one two three", "one two", "one"]) == ["one two", "one two three", "one"]


def test_texts_without_words_are_compared_as_they_are():
    assert kept(["---", "***", "---"]) == ["---", "***"]


def test_similar_texts_are_found_by_the_order_of_addition():
    signatures = Signatures(0.7)
    added = [signatures.add_new(text) for text in ("the same text", "the same text", "another text", "the same text")]
    assert added == [True, False, True, False]
    assert signatures.similar(minhash("another text")) == [1]
