"""How the gain grows with the datastore (the paper's Figure 3a).

No datastore or index is built anew: the run's own are searched with the documents outside of a fraction treated as deleted. Encoded
queries and the result of each finished fraction lie in WORKDIR/derived/datastore-size, so that an interrupted study goes on.
"""

import contextlib
import functools
from typing import Any

import numpy as np

from resmem_lm.errors import DamagedError, UserError, check_least
from resmem_lm.evaluation.candidates import DEEPNET, Setting
from resmem_lm.evaluation.neighbors import Queries, deepnet_outputs, open_queries, recall
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.evaluation.statistics import accuracy_metrics
from resmem_lm.evaluation.tuning import calibrate, fit_gate, grid_of, simplex_grid, tune
from resmem_lm.memory.datastore import Datastore, open_datastore
from resmem_lm.memory.encode_documents import EncodingWorker, write_arrays
from resmem_lm.memory.encoder import query_head
from resmem_lm.memory.exact_index import ExactIndex
from resmem_lm.memory.open_index import search_shards
from resmem_lm.memory.sharded import ShardedArray, load_array
from resmem_lm.model.checkpoints import Model
from resmem_lm.report.plots import Figure, line
from resmem_lm.report.tables import hyperparameters, interval
from resmem_lm.studies.study import study, write_study
from resmem_lm.text.shards import QUERY_SPLITS, position, read_shard, shard_paths
from resmem_lm.workdir.artifacts import find_record, folder_of, publish
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record, read_json, remove, sha256, write_json

FOLDER, ENCODED = "derived/datastore-size", "queries"
COMPARED = ("ResMem (paper)", "ResMem", "kNN-LM", "Calibrated ResMem", "Adaptive ResMem")
FILES = ("keys.npy", "hidden.npy")
FOUND = ("rows", "distances", "neighbor_tokens", "target_logits", "candidate_ids", "candidate_logits", "bound", "log_partition")


def fraction_of(datastore: Datastore, fraction: float) -> Datastore:
    """The datastore with all documents deleted but those of the lowest hashes of their ids, the fewest that have the fraction's rows.

    So a smaller fraction is part of a larger one. Documents that were deleted before stay so.
    """
    deleted = [{(first, rows) for first, rows in record.get("deleted", [])} for record in datastore.shards]
    documents = [
        (position(document["id"]), shard, document["first_row"], document["rows"])
        for shard in range(len(datastore.shards))
        for document in datastore.documents(shard)
        if document["rows"] and (document["first_row"], document["rows"]) not in deleted[shard]
    ]
    documents.sort()
    rows_before = np.cumsum([0, *(rows for *_, rows in documents)])
    kept = int(np.searchsorted(rows_before, fraction * rows_before[-1]))
    for _, shard, first_row, rows in documents[kept:]:
        deleted[shard].add((first_row, rows))
    shards = [record | {"deleted": [list(some) for some in sorted(its)]} for record, its in zip(datastore.shards, deleted, strict=True)]
    return Datastore(datastore.folder, datastore.manifest | {"shards": shards})


def _encode(run: Run, worker: EncodingWorker, split: str, provenance: Record) -> dict[str, ShardedArray]:
    """Keys and hidden states of a split's tokens, a shard of documents at a time as in the search."""
    folder, records = run.path / FOLDER / ENCODED, []
    folder.mkdir(parents=True, exist_ok=True)
    for path in shard_paths(run, split):
        name = path.name.removesuffix(".jsonl")
        if not find_record(folder, name, provenance):
            tokens = worker.vocabulary.encode_documents(read_shard(path))
            with publish(folder, name, provenance, FILES) as attempt:
                write_arrays(attempt.folder, tokens, worker.encoder, path.name)
        records.append(read_json(folder / f"{name}.json"))
    return {file.removesuffix(".npy"): ShardedArray([load_array(folder_of(folder, record) / file) for record in records]) for file in FILES}


def _search(run: Run, part: Datastore, model: Model, cached: Queries, encoded: dict[str, ShardedArray]) -> Queries:
    """A split's queries with their neighbors in a part of the datastore."""
    rows, distances = search_shards(run, part, np.asarray(encoded["keys"]), cached.rows.shape[1])
    neighbor_tokens = part.take("tokens", np.maximum(rows, 0))
    described = deepnet_outputs(model, part, np.asarray(encoded["hidden"]), cached.tokens, neighbor_tokens)
    arrays = [rows, distances, neighbor_tokens, *(np.concatenate(blocks) for blocks in zip(*described, strict=True))]
    found: dict[str, Any] = {name: ShardedArray([array]) for name, array in zip(FOUND, arrays, strict=True)}
    return cached._replace(**found)


def _recall(part: Datastore, keys: ShardedArray, rows: ShardedArray, sample: int) -> float:
    """Recall@k on evenly spaced queries."""
    spaced = np.unique(np.linspace(0, len(rows) - 1, min(sample, len(rows))).astype(np.int64))
    exact, _ = ExactIndex(part).search(keys[spaced], rows.shape[1])
    return recall(rows[spaced], exact)


@study(name="datastore-size", after=("search", "build", "train", "index"))
def study_datastore_size(
    run: Run,
    *,
    fractions: tuple[float, ...] | list[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    ks: tuple[int, ...] | list[int] = (8, 50),
    sigmas: tuple[float, ...] | list[float] = (0.5, 1.0, 2.0, 4.0),
    temperatures: tuple[float, ...] | list[float] = (1.0,),
    lambdas: tuple[float, ...] | list[float] = (0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5),
    recall_queries: int = 200,
) -> Record:
    """Gain on test of ResMem, in all its forms, and kNN-LM with fractions of the datastore's documents.

    Hyperparameters are chosen and the gate of Adaptive ResMem is fitted on validation, for each fraction.

    Args:
        fractions: of the datastore's rows; whole documents, those of a smaller fraction among those of a larger.
        ks: numbers of neighbors to try; those above the searched number are passed over.
        sigmas: bandwidths to try.
        temperatures: temperatures to try, out of those of the datastore.
        lambdas: factors of r_kNN to try; those up to 1 are kNN-LM's too. 1.0 must be among them. Where Calibrated ResMem changes logits
            with r_kNN, its factors are those of the evaluation.
        recall_queries: test queries, evenly spaced, on which each search is compared with exact search.

    Raises:
        UserError: a fraction that is none, or nothing to try.
    """
    name = "study_datastore_size"
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise UserError(f"{name}.fractions = {fractions}: take numbers above 0 and up to 1")
    check_least(name, 1, recall_queries=recall_queries)
    datastore = open_datastore(run.datastore)
    cached = {split: open_queries(run, split) for split in QUERY_SPLITS}
    searched = cached["test"].rows.shape[1]
    usable = [k for k in ks if 1 <= k <= searched]
    known = [temperature for temperature in temperatures if temperature in datastore.binding.temperatures]
    if not (usable and known and sigmas and min(sigmas) > 0 and lambdas and 0 <= min(lambdas) < 1 and 1.0 in lambdas):
        raise UserError(
            f"{name}: needs 1 to {searched} in ks, sigmas above 0, some of {list(datastore.binding.temperatures)} in temperatures, 1.0 and "
            f"less in lambdas: {ks}, {sigmas}, {temperatures}, {lambdas}"
        )
    paper = Setting("resmem", min(50, searched), 1.0, 1.0, 1.0)
    files = {"datastore": "datastore/manifest.json", "index": "index/index.json", "neighbors": "neighbors/neighbors.json"}
    provenance: Record = {what: sha256(run.path / file) for what, file in files.items()}
    tried: Record = {
        "methods": list(COMPARED),
        "ks": usable,
        "sigmas": list(sigmas),
        "temperatures": known,
        "lambdas": list(lambdas),
        "recall_queries": recall_queries,
    }

    @functools.cache
    def encoded() -> tuple[Model, dict[str, dict[str, ShardedArray]]]:
        worker = EncodingWorker(run, datastore.binding, query_head)
        return worker.model, {split: _encode(run, worker, split, provenance) for split in QUERY_SPLITS}

    def gains(fraction: float) -> Record:
        model, queries = encoded()
        part = fraction_of(datastore, fraction)
        scorers = {
            split: SplitScorer(f"{split}, {fraction:.4g} of the datastore", _search(run, part, model, cached[split], queries[split]), part)
            for split in QUERY_SPLITS
        }
        validation, test = scorers["validation"], scorers["test"]
        tuned = tune(validation.count_correct(usable, list(sigmas), known, grid_of(lambdas)))
        calibrated = calibrate(validation.log_losses(list(sigmas), known, simplex_grid(lambdas)))["resmem_calibrated"]
        methods = {"ResMem (paper)": paper, "ResMem": tuned["resmem"], "kNN-LM": tuned["knnlm"]}
        predicted = test.predict(sorted({DEEPNET, *methods.values()}))
        found = {method: predicted[setting] for method, setting in methods.items()}
        found["Calibrated ResMem"] = test.distributions([calibrated])[calibrated][:2]
        found["Adaptive ResMem"] = test.adaptive(fit_gate(validation, tuned["resmem"].sigma), tuned["resmem"].sigma)[:2]
        targets, groups = np.asarray(test.queries.tokens), test.queries.groups
        row: Record = {
            "fraction": fraction,
            "rows": part.live_rows,
            "recall@k": _recall(part, queries["test"]["keys"], test.queries.rows, recall_queries),
        }
        for method in COMPARED:
            told = accuracy_metrics(found[method], predicted[DEEPNET][0], targets, groups)
            row[f"{method}, gain, %"] = 100 * told["gain"]
            row[f"{method}, 95%"] = interval(told["gain_ci95"])
        chosen = {"ResMem": tuned["resmem"], "kNN-LM": tuned["knnlm"], "Calibrated ResMem": calibrated}
        row |= {f"{method} with": hyperparameters(setting.hyperparameters()) for method, setting in chosen.items()}
        return row | {"Calibrated ResMem's form": calibrated.formula}

    rows: list[Record] = []
    for fraction in sorted(set(fractions)):
        path = run.path / FOLDER / f"fraction-{fraction!r}.json"
        with contextlib.suppress(DamagedError):  # also where it is not there
            done = read_json(path)
            if done["provenance"] == provenance and done["tried"] == tried:
                rows.append(done["row"])
                continue
        row = gains(fraction)
        write_json(path, {"provenance": provenance, "tried": tried, "row": row})
        rows.append(row)
    remove(run.path / FOLDER / ENCODED)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, method in enumerate(COMPARED):
            line(axes, number, [row["rows"] for row in rows], [row[f"{method}, gain, %"] for row in rows], method)
        axes.set_xscale("log")
        axes.set_xlabel("rows of the datastore")
        axes.set_ylabel("gain on test, %")
        axes.legend(frameon=False)

    text = (
        "Gain (TPR - FPR) on test with a part of the datastore's documents: ResMem with the paper's hyperparameters; ResMem, kNN-LM and "
        "Calibrated ResMem with those chosen on validation for each part; Adaptive ResMem with ResMem's sigma and a gate fitted there too. "
        f"Recall@k, against exact search in the same part, is of {min(recall_queries, len(cached['test'].tokens)):,} test tokens."
    )
    return write_study(run, "datastore-size", title="Size of the datastore (Figure 3a)", text=text, rows=rows, draw=draw)
