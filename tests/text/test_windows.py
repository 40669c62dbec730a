import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmem_lm.errors import UserError
from resmem_lm.text.windows import WindowSpec, cut, window_rows

SPECS = st.integers(1, 16).flatmap(lambda length: st.builds(WindowSpec, st.just(length), st.integers(0, length - 1)))
LENGTHS = st.lists(st.integers(0, 40), max_size=12)
ROWS = st.integers(1, 4)


def numbered_documents(lengths):
    """Return documents whose concatenated tokens are 1, 2, 3, ..."""
    ends = np.cumsum(lengths, dtype=np.int32)
    return [np.arange(end - length + 1, end + 1, dtype=np.int32) for length, end in zip(lengths, ends, strict=True)]


def segments(lengths, spec, rows):
    """Yield (tokens, positions) of every segment of every row, in order."""
    for batch in window_rows(numbered_documents(lengths), spec, rows):
        for tokens, segment_ids, positions in zip(*batch, strict=True):
            for segment in range(1, segment_ids.max() + 1):
                yield tokens[segment_ids == segment], positions[segment_ids == segment]


@given(LENGTHS, SPECS, ROWS)
def test_every_token_is_emitted_exactly_once(lengths, spec, rows):
    emitted = [batch.positions[batch.positions >= 0] for batch in window_rows(numbered_documents(lengths), spec, rows)]
    np.testing.assert_array_equal(np.sort(np.concatenate([*emitted, np.zeros(0, np.int64)])), np.arange(sum(lengths)))


@given(LENGTHS, SPECS, ROWS)
def test_an_emitted_token_is_the_one_at_its_position(lengths, spec, rows):
    for batch in window_rows(numbered_documents(lengths), spec, rows):
        emitted = batch.positions >= 0
        np.testing.assert_array_equal(batch.tokens[emitted], batch.positions[emitted] + 1)


@given(LENGTHS, SPECS, ROWS)
def test_a_segment_is_a_part_of_one_document_and_emits_its_end(lengths, spec, rows):
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for tokens, positions in segments(lengths, spec, rows):
        assert (np.diff(tokens) == 1).all()
        assert len(set(document_of[tokens - 1])) == 1
        assert (np.diff((positions >= 0).astype(int)) >= 0).all()
        assert positions[-1] >= 0


@given(LENGTHS, SPECS, ROWS)
def test_an_emitted_token_has_the_context_before_it_that_its_document_has(lengths, spec, rows):
    place_in_document = np.concatenate([np.arange(length) for length in [*lengths, 0]])
    for _, positions in segments(lengths, spec, rows):
        emitted = positions >= 0
        before = np.arange(len(positions))[emitted]
        assert (before >= np.minimum(spec.context, place_in_document[positions[emitted]])).all()


@given(LENGTHS, SPECS, ROWS)
def test_rows_have_one_shape_and_only_padding_after_their_segments(lengths, spec, rows):
    for batch in window_rows(numbered_documents(lengths), spec, rows):
        for array in batch:
            assert array.shape == (rows, spec.length)
        padding = batch.segment_ids == 0
        assert (np.diff(padding.astype(int), axis=1) >= 0).all()
        assert (batch.tokens[padding] == 0).all()
        assert (batch.positions[padding] == -1).all()
        # Segments count 1, 2, 3 ... from the start of the row.
        steps = np.diff(batch.segment_ids, axis=1, prepend=0)
        assert ((steps == 0) | (steps == 1) | padding).all()


@given(LENGTHS, SPECS)
def test_a_document_is_cut_into_as_few_windows_as_its_context_allows(lengths, spec):
    windows = list(cut(lengths, spec))
    for document, tokens in enumerate(lengths):
        mine = [window for window in windows if window.document == document]
        assert len(mine) == (max(1, -(-(tokens - spec.context) // spec.stride)) if tokens else 0)
        assert all(0 < window.end - window.begin <= spec.length for window in mine)


def test_short_documents_share_rows():
    batches = list(window_rows(numbered_documents([8] * 100), WindowSpec(64, 16), rows=1))
    assert len(batches) == 13  # 100 * 8 tokens in rows of 64


def test_the_papers_window_has_a_stride_of_192_tokens():
    assert WindowSpec().stride == 192
    assert [(window.begin, window.emit, window.end) for window in cut([500], WindowSpec())] == [
        (0, 0, 256),
        (192, 256, 448),
        (384, 448, 500),
    ]


@given(st.integers(-3, 20), st.integers(-3, 20))
def test_a_context_below_0_or_above_the_length_is_refused(length, context):
    if 0 <= context < length:
        assert WindowSpec(length, context).stride >= 1
    else:
        with pytest.raises(UserError, match=f"^a window of {length} tokens cannot have {context} context tokens: set a context from .*$"):
            WindowSpec(length, context)
