"""Pack tokens into training rows: concatenate the documents, cut them into rows of equal length, and shuffle the rows.

A cut loses no token, and only the end of the last row is padding. Segment ids separate the documents of a row.
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
    """A batch of rows with T5X's feature names. Segment id 0 marks padding, which does not count in the loss."""

    decoder_input_tokens: Int[np.ndarray, "batch length"]
    decoder_target_tokens: Int[np.ndarray, "batch length"]
    decoder_segment_ids: Int[np.ndarray, "batch length"]


def split_tokens(run: Run, split: str, vocabulary: Vocabulary) -> Iterator[Int[np.ndarray, " tokens"]]:
    """Yield the tokens of each document of a split."""
    for shard in shard_paths(run, split):
        yield from vocabulary.encode_documents(read_shard(shard))


def first_tokens(documents: Iterable[Int[np.ndarray, "_"]], tokens: int) -> list[Int[np.ndarray, "_"]]:
    """Return the first documents with `tokens` tokens in total. The last one may be cut."""
    found, room = [], tokens
    remaining = filter(len, documents)
    while room and (document := next(remaining, None)) is not None:
        found.append(document[:room])
        room -= len(found[-1])
    return found


def shift_right(tokens: Int[Any, "batch length"], segment_ids: Int[Any, "batch length"]) -> Int[np.ndarray, "batch length"]:
    """Return the decoder inputs for target tokens: each segment is shifted right by one token and begins with BOS = 0."""
    inputs = np.zeros_like(tokens)
    inputs[:, 1:] = tokens[:, :-1] * (segment_ids[:, 1:] == segment_ids[:, :-1])
    return inputs


def pack(documents: list[Int[np.ndarray, "_"]], length: int) -> Int[np.ndarray, "2 rows length"]:
    """Return the documents as rows of `length` tokens, and the segment ids, which count from 1 in every row."""
    lengths = [len(document) for document in documents]
    rows = -(-sum(lengths) // length)
    padding = np.zeros(rows * length - sum(lengths), np.int32)
    tokens = np.concatenate([*documents, padding]).reshape(rows, length)
    numbers = np.repeat(np.arange(1, len(documents) + 1, dtype=np.int32), lengths)
    document_ids = np.concatenate([numbers, padding]).reshape(rows, length)
    return np.stack([tokens, np.where(document_ids > 0, document_ids - document_ids[:, :1] + 1, 0)])


def batches(packed: Int[np.ndarray, "2 rows length"], *, batch_size: int, seed: int) -> Any:
    """Return an endless grain MapDataset of batches, reshuffled for each pass. Any batch can be read first, so training can resume."""
    order = grain.MapDataset.range(packed.shape[1]).seed(seed).shuffle().repeat().batch(batch_size)
    return order.map(lambda row_ids: _batch(packed[:, row_ids]))


def one_pass(packed: Int[np.ndarray, "2 rows length"], *, batch_size: int) -> list[Batch]:
    """Return batches of `batch_size` rows that contain every row once, in order. Padding fills the last batch."""
    filled = np.pad(packed, ((0, 0), (0, -packed.shape[1] % batch_size), (0, 0)))
    return [_batch(filled[:, start : start + batch_size]) for start in range(0, filled.shape[1], batch_size)]


def _batch(packed: Int[np.ndarray, "2 batch length"]) -> Batch:
    tokens, segment_ids = packed
    inputs = shift_right(tokens, segment_ids)
    return Batch(decoder_input_tokens=inputs, decoder_target_tokens=tokens, decoder_segment_ids=segment_ids)
