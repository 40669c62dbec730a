"""Choose hyperparameters on validation and compare all methods on test: cached neighbors -> results.json."""

import contextlib
import importlib.metadata
import itertools
import platform
from typing import NamedTuple

import numpy as np

from resmem_lm.errors import UserError
from resmem_lm.evaluation.adaptive import Adaptive
from resmem_lm.evaluation.candidates import DEEPNET, Setting
from resmem_lm.evaluation.document_methods import DocumentMethods, fit_document_methods, predict_with_document
from resmem_lm.evaluation.examples import EXAMPLES, corrected_tokens, draw_tokens
from resmem_lm.evaluation.neighbors import open_queries
from resmem_lm.evaluation.saved_gates import save_gates
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.evaluation.statistics import Found, accuracy_metrics, bootstrap_interval, probability_metrics
from resmem_lm.evaluation.tuning import Grid, calibrate, fit_gate, grid_of, simplex_grid, tune
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.text.shards import QUERY_SPLITS
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import stage
from resmem_lm.workdir.storage import Record, read_json, sha256, write_json

ON_SIMPLEX = ("deepnet", "knnlm", "knnlm_perplexity", "knnlm_confident", "resmem_calibrated")
IN_CURVES = ("knnlm", "resmem_lambda1", "resmem")
DIFFERENCES = (
    ("resmem_adaptive", "resmem"),
    ("resmem_adaptive", "knnlm"),
    ("resmem", "knnlm"),
    ("resmem_adaptive_document", "resmem_adaptive"),
    ("resmem_adaptive_document", "knnlm_cache"),
)
SCORED_FILES = ("residual_ids.npy", "quantized_residuals.npy", "target_log_probability.npy", "log_power_sums.npy")
STAGES = ("documents", "vocabulary", "train", "build", "index", "search")
PACKAGES = ("resmem_lm", "jax", "flax", "optax", "apache-beam", "faiss-cpu", "scann", "sentencepiece", "numpy")


Curves = dict[tuple[str, str], list[Setting]]  # (axis, method) -> settings


class Methods(NamedTuple):
    """The settings of the methods without a gate, Adaptive ResMem, and the methods that use the document, if it is a memory."""

    settings: dict[str, Setting]
    adaptive: Adaptive
    document: DocumentMethods | None


@stage(name="evaluate", after=("search", "build", "train"), policy="redo")
def evaluate(
    run: Run,
    *,
    ks: tuple[int, ...] | list[int] = (1, 2, 4, 8, 16, 32, 50),
    sigmas: tuple[float, ...] | list[float] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    temperatures: tuple[float, ...] | list[float] = (0.7, 1.0, 1.4),
    lambdas: tuple[float, ...] | list[float] = (0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5),
) -> Record:
    """Choose hyperparameters on validation, evaluate on test, and write WORKDIR/results.json and the gates of Adaptive ResMem.

    Args:
        ks: numbers of neighbors to try; those above the searched number are skipped.
        sigmas: bandwidths to try.
        temperatures: temperatures to try; the datastore must be built for all of them.
        lambdas: factors of r_kNN to try, 1.0 among them; kNN-LM tries those up to 1.

    Raises:
        UserError: a temperature that the datastore was not built for, or no usable k.
    """
    datastore = open_datastore(run.datastore, checksums=SCORED_FILES)
    scorers = {split: SplitScorer(split, open_queries(run, split), datastore) for split in QUERY_SPLITS}
    test = scorers["test"]
    grid = _usable_grid(Grid(list(ks), list(sigmas), list(temperatures), list(lambdas)), test)
    methods = _choose(scorers["validation"], grid)
    curves = _curve_settings(methods.settings, grid)
    on_test, accuracy = _predict(test, methods, list(itertools.chain(*curves.values())))
    found = {"validation": _predict(scorers["validation"], methods, [])[0], "test": on_test}
    with_document = {"resmem_adaptive_document": methods.document.adaptive} if methods.document else {}
    index, searched = read_json(run.index / "index.json"), read_json(run.neighbors / "neighbors.json")
    results = {
        "splits": {split: _describe_split(searched[split], scorers[split], methods, found[split]) for split in scorers},
        "curves": _describe_curves(curves, grid, accuracy),
        "examples": _examples(run, test, methods, found["test"]),
        "datastore": {"rows": datastore.live_rows, "bytes_per_row": datastore.bytes / datastore.rows},
        "index": {"kind": index["kind"], "candidates": index["candidates"], "shards": len(index["shards"])},
        "model": read_json(run.checkpoints / "model.json")["config"],
        "documents": run.record("documents")["result"]["documents"],
        "seconds": {name: run.record(name)["seconds"] for name in STAGES},
        "versions": _versions(),
    }
    save_gates(run, {"resmem_adaptive": methods.adaptive} | with_document)
    write_json(run.results, results)
    return {"sha256": sha256(run.results), "gates": sha256(run.gates)}


def _usable_grid(grid: Grid, scorer: SplitScorer) -> Grid:
    """Check the grid and drop each k above the searched number."""
    ks, sigmas, temperatures, lambdas = grid
    searched, available = scorer.queries.rows.shape[1], scorer.temperatures
    if missing := [temperature for temperature in temperatures if temperature not in available]:
        raise UserError(f"evaluate.temperatures: the datastore has no sums for T = {missing}; choose from {available}")
    if not sigmas or not lambdas or min(sigmas) <= 0 or min(lambdas) < 0:
        raise UserError(f"evaluate: needs sigmas above 0 and lambdas of 0 or more; has {sigmas}, {lambdas}")
    usable = [k for k in ks if 1 <= k <= searched]
    if not usable or 1.0 not in lambdas or min(lambdas) >= 1 or 1.0 not in temperatures:
        raise UserError(
            f"evaluate: needs a number from 1 to {searched} in ks, 1.0 and a smaller number in lambdas, 1.0 in temperatures; "
            f"has {ks}, {lambdas}, {temperatures}"
        )
    return grid._replace(ks=usable)


def _choose(validation: SplitScorer, grid: Grid) -> Methods:
    """Choose the hyperparameters of all methods, and fit the gates."""
    ks, sigmas, temperatures, lambdas = grid
    tuned = tune(validation.count_correct(ks, sigmas, temperatures, grid_of(lambdas)))
    calibrated = calibrate(validation.log_losses(sigmas, temperatures, simplex_grid(lambdas)))
    k = min(50, validation.queries.rows.shape[1])
    settings = {
        "deepnet": DEEPNET,
        "knn": tuned["knn"],
        "knnlm": tuned["knnlm"],
        "knnlm_perplexity": calibrated["knnlm_perplexity"],
        "knnlm_confident": Setting("confident", k, 1.0, 1.0, 1.0),
        "resmem_paper": Setting("resmem", k, 1.0, 1.0, 1.0),
        "resmem_lambda1": tuned["resmem_lambda1"],
        "resmem": tuned["resmem"],
        "resmem_calibrated": calibrated["resmem_calibrated"],
    }
    sigma = settings["resmem"].sigma
    document = None
    if validation.queries.document_back.shape[1]:
        document = fit_document_methods(validation, grid, settings["knnlm"], sigma)
    return Methods(settings, fit_gate(validation, sigma), document)


def _curve_settings(methods: dict[str, Setting], grid: Grid) -> Curves:
    """Return settings that vary k or sigma and keep a method's other hyperparameters."""
    by_k = {("k", name): [methods[name]._replace(k=k) for k in grid.ks] for name in IN_CURVES}
    return by_k | {("sigma", name): [methods[name]._replace(sigma=sigma) for sigma in grid.sigmas] for name in IN_CURVES}


def _predict(scorer: SplitScorer, methods: Methods, others: list[Setting]) -> tuple[dict[str, Found], dict[Setting, float]]:
    """Predict with all methods, and return the accuracy of other settings too: one pass over the queries serves both."""
    settings, targets = methods.settings, np.asarray(scorer.queries.tokens)
    on_simplex = scorer.distributions([settings[name] for name in ON_SIMPLEX])
    found = scorer.predict(sorted({setting for setting in (*settings.values(), *others) if setting.formula in ("resmem", "knnlm")}))
    by_name = {
        name: Found(found.get(setting) or on_simplex[setting][:2], on_simplex.get(setting), setting.hyperparameters())
        for name, setting in settings.items()
    }
    by_name["deepnet"] = by_name["deepnet"]._replace(hyperparameters={})
    adaptive = scorer.adaptive(methods.adaptive)
    by_name["resmem_adaptive"] = Found(adaptive[:2], adaptive, scorer.gate_hyperparameters(methods.adaptive))
    accuracy = {setting: float(np.mean(found[setting][0] == targets)) for setting in others}
    return by_name | (predict_with_document(scorer, methods.document) if methods.document else {}), accuracy


def _describe_split(searched: Record, scorer: SplitScorer, methods: Methods, found: dict[str, Found]) -> Record:
    targets, groups = np.asarray(scorer.queries.tokens), scorer.queries.groups
    deepnet = found["deepnet"].predictions[0]
    described: Record = {}
    for name, (predictions, probabilities, hyperparameters) in found.items():
        described[name] = accuracy_metrics(predictions, deepnet, targets, groups) | {"hyperparameters": hyperparameters}
        if probabilities:  # other scores are not probabilities, or are 0 for most tokens
            described[name] |= probability_metrics(probabilities, targets)
    described["resmem_calibrated"]["form"] = methods.settings["resmem_calibrated"].formula
    right = {name: method.predictions[0] == targets for name, method in found.items()}
    differences = []
    for one, other in DIFFERENCES:
        if one in right:
            difference = right[one].astype(np.float64) - right[other]
            interval = bootstrap_interval(difference, groups)
            differences.append({"method": one, "over": other, "accuracy": float(difference.mean()), "accuracy_ci95": interval})
    shown = {name: searched[name] for name in ("tokens", "documents", "recall_at_k")} | {"groups": int(groups.max()) + 1}
    return shown | {"methods": described, "differences": differences}


def _describe_curves(curves: Curves, grid: Grid, accuracy: dict[Setting, float]) -> Record:
    """Return test accuracy for every setting of the curves."""

    def of_axis(axis: str) -> dict[str, list[float]]:
        return {name: [accuracy[setting] for setting in curves[axis, name]] for name in IN_CURVES}

    return {"k": {"values": grid.ks, "accuracy": of_axis("k")}, "sigma": {"values": grid.sigmas, "accuracy": of_axis("sigma")}}


def _examples(run: Run, test: SplitScorer, methods: Methods, found: dict[str, Found]) -> list[Record]:
    """Describe test tokens that ResMem corrects, with what each source adds to Adaptive ResMem's probability of the true token."""
    targets = np.asarray(test.queries.tokens)
    deepnet, corrected = (found[name].predictions[0] for name in ("deepnet", "resmem"))
    chosen = draw_tokens(np.flatnonzero((deepnet != targets) & (corrected == targets)), EXAMPLES)
    examples = corrected_tokens(run, test.queries, test.datastore, methods.settings["resmem"], deepnet, corrected, chosen)
    adaptive = methods.document.adaptive if methods.document else methods.adaptive
    influence = test.influence(adaptive, chosen, targets[chosen])
    return [example | {"influence": changes} for example, changes in zip(examples, influence, strict=True)]


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
