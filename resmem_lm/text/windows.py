"""Tokens -> windows: each document alone, in overlapping windows; every token is emitted once (paper, appendix C).

A window holds up to `length` tokens; the next begins `length - context` later and emits only what lies behind its first
`context` tokens, so a token has at least `context` tokens before it wherever its document has them. A document that fills
less than a row shares it with others, behind segment ids, so that little is computed for padding.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from resmem_lm.errors import UserError


@dataclasses.dataclass(frozen=True)
class WindowSpec:
    """The paper's 256 tokens with 64 of context, that is, a stride of 192."""

    length: int = 256
    context: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.context < self.length:
            raise UserError(
                f"a window of {self.length} tokens cannot have {self.context} of context: context must be 0 or more and below the length"
            )

    @property
    def stride(self) -> int:
        """Tokens from the beginning of a window to that of the next."""
        return self.length - self.context


class Window(NamedTuple):
    """Tokens [begin, end) of a document, of which [emit, end) are emitted."""

    document: int
    begin: int
    emit: int
    end: int


class WindowRows(NamedTuple):
    """Rows for the model. `positions` counts a document's tokens through all documents given; -1 is not emitted."""

    tokens: Int[np.ndarray, "rows length"]
    segment_ids: Int[np.ndarray, "rows length"]
    positions: Int[np.ndarray, "rows length"]

    @property
    def emitted(self) -> Bool[np.ndarray, "rows length"]:
        """Which tokens are emitted."""
        return self.positions >= 0


def cut(document_lengths: list[int], spec: WindowSpec) -> Iterator[Window]:
    """The windows of documents of the given numbers of tokens."""
    for document, tokens in enumerate(document_lengths):
        begin = emit = 0
        while emit < tokens:
            end = min(begin + spec.length, tokens)
            yield Window(document, begin, emit, end)
            begin, emit = begin + spec.stride, end


def _fill(windows: Iterator[Window], length: int) -> Iterator[list[Window]]:
    """Windows grouped into rows: first-fit over the last few rows that are not full."""
    unfilled: list[tuple[int, list[Window]]] = []
    for window in windows:
        size = window.end - window.begin
        for number, (used, row) in enumerate(unfilled):
            if used + size <= length:
                row.append(window)
                unfilled[number] = (used + size, row)
                break
        else:
            unfilled.append((size, [window]))
        full = [row for used, row in unfilled if used == length]
        unfilled = [entry for entry in unfilled if entry[0] < length]
        yield from full
        if len(unfilled) > 32:
            yield unfilled.pop(max(range(len(unfilled)), key=lambda i: unfilled[i][0]))[1]
    yield from (row for _, row in unfilled)


def window_rows(documents: list[Int[np.ndarray, "_"]], spec: WindowSpec, rows: int) -> Iterator[WindowRows]:
    """The windows of `documents` in batches of `rows` rows; the last batch is padded with empty rows (segment 0)."""
    lengths = [len(document) for document in documents]
    first_position = np.concatenate([[0], np.cumsum(lengths)])

    def empty() -> WindowRows:
        shape = (rows, spec.length)
        return WindowRows(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.full(shape, -1, np.int64))

    batch, used = empty(), 0
    for row in _fill(cut(lengths, spec), spec.length):
        place = 0
        for segment, window in enumerate(row, start=1):
            stop = place + window.end - window.begin
            batch.tokens[used, place:stop] = documents[window.document][window.begin : window.end]
            batch.segment_ids[used, place:stop] = segment
            first = first_position[window.document]
            emitted = np.arange(first + window.emit, first + window.end)
            batch.positions[used, stop - len(emitted) : stop] = emitted
            place = stop
        used += 1
        if used == rows:
            yield batch
            batch, used = empty(), 0
    if used:
        yield batch
