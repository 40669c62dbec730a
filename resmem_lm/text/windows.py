"""Cut each document into overlapping windows that emit every token once (paper, appendix C).

A window has up to `length` tokens. The next window begins `length - context` tokens later and emits all but its first `context` tokens. So
a token follows at least `context` tokens, or all earlier tokens of its document if they are fewer. Short windows share a row, separated by
segment ids, to save padding.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from resmem_lm.errors import UserError


@dataclasses.dataclass(frozen=True)
class WindowSpec:
    """The length and the context of a window in tokens. The paper uses 256 and 64, a stride of 192."""

    length: int = 256
    context: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.context < self.length:
            raise UserError(
                f"a window of {self.length} tokens cannot have {self.context} context tokens: set a context from 0 to {self.length - 1}"
            )

    @property
    def stride(self) -> int:
        """Return the number of tokens from one window's begin to the next."""
        return self.length - self.context


class Window(NamedTuple):
    """A window of tokens [begin, end) of a document. It emits the tokens [emit, end)."""

    document: int
    begin: int
    emit: int
    end: int


class WindowRows(NamedTuple):
    """Rows for the model. `positions` has the place of each emitted token in the concatenated documents, and -1 elsewhere."""

    tokens: Int[np.ndarray, "rows length"]
    segment_ids: Int[np.ndarray, "rows length"]
    positions: Int[np.ndarray, "rows length"]


def cut(document_lengths: list[int], spec: WindowSpec) -> Iterator[Window]:
    """Yield the windows of documents with the given numbers of tokens."""
    for document, tokens in enumerate(document_lengths):
        begin = emit = 0
        while emit < tokens:
            end = min(begin + spec.length, tokens)
            yield Window(document, begin, emit, end)
            begin, emit = begin + spec.stride, end


def _fill(windows: Iterator[Window], length: int) -> Iterator[list[Window]]:
    """Yield the windows of each row, filled first-fit; up to 32 rows stay open."""
    unfilled: list[tuple[int, list[Window]]] = []
    for window in windows:
        size = window.end - window.begin
        number = next((i for i, (used, _) in enumerate(unfilled) if used + size <= length), len(unfilled))
        used, row = unfilled.pop(number) if number < len(unfilled) else (0, [])
        row.append(window)
        if used + size == length:
            yield row
        else:
            unfilled.insert(number, (used + size, row))
        if len(unfilled) > 32:
            yield unfilled.pop(max(range(len(unfilled)), key=lambda i: unfilled[i][0]))[1]
    yield from (row for _, row in unfilled)


def window_rows(documents: list[Int[np.ndarray, "_"]], spec: WindowSpec, rows: int) -> Iterator[WindowRows]:
    """Yield the windows of `documents` in batches of `rows` rows. Empty rows (segment id 0) fill the last batch."""
    lengths = [len(document) for document in documents]
    first_position = np.concatenate([[0], np.cumsum(lengths)])
    filled = _fill(cut(lengths, spec), spec.length)
    while group := list(itertools.islice(filled, rows)):
        tokens, segment_ids = np.zeros((2, rows, spec.length), np.int32)
        positions = np.full((rows, spec.length), -1, np.int64)
        for number, row in enumerate(group):
            place = 0
            for segment, window in enumerate(row, start=1):
                stop = place + window.end - window.begin
                tokens[number, place:stop] = documents[window.document][window.begin : window.end]
                segment_ids[number, place:stop] = segment
                first = first_position[window.document]
                positions[number, stop - (window.end - window.emit) : stop] = np.arange(first + window.emit, first + window.end)
                place = stop
        yield WindowRows(tokens, segment_ids, positions)
