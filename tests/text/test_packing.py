import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resmem_lm.text.packing import batches, first_tokens, one_pass, pack, shift_right

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def numbered_documents(lengths):
    """Return documents whose concatenated tokens are 1, 2, 3, ..."""
    ends = np.cumsum(lengths, dtype=np.int32)
    return [np.arange(end - length + 1, end + 1, dtype=np.int32) for length, end in zip(lengths, ends, strict=True)]


@given(LENGTHS, st.integers(1, 20))
def test_concatenated_rows_are_the_concatenated_documents(lengths, row_length):
    tokens, segment_ids = pack(numbered_documents(lengths), row_length)
    np.testing.assert_array_equal(tokens.ravel()[: sum(lengths)], np.arange(1, sum(lengths) + 1))
    assert (segment_ids.ravel()[: sum(lengths)] > 0).all()


@given(LENGTHS, st.integers(1, 20))
def test_padding_is_less_than_a_row_and_at_the_very_end(lengths, row_length):
    tokens, segment_ids = pack(numbered_documents(lengths), row_length)
    padded = tokens.size - sum(lengths)
    assert 0 <= padded < row_length
    assert (tokens.ravel()[sum(lengths) :] == 0).all()
    assert (segment_ids.ravel()[sum(lengths) :] == 0).all()


@given(LENGTHS, st.integers(1, 20), st.integers(1, 7))
def test_one_pass_has_every_row_once_in_order_in_full_batches(lengths, row_length, batch_size):
    packed = pack(numbered_documents(lengths), row_length)
    passed = one_pass(packed, batch_size=batch_size)
    for name, rows in (("decoder_target_tokens", packed[0]), ("decoder_segment_ids", packed[1])):
        assert {len(batch[name]) for batch in passed} == {batch_size}
        together = np.concatenate([batch[name] for batch in passed])
        np.testing.assert_array_equal(together[: len(rows)], rows)
        assert (together[len(rows) :] == 0).all()


@given(LENGTHS, st.integers(0, 400))
def test_first_tokens_are_the_first_of_the_documents(lengths, count):
    documents = numbered_documents(lengths)
    found = first_tokens(documents, count)
    np.testing.assert_array_equal(np.concatenate([np.zeros(0, int), *found]), np.concatenate(documents)[:count])
    assert all(len(document) for document in found)


@given(LENGTHS, st.integers(1, 20))
def test_segments_count_from_one_in_every_row_and_change_where_documents_do(lengths, row_length):
    tokens, segment_ids = pack(numbered_documents(lengths), row_length)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for row, segments in zip(tokens, segment_ids, strict=True):
        assert segments[0] == 1
        real = row > 0
        np.testing.assert_array_equal(np.diff(segments[real]), np.diff(document_of[row[real] - 1]))


def by_hand(tokens, segment_ids):
    """Compute the decoder inputs one position at a time."""
    inputs = np.zeros_like(tokens)
    for row in range(tokens.shape[0]):
        for column in range(1, tokens.shape[1]):
            if segment_ids[row, column] == segment_ids[row, column - 1]:
                inputs[row, column] = tokens[row, column - 1]
    return inputs


@given(LENGTHS, st.integers(1, 20))
def test_inputs_are_the_token_before_and_zero_where_a_segment_begins(lengths, row_length):
    tokens, segment_ids = pack(numbered_documents(lengths), row_length)
    np.testing.assert_array_equal(shift_right(tokens, segment_ids), by_hand(tokens, segment_ids))


PACKED = pack(numbered_documents([7, 1, 12, 30, 3, 9, 22, 16]), 8)  # 100 tokens in 13 rows


def row_numbers(batch):
    """Return the row numbers of a batch of PACKED, found by the first token, which differs in every row."""
    return ((batch["decoder_target_tokens"][:, 0] - 1) // 8).tolist()


@settings(max_examples=15)
@given(st.lists(st.integers(0, 60), max_size=8), st.integers(0, 60), st.integers(1, 5), st.integers(0, 3))
def test_a_batch_does_not_depend_on_the_batches_read_before(read_before, number, batch_size, seed):
    straight_to_it = batches(PACKED, batch_size=batch_size, seed=seed)[number]
    sequence = batches(PACKED, batch_size=batch_size, seed=seed)
    for other in read_before:
        sequence[other]
    for name, value in straight_to_it.items():
        np.testing.assert_array_equal(sequence[number][name], value)


@pytest.mark.parametrize("batch_size", [1, 4, 13, 20])
def test_every_pass_has_every_row_once_in_a_different_order(batch_size):
    sequence = batches(PACKED, batch_size=batch_size, seed=0)
    rows = [row for number in range(-(-39 // batch_size)) for row in row_numbers(sequence[number])]
    passes = [rows[:13], rows[13:26], rows[26:39]]
    for one in passes:
        assert collections.Counter(one) == collections.Counter(range(13))
    assert passes[0] != passes[1] != passes[2] != passes[0]


def test_seeds_give_different_orders():
    first, second = (row_numbers(batches(PACKED, batch_size=13, seed=seed)[0]) for seed in (0, 1))
    assert first != second


def test_a_batch_holds_packed_rows_under_t5x_names():
    batch = batches(PACKED, batch_size=4, seed=0)[2]
    rows = row_numbers(batch)
    np.testing.assert_array_equal(batch["decoder_target_tokens"], PACKED[0, rows])
    np.testing.assert_array_equal(batch["decoder_segment_ids"], PACKED[1, rows])
    np.testing.assert_array_equal(batch["decoder_input_tokens"], by_hand(*PACKED[:, rows]))
    assert set(batch) == {"decoder_target_tokens", "decoder_segment_ids", "decoder_input_tokens"}
