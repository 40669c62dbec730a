"""Study how the gain grows with the datastore (the paper's Figure 3a).

The study searches the run's own index and treats the documents outside a fraction as deleted. WORKDIR/derived/datastore-size keeps the
encoded queries and the result of each finished fraction, so an interrupted study resumes.
"""

import contextlib
import functools
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from resmem_lm.errors import DamagedError, UserError, check_least
from resmem_lm.evaluation.candidates import DEEPNET, Setting
from resmem_lm.evaluation.evaluate import Grid
from resmem_lm.evaluation.features import MEMORY, Source
from resmem_lm.evaluation.neighbors import Queries, open_queries, recall
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.evaluation.sources import memory_arrays
from resmem_lm.evaluation.statistics import accuracy_metrics
from resmem_lm.evaluation.tuning import calibrate, fit_gate, grid_of, simplex_grid, tune
from resmem_lm.memory.datastore import Datastore, open_datastore
from resmem_lm.memory.encode_documents import EncodingWorker, write_arrays
from resmem_lm.memory.encoder import query_head
from resmem_lm.memory.exact_index import ExactIndex
from resmem_lm.memory.open_index import search_shards
from resmem_lm.memory.suffix_index import build_suffixes, live_tokens
from resmem_lm.report.plots import Figure, line
from resmem_lm.report.tables import hyperparameters, interval
from resmem_lm.studies.sources import ALONE
from resmem_lm.studies.study import check_values, study, usable_grid, write_study
from resmem_lm.text.shards import QUERY_SPLITS, position, read_shard, shard_paths
from resmem_lm.workdir.arrays import ShardedArray, load_array
from resmem_lm.workdir.artifacts import find_record, folder_of, publish
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record, read_json, remove, sha256, write_json

GATES: dict[str, tuple[Source, ...]] = {"Adaptive ResMem": MEMORY, **ALONE}
METHODS = ("ResMem (paper)", "ResMem", "kNN-LM", "Calibrated ResMem", *GATES)
INPUTS = {"datastore": "datastore/manifest.json", "index": "index/index.json", "neighbors": "neighbors/neighbors.json"}
ENCODED = ("keys.npy", "hidden.npy")
Certified = tuple[Int[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]  # predictions, and certified flags


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
    """Measure the test gain of ResMem, in all its forms, and of kNN-LM with fractions of the datastore's documents.

    Each fraction has hyperparameters and a gate of its own, chosen and fitted on validation.

    Args:
        fractions: fractions of the datastore's rows, in whole documents; a larger fraction includes the smaller ones.
        ks: numbers of neighbors to try; those above the searched number are skipped.
        sigmas: bandwidths to try.
        temperatures: temperatures to try; those missing from the datastore are skipped.
        lambdas: factors of r_kNN to try, 1.0 among them; kNN-LM tries those up to 1. The "boosted" form of Calibrated ResMem tries
            the same factors as `evaluate`.
        recall_queries: number of evenly spaced test queries that measure the recall of each search.
    """
    name = "study_datastore_size"
    check_values(f"{name}.fractions", fractions, lambda fraction: 0 < fraction <= 1, "above 0 and up to 1")
    check_least(name, 1, recall_queries=recall_queries)
    if 1.0 not in lambdas:
        raise UserError(f"{name}.lambdas = {lambdas}: add 1.0, the paper's")
    search = FractionSearch(run)
    given = Grid(list(ks), list(sigmas), list(temperatures), list(lambdas))
    grid = usable_grid(name, given, search.neighbors, search.datastore.binding.temperatures)
    rows = [search.cached_row(fraction, grid, recall_queries) for fraction in sorted(set(fractions))]
    remove(search.encoded_folder)
    text = (
        "Gain (TPR - FPR) on test with a part of the datastore's documents: ResMem with the paper's hyperparameters; ResMem, kNN-LM and "
        "Calibrated ResMem with hyperparameters chosen on validation for each part; Adaptive ResMem with ResMem's sigma and gates fitted "
        f"on validation. Recall@k compares {min(recall_queries, search.tokens):,} test tokens with exact search in the same part."
    )
    return write_study(run, "datastore-size", title="Size of the datastore (Figure 3a)", text=text, rows=rows, draw=_draw)


def fraction_of(datastore: Datastore, fraction: float) -> Datastore:
    """Mark all documents as deleted, except the fewest with the lowest id hashes that have the given fraction of the live rows.

    A larger fraction therefore includes a smaller one. Deleted documents stay deleted.
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


class FractionSearch:
    """Search the run's validation and test queries in fractions of its datastore. The first search encodes them."""

    def __init__(self, run: Run) -> None:
        self.run, self.datastore = run, open_datastore(run.datastore)
        self.queries = {split: open_queries(run, split) for split in QUERY_SPLITS}
        self.tokens, self.neighbors = self.queries["test"].rows.shape
        self.folder = run.derived / "datastore-size"
        self.encoded_folder = self.folder / "queries"
        self.provenance: Record = {name: sha256(run.path / file) for name, file in INPUTS.items()}

    @functools.cached_property
    def worker(self) -> EncodingWorker:
        """Load the model, the vocabulary and the encoder."""
        return EncodingWorker(self.run, self.datastore.binding, lambda _: query_head)

    @functools.cached_property
    def encoded(self) -> dict[str, dict[str, ShardedArray]]:
        """Return the keys and hidden states of each split."""
        return {split: self._encode(split) for split in QUERY_SPLITS}

    def _encode(self, split: str) -> dict[str, ShardedArray]:
        folder, records = self.encoded_folder, []
        folder.mkdir(parents=True, exist_ok=True)
        for path in shard_paths(self.run, split):
            name = path.name.removesuffix(".jsonl")
            if not find_record(folder, name, self.provenance):
                tokens = self.worker.vocabulary.encode_documents(read_shard(path))
                with publish(folder, name, self.provenance, ENCODED) as attempt:
                    write_arrays(attempt.folder, tokens, self.worker.encoder, path.name)
            records.append(read_json(folder / f"{name}.json"))
        return {
            file.removesuffix(".npy"): ShardedArray([load_array(folder_of(folder, record) / file) for record in records])
            for file in ENCODED
        }

    def search(self, split: str, part: Datastore) -> Queries:
        """Return a split's queries with their neighbors in a part of the datastore."""
        queries, encoded = self.queries[split], self.encoded[split]
        rows, distances = search_shards(self.run, part, np.asarray(encoded["keys"]), self.neighbors)
        arrays = {name: np.asarray(getattr(queries, name)) for name in ("tokens", "document_lengths", "document_back")}
        arrays["hidden"] = np.asarray(encoded["hidden"])
        suffixes = [build_suffixes(live_tokens(part))]
        arrays = memory_arrays(self.worker.model, part, suffixes, (rows, distances), arrays)
        found: dict[str, Any] = {name: ShardedArray([array]) for name, array in arrays.items()}
        return queries._replace(**found)

    def recall(self, part: Datastore, rows: ShardedArray, sample: int) -> float:
        """Return recall@k of a search, measured on evenly spaced test queries."""
        spaced = np.unique(np.linspace(0, len(rows) - 1, min(sample, len(rows))).astype(np.int64))
        exact, _ = ExactIndex(part).search(self.encoded["test"]["keys"][spaced], rows.shape[1])
        return recall(rows[spaced], exact)

    def row(self, fraction: float, grid: Grid, recall_queries: int) -> Record:
        """Return the table's row for a fraction."""
        part = fraction_of(self.datastore, fraction)
        scorers = {
            split: SplitScorer(f"{split}, {fraction:.4g} of the datastore", self.search(split, part), part) for split in QUERY_SPLITS
        }
        chosen = _choose(scorers["validation"], grid)
        queries = scorers["test"].queries
        row: Record = {
            "fraction": fraction,
            "rows": part.live_rows,
            "recall@k": self.recall(part, queries.rows, recall_queries),
        }
        predicted = _predict(scorers, chosen, min(50, self.neighbors))
        for method in METHODS:
            metrics = accuracy_metrics(predicted[method], predicted["DeepNet"][0], np.asarray(queries.tokens), queries.groups)
            row |= {f"{method}, gain, %": 100 * metrics["gain"], f"{method}, 95%": interval(metrics["gain_ci95"])}
        row |= {f"{method}, hyperparameters": hyperparameters(setting.hyperparameters()) for method, setting in chosen.items()}
        return row | {"Calibrated ResMem, form": chosen["Calibrated ResMem"].formula}

    def cached_row(self, fraction: float, grid: Grid, recall_queries: int) -> Record:
        """Return the table's row for a fraction. Compute it unless an earlier study finished it with the same settings."""
        path = self.folder / f"fraction-{fraction!r}.json"
        settings = {"methods": list(METHODS), **grid._asdict(), "recall_queries": recall_queries}
        with contextlib.suppress(DamagedError):  # also raised for a missing file
            done = read_json(path)
            if done.get("provenance") == self.provenance and done.get("settings") == settings:
                finished: Record = done["row"]
                return finished
        row = self.row(fraction, grid, recall_queries)
        write_json(path, {"provenance": self.provenance, "settings": settings, "row": row})
        return row


def _choose(validation: SplitScorer, grid: Grid) -> dict[str, Setting]:
    """Return the best hyperparameters on validation for each tuned method."""
    tuned = tune(validation.count_correct(grid.ks, grid.sigmas, grid.temperatures, grid_of(grid.lambdas)))
    calibrated = calibrate(validation.log_losses(grid.sigmas, grid.temperatures, simplex_grid(grid.lambdas)))
    return {"ResMem": tuned["resmem"], "kNN-LM": tuned["knnlm"], "Calibrated ResMem": calibrated["resmem_calibrated"]}


def _predict(scorers: dict[str, SplitScorer], chosen: dict[str, Setting], paper_k: int) -> dict[str, Certified]:
    """Return the test predictions of each method."""
    test, calibrated, sigma = scorers["test"], chosen["Calibrated ResMem"], chosen["ResMem"].sigma
    settings = {"DeepNet": DEEPNET, "ResMem (paper)": Setting("resmem", paper_k, 1.0, 1.0, 1.0)}
    settings |= {method: chosen[method] for method in ("ResMem", "kNN-LM")}
    found = test.predict(sorted(set(settings.values())))
    predicted = {method: found[setting] for method, setting in settings.items()}
    predicted["Calibrated ResMem"] = test.distributions([calibrated])[calibrated][:2]
    gates = {title: fit_gate(scorers["validation"], sigma, sources) for title, sources in GATES.items()}
    return predicted | {title: test.adaptive(gate)[:2] for title, gate in gates.items()}


def _draw(figure: Figure, rows: list[Record]) -> None:
    axes = figure.subplots()
    for number, method in enumerate(method for method in METHODS if method not in ALONE):
        line(axes, number, [row["rows"] for row in rows], [row[f"{method}, gain, %"] for row in rows], method)
    axes.set_xscale("log")
    axes.set_xlabel("rows of the datastore")
    axes.set_ylabel("gain on test, %")
    axes.legend(frameon=False)
