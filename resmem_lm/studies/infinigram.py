"""The infinity-gram model over the datastore's tokens (Liu et al. 2024), by the package infini-gram: a baseline that needs no model.

The longest end of a context that stands somewhere in the datastore tells the next token, by how often each follows it there.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epy
from jaxtyping import Bool, Float, Int

from resmem_lm.errors import UserError
from resmem_lm.workdir.progress import progress

with epy.lazy_imports():
    from infini_gram import engine as engine_module

SEPARATOR = 2**16 - 1  # infini-gram's, before each document
CONTEXT = 64  # tokens of the end of a context that are looked up; longer repetitions decide nothing else
TOKENS = 8  # of a distribution, that are kept
SUPPORT = 1000  # continuations that are counted; of more, so many evenly spaced
MEMORY_GIB = 2
JOB_BYTES = 2**24  # at least, for a job of the indexing: the package joins parts below 100 kB wrongly


class Continuations(NamedTuple):
    """Per query: the most frequent next tokens (-1 where there are fewer) and their shares, and whether only one was ever seen."""

    tokens: Int[np.ndarray, "queries 8"]
    shares: Float[np.ndarray, "queries 8"]
    sparse: Bool[np.ndarray, " queries"]


def installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("infini_gram") is not None


def build(folder: Path, documents: Iterable[Int[np.ndarray, "_"]]) -> None:
    """Writes the package's suffix array of some documents' tokens into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    offset = 0
    with (folder / "tokenized.0").open("wb") as tokens, (folder / "offset.0").open("wb") as offsets:
        for document in documents:
            if document.size and document.max() >= SEPARATOR:
                raise UserError(f"infini-gram: the vocabulary has token {document.max()}: it takes ids below {SEPARATOR}")
            offsets.write(np.uint64(offset).tobytes())
            content = np.concatenate([[SEPARATOR], document]).astype("<u2").tobytes()
            tokens.write(content)
            offset += len(content)
    here = folder.absolute()  # the package works in a directory of its own
    command = [sys.executable, "-m", "infini_gram.indexing", f"--data_dir={here}", f"--save_dir={here}", f"--temp_dir={here}"]
    jobs = max(1, min(os.cpu_count() or 1, offset // JOB_BYTES))
    command += [f"--cpus={jobs}", f"--mem={MEMORY_GIB}", "--ulimit=4096"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode or not (folder / "table.0").exists():
        raise UserError(f"infini-gram could not index {folder} ({made.stderr.strip()[-200:]}): install it again, or leave it out")


def continuations(folder: Path, eos: int, documents: list[Int[np.ndarray, "_"]]) -> Continuations:
    """What follows the context of every token of some documents, in order; a document's beginning is part of the context."""
    engine: Any = engine_module.InfiniGramEngine(index_dir=str(folder), eos_token_id=eos, load_to_ram=True)
    count = sum(map(len, documents))
    tokens, shares = np.full((count, TOKENS), -1, np.int32), np.zeros((count, TOKENS), np.float32)
    sparse = np.zeros(count, bool)
    with progress("infini-gram", total=count, unit="tokens") as bar:
        for query, context in enumerate(_contexts(documents)):
            found = engine.infgram_ntd(prompt_ids=context, max_support=SUPPORT)
            if found["suffix_len"] == 0:  # no token of the context was ever seen: the package does not count all tokens then
                continue
            following = {token: told["prob"] for token, told in found["result_by_token_id"].items() if token < SEPARATOR}
            best = sorted(following.items(), key=lambda pair: (-pair[1], pair[0]))[:TOKENS]
            tokens[query, : len(best)] = [token for token, _ in best]
            shares[query, : len(best)] = [share for _, share in best]
            sparse[query] = len(following) == 1
            if query % 1000 == 0:
                bar.update(query)
        bar.update(count)
    return Continuations(tokens, shares, sparse)


def _contexts(documents: list[Int[np.ndarray, "_"]]) -> Iterator[list[int]]:
    for document in documents:
        for position in range(len(document)):
            yield [SEPARATOR] * (position < CONTEXT) + [int(token) for token in document[max(0, position - CONTEXT) : position]]


class Mixture(NamedTuple):
    """Of the tokens that can win, DeepNet's candidates and the continuations: DeepNet's probability and infini-gram's."""

    ids: Int[np.ndarray, "queries tokens"]
    base: Float[np.ndarray, "queries tokens"]
    shares: Float[np.ndarray, "queries tokens"]
    sparse: Bool[np.ndarray, " queries"]

    def predict(self, lambda_: float, sparse_lambda: float) -> Int[np.ndarray, " queries"]:
        """(1 - lambda) p + lambda p_infinity, with another lambda where only one continuation was seen (Liu et al. 2024, section 5)."""
        weight = np.where(self.sparse, sparse_lambda, lambda_)[:, None]
        scores = (1 - weight) * self.base + weight * self.shares
        return self.ids[np.arange(len(self.ids)), scores.argmax(axis=1)]


def mixture(
    found: Continuations, candidate_ids: Int[np.ndarray, "queries candidates"], probabilities: Float[np.ndarray, "queries candidates"]
) -> Mixture:
    """Puts both together. A continuation that is not among DeepNet's candidates has at most the least of these: it counts as 0."""
    same = candidate_ids[:, :, None] == found.tokens[:, None, :]
    base = np.concatenate([probabilities, (same * probabilities[:, :, None]).max(axis=1)], axis=1)
    shares = np.concatenate([(same * found.shares[:, None, :]).sum(axis=2), found.shares], axis=1)
    return Mixture(np.concatenate([candidate_ids, found.tokens], axis=1), base, shares, found.sparse)
