"""Tokens -> training rows: documents one after another, cut into rows of one length, shuffled.

No token is lost to a cut and none is padding, except at the very end; a segment id keeps the pieces of different
documents apart.
"""

from collections.abc import Iterable, Iterator
from typing import Any, TypedDict

import numpy as np
from etils import epy
from jaxtyping import Int

from resmem_lm.text.shards import read_shard, shard_paths
from resmem_lm.text.vocabulary import Vocabulary
from resmem_lm.workdir.run import Run

with epy.lazy_imports():
    import grain


class Batch(TypedDict):
    """A batch under T5X's feature names; a segment id of 0 marks padding, which has no loss."""

    decoder_input_tokens: Int[np.ndarray, "batch length"]
    decoder_target_tokens: Int[np.ndarray, "batch length"]
    decoder_segment_ids: Int[np.ndarray, "batch length"]


def split_tokens(run: Run, split: str, vocabulary: Vocabulary) -> Iterator[Int[np.ndarray, " tokens"]]:
    """The tokens of every document of a split."""
    for shard in shard_paths(run, split):
        yield from vocabulary.encode_documents(read_shard(shard))


def first_tokens(documents: Iterable[Int[np.ndarray, "_"]], tokens: int) -> list[Int[np.ndarray, "_"]]:
    """The first documents, of so many tokens together, the last cut."""
    found, room = [], tokens
    remaining = iter(documents)
    while room and (document := next(remaining, None)) is not None:
        if len(document):
            found.append(document[:room])
            room -= len(found[-1])
    return found


def shift_right(tokens: Int[Any, "batch length"], segment_ids: Int[Any, "batch length"]) -> Int[np.ndarray, "batch length"]:
    """Decoder inputs for the given targets: each segment begins with BOS = 0 and ends before its last token."""
    inputs = np.zeros_like(tokens)
    inputs[:, 1:] = tokens[:, :-1] * (segment_ids[:, 1:] == segment_ids[:, :-1])
    return inputs


def pack(documents: list[Int[np.ndarray, "_"]], length: int) -> Int[np.ndarray, "2 rows length"]:
    """Tokens and segment ids of the documents packed into rows; segments count from 1 in every row."""
    lengths = np.array([len(document) for document in documents])
    total = int(lengths.sum())
    rows = -(-total // length)
    tokens = np.zeros(rows * length, np.int32)
    tokens[:total] = np.concatenate(documents)
    document_ids = np.zeros(rows * length, np.int32)
    document_ids[:total] = np.repeat(np.arange(1, len(documents) + 1), lengths)
    by_row = document_ids.reshape(rows, length)
    segment_ids = np.where(by_row > 0, by_row - by_row[:, :1] + 1, 0)
    return np.stack([tokens.reshape(rows, length), segment_ids])


def batches(packed: Int[np.ndarray, "2 rows length"], *, batch_size: int, seed: int) -> Any:
    """An endless sequence of batches (grain's MapDataset); number i is the same however one gets there, so that training can resume.

    Rows are shuffled anew for each pass over them.
    """
    rows = grain.MapDataset.range(packed.shape[1])
    order = rows.seed(seed).shuffle().repeat().batch(batch_size)
    return order.map(lambda row_ids: _batch(packed[:, row_ids]))


def one_pass(packed: Int[np.ndarray, "2 rows length"], *, batch_size: int) -> list[Batch]:
    """Every row once and in order, in batches of one size: the last is filled with padding."""
    filled = np.pad(packed, ((0, 0), (0, -packed.shape[1] % batch_size), (0, 0)))
    return [_batch(filled[:, start : start + batch_size]) for start in range(0, filled.shape[1], batch_size)]


def _batch(packed: Int[np.ndarray, "2 batch length"]) -> Batch:
    tokens, segment_ids = packed
    return Batch(
        decoder_input_tokens=shift_right(tokens, segment_ids),
        decoder_target_tokens=tokens,
        decoder_segment_ids=segment_ids,
    )
