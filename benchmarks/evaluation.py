"""Compare ResMem from text to predictions with DeepNet alone, and the choice of hyperparameters with one setting."""

from typing import Any

import numpy as np
from jaxtyping import Int

from benchmarks.encode import fast_argmax
from benchmarks.inputs import our_index
from benchmarks.measure import interleaved, median, ratio, table
from resmem_lm.evaluation.candidates import DEEPNET, Setting
from resmem_lm.evaluation.neighbors import Queries
from resmem_lm.evaluation.saved_gates import load_gate
from resmem_lm.evaluation.scorer import Predictions, SplitScorer
from resmem_lm.evaluation.sources import document_arrays, memory_arrays
from resmem_lm.evaluation.tuning import grid_of
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.memory.encoder import Encoder, query_head
from resmem_lm.memory.open_index import index_manifest
from resmem_lm.memory.suffix_index import open_suffixes
from resmem_lm.model.checkpoints import load_model
from resmem_lm.text.packing import first_tokens
from resmem_lm.text.shards import query_documents
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.workdir.arrays import ShardedArray
from resmem_lm.workdir.run import Run

TOKENS, K, DOCUMENT_ROWS = 8000, 50, 16


def run(run: Run) -> None:
    """Print the tables."""
    model, vocabulary = load_model(run.checkpoints), load_vocabulary(run)
    datastore = open_datastore(run.datastore)
    index, _ = our_index(run, datastore)
    documents = first_tokens(vocabulary.encode_documents(query_documents(run, "test")), TOKENS)
    targets = np.concatenate(documents)
    setting = Setting("resmem", K, 1.0, 1.0, 1.0)
    spec = datastore.binding.window
    encoder = Encoder(model, spec, query_head, datastore.projection)
    suffixes = open_suffixes(run, datastore, index_manifest(run, datastore))
    alone = Encoder(model, spec, lambda parameters, keys, hidden, targets: fast_argmax(model.logits(parameters, hidden)))

    def deepnet() -> Int[np.ndarray, " tokens"]:
        found = np.empty(len(targets), np.int32)
        for positions, predictions in alone(documents):
            found[positions] = predictions
        return found

    def scorer() -> SplitScorer:
        lengths = np.array([len(document) for document in documents])
        arrays: dict[str, np.ndarray] = {"tokens": targets, "document_lengths": lengths, "document_groups": np.arange(len(lengths))}
        for positions, rows in encoder(documents):
            for name, values in rows._asdict().items():
                arrays.setdefault(name, np.empty((len(targets), *values.shape[1:]), values.dtype))[positions] = values
        arrays |= document_arrays(arrays, DOCUMENT_ROWS)
        arrays |= memory_arrays(model, datastore, suffixes, index.search(arrays["keys"], K), arrays)
        sharded: dict[str, Any] = {name: ShardedArray([arrays[name]]) for name in Queries._fields}
        queries = Queries(**sharded | {name: arrays[name] for name in ("tokens", "document_lengths", "document_groups")})
        return SplitScorer("test", queries, index.datastore)

    def resmem() -> dict[Setting, tuple[np.ndarray, np.ndarray]]:
        return scorer().predict([DEEPNET, setting])

    gate = load_gate(run, "resmem_adaptive_document")

    def adaptive() -> Predictions:
        return scorer().adaptive(gate)

    assert np.mean(resmem()[DEEPNET][0] == deepnet()) > 0.999
    times = interleaved({"DeepNet alone": deepnet, "ResMem": resmem, "Adaptive ResMem with all sources": adaptive}, rounds=3)
    table(
        f"Evaluation ({len(targets):,} tokens, {index.datastore.rows:,} rows, emb {model.config.emb_dim})",
        ("way", "tokens/s", "share of DeepNet's tokens/s"),
        ((way, f"{len(targets) / median(times, way):,.0f}", ratio(times, "DeepNet alone", way)) for way in times),
    )

    tried, found = run.record("evaluate")["settings"], scorer()
    grid = [tried[name] for name in ("ks", "sigmas", "temperatures")]
    counts = found.count_correct(*grid, grid_of(tried["lambdas"]))
    times = interleaved(
        {"one setting": lambda: found.predict([setting]), "grid": lambda: found.count_correct(*grid, grid_of(tried["lambdas"]))}, rounds=3
    )
    names = {"one setting": "one setting", "grid": f"choice of the best of {len(counts):,} settings"}
    table(
        f"Scores of {len(targets):,} tokens with cached neighbors",
        ("what", "tokens/s", "times one setting"),
        ((name, f"{len(targets) / median(times, way):,.0f}", ratio(times, way, "one setting")) for way, name in names.items()),
    )
