"""Index -> neighbours of every validation and test token, cached so that hyperparameters are swept without searching again.

`WORKDIR/neighbors/SPLIT/` holds row-aligned .npy files: neighbours (`rows`, `distances`, nearest first), the query's token,
and what DeepNet says of the tokens that can win (see `resmem_lm.candidates`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from resmem_lm.candidates import choose_candidates
from resmem_lm.checkpoint import Model, load_model
from resmem_lm.datastore import Datastore, open_datastore
from resmem_lm.documents import Document, read_shard, shard_paths
from resmem_lm.encode import TOKENS, Encoder, log_partition, query_head
from resmem_lm.errors import UserError
from resmem_lm.index import ExactIndex, Index, open_index
from resmem_lm.progress import progress
from resmem_lm.vocabulary import Vocabulary, load_vocabulary
from resmem_lm.workdir import Record, new_directory, stage, write_json

QUERY_SPLITS = ("validation", "test")
BASE_CANDIDATES = 32
SEARCH_BLOCK = 4096


class Queries(NamedTuple):
    """A split's cached arrays; row i is the i-th token of the split's documents in order."""

    rows: Int[np.ndarray, "queries k"]
    distances: Float[np.ndarray, "queries k"]
    tokens: Int[np.ndarray, " queries"]
    neighbor_tokens: Integer[np.ndarray, "queries k"]
    target_logits: Float[np.ndarray, " queries"]
    candidate_ids: Int[np.ndarray, "queries candidates"]
    candidate_logits: Float[np.ndarray, "queries candidates"]
    bound: Float[np.ndarray, " queries"]
    log_partition: Float[np.ndarray, "queries temperatures"]
    document_lengths: Int[np.ndarray, " documents"]


def open_queries(workdir: Path, split: str) -> Queries:
    """The cached neighbours of a split."""
    folder = workdir / "neighbors" / split
    return Queries(*(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in Queries._fields))


def query_documents(workdir: Path, split: str) -> list[Document]:
    """The documents whose tokens are a split's queries, in order."""
    return [document for shard in shard_paths(workdir, split) for document in read_shard(shard)]


def recall(found: Int[np.ndarray, "queries k"], exact: Int[np.ndarray, "queries k"]) -> float:
    """Share of the exact k nearest that were found."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, exact, strict=True)]))


@stage(name="search", after=("build", "index"), output="neighbors")
def search(workdir: Path, *, neighbors: int = 50, recall_queries: int = 500) -> Record:
    """Writes WORKDIR/neighbors for the validation and the test split.

    Args:
        neighbors: the largest k that can be chosen later (paper: 50).
        recall_queries: queries of each split, evenly spaced, on which the index is compared with exact search.

    Returns:
        Per split the number of tokens and documents, and the measured recall at k.

    Raises:
        UserError: more neighbours than rows, or a datastore or index made with another checkpoint.
    """
    model, vocabulary = load_model(workdir / "checkpoints"), load_vocabulary(workdir)
    datastore = open_datastore(workdir / "datastore", model=model.fingerprint, vocabulary=vocabulary.sha256, checksums=True)
    if not 1 <= neighbors <= datastore.rows:
        raise UserError(f"search.neighbors = {neighbors}, but the datastore has {datastore.rows} rows: take 1 to {datastore.rows}")
    index = open_index(workdir, datastore)
    encoder = Encoder(model, datastore.binding.window, query_head)
    facts: Record = {}
    with new_directory(workdir / "neighbors") as temporary:
        for split in QUERY_SPLITS:
            documents = query_documents(workdir, split)
            queries, measured = _search_split(split, documents, model, vocabulary, datastore, index, encoder, neighbors, recall_queries)
            (temporary / split).mkdir()
            for name, array in queries._asdict().items():
                np.save(temporary / split / f"{name}.npy", array)
            facts[split] = {"tokens": len(queries.tokens), "documents": len(documents), "recall_at_k": measured}
        write_json(temporary / "neighbors.json", facts)
    return facts


def _search_split(
    split: str,
    documents: list[Document],
    model: Model,
    vocabulary: Vocabulary,
    datastore: Datastore,
    index: Index,
    encoder: Encoder,
    k: int,
    recall_queries: int,
) -> tuple[Queries, float]:
    tokens = vocabulary.encode_documents(documents)
    targets = np.concatenate(tokens)
    count, emb = len(targets), model.config.emb_dim
    keys, hidden = np.empty((count, emb), np.float32), np.empty((count, emb), np.float32)
    with progress(f"encode {split}", total=count, unit="tokens") as bar:
        encoded = 0
        for positions, (some_keys, some_hidden) in encoder(tokens):
            keys[positions], hidden[positions] = some_keys, some_hidden
            encoded += len(positions)
            bar.update(encoded)

    rows, distances = np.empty((count, k), np.int64), np.empty((count, k), np.float32)
    with progress(f"search {split}", total=count, unit="tokens") as bar:
        for start in range(0, count, SEARCH_BLOCK):
            some = slice(start, start + SEARCH_BLOCK)
            rows[some], distances[some] = index.search(keys[some], k)
            bar.update(min(start + SEARCH_BLOCK, count))
    if isinstance(index, ExactIndex):
        measured = 1.0
    else:
        sample = np.unique(np.linspace(0, count - 1, min(recall_queries, count)).astype(np.int64))
        measured = recall(rows[sample], ExactIndex(datastore).search(keys[sample], k)[0])

    neighbor_tokens = datastore.take("tokens", np.maximum(rows, 0))
    parts = list(_candidates(model, datastore, hidden, targets, neighbor_tokens))
    lengths = np.array([len(document) for document in tokens])
    joined = [np.concatenate(part) for part in zip(*parts, strict=True)]
    return Queries._make([rows, distances, targets, neighbor_tokens, *joined, lengths]), measured


def _candidates(
    model: Model,
    datastore: Datastore,
    hidden: Float[np.ndarray, "queries emb"],
    targets: Int[np.ndarray, " queries"],
    neighbor_tokens: Integer[np.ndarray, "queries k"],
) -> Iterator[tuple[np.ndarray, ...]]:
    """Blocks of (target_logits, candidate_ids, candidate_logits, bound, log_partition)."""
    temperatures = datastore.binding.temperatures

    @jax.jit
    def block(parameters: dict, some_hidden: Array, some_targets: Array, some_tokens: Array) -> tuple[Array, ...]:
        logits = model.logits(parameters, some_hidden)
        target_logits = jax.numpy.take_along_axis(logits, some_targets[:, None], axis=1)[:, 0]
        return target_logits, *choose_candidates(logits, some_tokens, BASE_CANDIDATES), log_partition(logits, temperatures)

    for start in range(0, len(targets), TOKENS):
        count = min(TOKENS, len(targets) - start)
        some = [
            np.pad(array[start : start + count], [(0, TOKENS - count)] + [(0, 0)] * (array.ndim - 1))
            for array in (hidden, targets, neighbor_tokens.astype(np.int32))
        ]
        yield tuple(np.asarray(part)[:count] for part in block(model.parameters, *some))
