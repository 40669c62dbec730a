"""ResMem end to end, from text to predictions, against DeepNet alone on the same tokens; and the choice of hyperparameters."""

from pathlib import Path

import numpy as np
from jaxtyping import Int

from benchmarks.encode import fast_argmax
from benchmarks.measure import interleaved, median, ratio, table
from benchmarks.search import our_index
from resmem_lm.evaluation.candidates import DEEPNET, Setting
from resmem_lm.evaluation.neighbors import Queries, deepnet_outputs
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.evaluation.tuning import grid_of
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.memory.encoder import Encoder, query_head
from resmem_lm.memory.sharded import ShardedArray
from resmem_lm.model.checkpoints import load_model
from resmem_lm.text.packing import first_tokens
from resmem_lm.text.shards import query_documents
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json

TOKENS, K = 8000, 50


def run(workdir: Path) -> None:
    """Prints the tables."""
    model, vocabulary = load_model(workdir / "checkpoints"), load_vocabulary(Run(workdir))
    datastore = open_datastore(workdir / "datastore")
    index, _ = our_index(workdir, datastore)
    documents = first_tokens(vocabulary.encode_documents(query_documents(Run(workdir), "test")), TOKENS)
    targets = np.concatenate(documents)
    setting = Setting("resmem", K, 1.0, 1.0, 1.0)
    spec = datastore.binding.window
    encoder = Encoder(model, spec, query_head, datastore.projection)
    alone = Encoder(model, spec, lambda parameters, keys, hidden, targets: fast_argmax(model.logits(parameters, hidden)))

    def deepnet() -> Int[np.ndarray, " tokens"]:
        found = np.empty(len(targets), np.int32)
        for positions, predictions in alone(documents):
            found[positions] = predictions
        return found

    def scorer() -> SplitScorer:
        keys, hidden = (
            np.empty((len(targets), index.datastore.array("quantized_keys").shape[1]), np.float32),
            np.empty((len(targets), model.config.emb_dim), np.float32),
        )
        for positions, rows in encoder(documents):
            keys[positions], hidden[positions] = rows
        rows, distances = index.search(keys, K)
        tokens = index.datastore.take("tokens", np.maximum(rows, 0))
        described = zip(*deepnet_outputs(model, datastore, hidden, targets, tokens), strict=True)
        arrays = [ShardedArray([array]) for array in (rows, distances, tokens, *map(np.concatenate, described))]
        names = ("rows", "distances", "neighbor_tokens", "target_logits", "candidate_ids", "candidate_logits", "bound", "log_partition")
        lengths = np.array([len(document) for document in documents])
        queries = Queries(
            tokens=targets, document_lengths=lengths, document_groups=np.arange(len(lengths)), **dict(zip(names, arrays, strict=True))
        )
        return SplitScorer("test", queries, index.datastore)

    def resmem() -> dict[Setting, tuple[np.ndarray, np.ndarray]]:
        return scorer().predict([DEEPNET, setting])

    assert np.mean(resmem()[DEEPNET][0] == deepnet()) > 0.999
    times = interleaved({"DeepNet alone": deepnet, "ResMem": resmem}, rounds=3)
    table(
        f"Evaluation ({len(targets):,} tokens, {index.datastore.rows:,} rows, emb {model.config.emb_dim})",
        ("way", "tokens/s", "of DeepNet's tokens/s"),
        ((way, f"{len(targets) / median(times, way):,.0f}", ratio(times, "DeepNet alone", way)) for way in times),
    )

    tried, found = read_json(workdir / "stages" / "evaluate.json")["settings"], scorer()
    grid = [tried[name] for name in ("ks", "sigmas", "temperatures")]
    counts = found.count_correct(*grid, grid_of(tried["lambdas"]))
    times = interleaved(
        {"one setting": lambda: found.predict([setting]), "grid": lambda: found.count_correct(*grid, grid_of(tried["lambdas"]))}, rounds=3
    )
    names = {"one setting": "one setting", "grid": f"{len(counts):,} settings, of which the best is chosen"}
    table(
        f"Scores of {len(targets):,} tokens whose neighbors are known",
        ("what", "tokens/s", "times one setting"),
        ((name, f"{len(targets) / median(times, way):,.0f}", ratio(times, way, "one setting")) for way, name in names.items()),
    )
