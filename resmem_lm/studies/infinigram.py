"""Predict with the infinity-gram model of the datastore's tokens (Liu et al. 2024), from the package infini-gram.

The model has no neural network. It finds the longest suffix of the context that occurs in the datastore, and predicts from the counts of
the tokens that follow it.
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

SEPARATOR = 2**16 - 1  # the package puts it before each document
CONTEXT = 64  # longest suffix in tokens; longer repetitions rarely change the prediction
TOKENS = 8  # next tokens that are kept, most frequent first
SUPPORT = 1000  # occurrences that are counted; evenly spaced if there are more
MEMORY_GIB = 2
JOB_BYTES = 2**24  # least bytes of an indexing job: the package joins parts below 100 kB wrongly


class Continuations(NamedTuple):
    """Most frequent next tokens of each query (-1 where there are fewer), their shares, and whether the query has only one."""

    tokens: Int[np.ndarray, "queries 8"]
    shares: Float[np.ndarray, "queries 8"]
    sparse: Bool[np.ndarray, " queries"]


def installed() -> bool:
    """Return whether the package is installed."""
    return importlib.util.find_spec("infini_gram") is not None


def build(folder: Path, documents: Iterable[Int[np.ndarray, "_"]]) -> None:
    """Write the package's suffix array of documents' tokens. Raise UserError if a token id is too large or the package fails."""
    folder.mkdir(parents=True, exist_ok=True)
    offset = 0
    with (folder / "tokenized.0").open("wb") as tokens, (folder / "offset.0").open("wb") as offsets:
        for document in documents:
            if document.size and document.max() >= SEPARATOR:
                raise UserError(
                    f"infini-gram: token {document.max()} is not below {SEPARATOR}: uninstall the package to omit this baseline"
                )
            offsets.write(np.uint64(offset).tobytes())
            content = np.concatenate([[SEPARATOR], document]).astype("<u2").tobytes()
            tokens.write(content)
            offset += len(content)
    here = folder.absolute()  # the package changes its working directory
    command = [sys.executable, "-m", "infini_gram.indexing", f"--data_dir={here}", f"--save_dir={here}", f"--temp_dir={here}"]
    jobs = max(1, min(os.cpu_count() or 1, offset // JOB_BYTES))
    command += [f"--cpus={jobs}", f"--mem={MEMORY_GIB}", "--ulimit=4096"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode or not (folder / "table.0").exists():
        raise UserError(f"infini-gram could not index {folder} ({process.stderr.strip()[-200:]}): install it again, or uninstall it")


def continuations(folder: Path, eos: int, documents: list[Int[np.ndarray, "_"]]) -> Continuations:
    """Return the continuations for every token of some documents, in order."""
    engine: Any = engine_module.InfiniGramEngine(index_dir=str(folder), eos_token_id=eos, load_to_ram=True)
    count = sum(map(len, documents))
    tokens, shares = np.full((count, TOKENS), -1, np.int32), np.zeros((count, TOKENS), np.float32)
    sparse = np.zeros(count, bool)
    with progress("infini-gram", total=count, unit="tokens") as bar:
        for query, context in enumerate(_contexts(documents)):
            found = engine.infgram_ntd(prompt_ids=context, max_support=SUPPORT)
            if found["suffix_len"] == 0:  # the datastore has no token of the context, and the package counts nothing
                continue
            following = {token: facts["prob"] for token, facts in found["result_by_token_id"].items() if token < SEPARATOR}
            best = sorted(following.items(), key=lambda pair: (-pair[1], pair[0]))[:TOKENS]
            tokens[query, : len(best)] = [token for token, _ in best]
            shares[query, : len(best)] = [share for _, share in best]
            sparse[query] = len(following) == 1
            if query % 1000 == 0:
                bar.update(query)
        bar.update(count)
    return Continuations(tokens, shares, sparse)


def _contexts(documents: list[Int[np.ndarray, "_"]]) -> Iterator[list[int]]:
    """Yield the end of the context of each token; a separator marks the beginning of a document."""
    for document in documents:
        for position in range(len(document)):
            yield [SEPARATOR] * (position < CONTEXT) + [int(token) for token in document[max(0, position - CONTEXT) : position]]


class Mixture(NamedTuple):
    """DeepNet's candidates and the continuations, which are the tokens that can win, with each model's probability of them."""

    ids: Int[np.ndarray, "queries tokens"]
    base: Float[np.ndarray, "queries tokens"]
    shares: Float[np.ndarray, "queries tokens"]
    sparse: Bool[np.ndarray, " queries"]

    def predict(self, lambda_: float, sparse_lambda: float) -> Int[np.ndarray, " queries"]:
        """Return the token with the largest (1 - lambda) p + lambda p_infinity (Liu et al. 2024, section 5).

        `sparse_lambda` is the lambda for contexts with a single continuation.
        """
        weight = np.where(self.sparse, sparse_lambda, lambda_)[:, None]
        scores = (1 - weight) * self.base + weight * self.shares
        return self.ids[np.arange(len(self.ids)), scores.argmax(axis=1)]


def mixture(
    found: Continuations, candidate_ids: Int[np.ndarray, "queries candidates"], probabilities: Float[np.ndarray, "queries candidates"]
) -> Mixture:
    """Mix continuations with DeepNet's candidates. A continuation that is no candidate gets DeepNet's probability 0."""
    same = candidate_ids[:, :, None] == found.tokens[:, None, :]
    base = np.concatenate([probabilities, (same * probabilities[:, :, None]).max(axis=1)], axis=1)
    shares = np.concatenate([(same * found.shares[:, None, :]).sum(axis=2), found.shares], axis=1)
    return Mixture(np.concatenate([candidate_ids, found.tokens], axis=1), base, shares, found.sparse)
