"""Find the longest end of a context that occurs in the datastore, and the tokens that follow it there (Liu et al. 2024, infini-gram).

A suffix array of the tokens, read backwards, lists the rows in the order of the tokens that precede the next row. The rows that end with
the same n tokens are an interval of this list, and the interval of n + 1 tokens lies inside it.

The probability of a token y after the context backs off from the longest match to shorter ones, and from there to DeepNet (Witten and
Bell 1991):

    q_n(y) = (c_n(y) + u_n q_(n-1)(y)) / (c_n + u_n)          q_1 = DeepNet's p

c_n(y) counts the occurrences of the last n tokens that y follows, c_n is their sum, and u_n the number of distinct tokens that follow.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epy
from jaxtyping import Float, Int, Int32, Integer, UInt

from resmem_lm.errors import UserError
from resmem_lm.memory.datastore import Datastore
from resmem_lm.memory.open_index import rebuild_index_hint
from resmem_lm.workdir.arrays import load_array
from resmem_lm.workdir.artifacts import damaged_files, folder_of
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record

with epy.lazy_imports():
    import numba
    import pydivsufsort

    from resmem_lm.memory import suffix_kernels

FILES = ("tokens.npy", "ends.npy")
MOST_BYTES = 2**31 - 1  # of the tokens of a shard: the library's 32-bit sort works on bytes
CONTINUATIONS = 8
SHORTEST = 2  # tokens of a match whose counts change a probability; DeepNet knows what follows a single token


class Suffixes(NamedTuple):
    """A shard of the suffix index: tokens of live rows, and their rows in the order of the preceding tokens, read backwards."""

    tokens: UInt[np.ndarray, " rows"]
    ends: Int32[np.ndarray, " rows"]


class Matches(NamedTuple):
    """The occurrences of the last n tokens of each context, n from 0 to LONGEST, as intervals of each shard's `ends`."""

    shards: list[Suffixes]
    found: Int32[np.ndarray, "shards queries orders 2"]
    vocabulary: int

    @property
    def _typed(self) -> tuple[Any, Any]:
        """Return the tokens and the ends of all shards as lists for Numba."""
        tokens, ends = (numba.typed.List([_readonly(array) for array in arrays]) for arrays in zip(*self.shards, strict=True))
        return tokens, ends

    def continuations(self) -> Int32[np.ndarray, "queries 8"]:
        """Return the most frequent tokens after the longest match, then those after shorter matches; -1 if there are fewer."""
        chosen: np.ndarray = suffix_kernels.continuations(*self._typed, self.found, CONTINUATIONS, self.vocabulary)
        return chosen

    def smooth(
        self, columns: Integer[np.ndarray, "queries columns"], probabilities: Float[np.ndarray, "queries columns"]
    ) -> tuple[Float[np.ndarray, "queries columns"], Float[np.ndarray, "queries 3"]]:
        """Return q at the columns' tokens from DeepNet's probabilities of them, and describe the longest match of each query.

        A match has a length, a number of occurrences, and a number of distinct tokens that follow it.
        """
        smoothed = probabilities.astype(np.float32)
        facts = suffix_kernels.smooth(*self._typed, self.found, columns, smoothed, self.vocabulary, SHORTEST)
        return smoothed, facts


def _readonly(array: np.ndarray) -> np.ndarray:
    view = np.asarray(array).view()
    view.flags.writeable = False  # as mapped arrays are: a typed list accepts one type only
    return view


def build_suffixes(tokens: UInt[np.ndarray, " rows"]) -> Suffixes:
    """Sort the rows of a shard by their preceding tokens. Every document ends with the end-of-document token.

    Raise UserError if the shard is too large.
    """
    if tokens.nbytes > MOST_BYTES:
        raise UserError(
            f"the suffix index sorts at most {MOST_BYTES // tokens.itemsize:,} rows, and an index shard has {len(tokens):,}: "
            "take less build_index.memory_gib, or more shards of documents"
        )
    backwards = np.ascontiguousarray(tokens[::-1])
    order = pydivsufsort.divsufsort(backwards) if len(tokens) else np.zeros(0, np.int32)
    ends = (len(tokens) - 1 - order).astype(np.int32)
    return Suffixes(tokens, ends[ends < len(tokens) - 1])  # nothing follows the last row


def live_tokens(part: Datastore) -> UInt[np.ndarray, " rows"]:
    """Return the tokens of the live rows of a datastore."""
    tokens = np.concatenate(part.shard_arrays("tokens"))
    return tokens[~part.is_deleted(np.arange(part.rows))]


def deleted_of(part: Datastore) -> Record:
    """Return the deleted documents of a datastore, which a suffix index does not contain, as part of its provenance."""
    return {"deleted": [shard.get("deleted", []) for shard in part.shards]}


def save_suffixes(folder: Path, suffixes: Suffixes) -> None:
    """Write the files of a shard."""
    for name, array in zip(FILES, suffixes, strict=True):
        np.save(folder / name, array)


def open_suffixes(run: Run, datastore: Datastore, manifest: Record) -> list[Suffixes]:
    """Map the suffix index into memory. `manifest` is that of the index. Raise UserError if it is missing, damaged or outdated."""
    records = manifest.get("suffixes")
    if records is None:
        raise UserError(f"{run.index} has no suffix index, because another version built it: {rebuild_index_hint(run)}")
    built = [deleted for record in records for deleted in record["provenance"]["deleted"]]
    if built != deleted_of(datastore)["deleted"]:
        raise UserError(f"{run.index} was built before documents were deleted: run `resmem index`")
    for record in records:
        for problem in damaged_files(run.index, record):
            raise UserError(f"{problem}: {rebuild_index_hint(run)}")
    return [Suffixes(*(load_array(folder_of(run.index, record) / name) for name in FILES)) for record in records]


def find_matches(
    shards: list[Suffixes], context: Integer[np.ndarray, " queries"], positions: Int[np.ndarray, " queries"], vocabulary: int
) -> Matches:
    """Look up the tokens before each query. `context` has the tokens of consecutive queries, `positions` those in their documents."""
    found = [suffix_kernels.intervals(*map(_readonly, shard), context, positions) for shard in shards]
    return Matches(shards, np.stack(found), vocabulary)
