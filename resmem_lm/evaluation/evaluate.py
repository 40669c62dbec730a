"""Choose hyperparameters on validation and compare all methods on test: cached neighbors -> results.json."""

import contextlib
import importlib.metadata
import itertools
import platform
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from resmem_lm.errors import UserError
from resmem_lm.evaluation.adaptive import Gate
from resmem_lm.evaluation.candidates import DEEPNET, Setting
from resmem_lm.evaluation.examples import corrected_tokens
from resmem_lm.evaluation.neighbors import open_queries
from resmem_lm.evaluation.scorer import Predictions, SplitScorer
from resmem_lm.evaluation.statistics import accuracy_metrics, bootstrap_interval, probability_metrics
from resmem_lm.evaluation.tuning import calibrate, fit_gate, grid_of, simplex_grid, tune
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.text.shards import QUERY_SPLITS
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import stage
from resmem_lm.workdir.storage import Record, read_json, sha256, write_json

ON_SIMPLEX = ("deepnet", "knnlm", "knnlm_perplexity", "resmem_calibrated")
IN_CURVES = ("knnlm", "resmem_lambda1", "resmem")
DIFFERENCES = (("resmem_adaptive", "resmem"), ("resmem_adaptive", "knnlm"), ("resmem", "knnlm"))
SCORED_FILES = ("residual_ids.npy", "quantized_residuals.npy", "target_log_probability.npy", "log_power_sums.npy")
STAGES = ("documents", "vocabulary", "train", "build", "index", "search")
PACKAGES = ("resmem_lm", "jax", "flax", "optax", "apache-beam", "faiss-cpu", "scann", "sentencepiece", "numpy")


class Grid(NamedTuple):
    """Hyperparameters to try."""

    ks: list[int]
    sigmas: list[float]
    temperatures: list[float]
    lambdas: list[float]


Curves = dict[tuple[str, str], list[Setting]]  # (axis, method) -> settings
Found = dict[Setting, tuple[Int[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]]  # predictions, certified


class Outputs(NamedTuple):
    """Predictions for a split by all methods."""

    found: Found
    on_simplex: dict[Setting, Predictions]
    adaptive: Predictions


@stage(name="evaluate", after=("search", "build", "train"), policy="redo")
def evaluate(
    run: Run,
    *,
    ks: tuple[int, ...] | list[int] = (1, 2, 4, 8, 16, 32, 50),
    sigmas: tuple[float, ...] | list[float] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    temperatures: tuple[float, ...] | list[float] = (0.7, 1.0, 1.4),
    lambdas: tuple[float, ...] | list[float] = (0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5),
) -> Record:
    """Choose hyperparameters on validation, evaluate on test, and write WORKDIR/results.json.

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
    gate = fit_gate(scorers["validation"], methods["resmem"].sigma)
    curves = _curve_settings(methods, grid)
    outputs = {
        "validation": _predict(scorers["validation"], methods, gate),
        "test": _predict(test, methods, gate, itertools.chain(*curves.values())),
    }
    found, resmem, index = outputs["test"].found, methods["resmem"], read_json(run.index / "index.json")
    searched = read_json(run.neighbors / "neighbors.json")
    results = {
        "splits": {split: _describe_split(searched[split], scorers[split], methods, outputs[split]) for split in scorers},
        "curves": _describe_curves(curves, grid, found, np.asarray(test.queries.tokens)),
        "examples": corrected_tokens(run, test.queries, datastore, resmem, found[DEEPNET][0], found[resmem][0]),
        "datastore": {"rows": datastore.live_rows, "bytes_per_row": datastore.bytes / datastore.rows},
        "index": {"kind": index["kind"], "candidates": index["candidates"], "shards": len(index["shards"])},
        "model": read_json(run.checkpoints / "model.json")["config"],
        "documents": run.record("documents")["result"]["documents"],
        "seconds": {name: run.record(name)["seconds"] for name in STAGES},
        "versions": _versions(),
    }
    write_json(run.results, results)
    return {"sha256": sha256(run.results)}


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


def _choose(validation: SplitScorer, grid: Grid) -> dict[str, Setting]:
    """Return the settings of all methods except Adaptive ResMem."""
    ks, sigmas, temperatures, lambdas = grid
    tuned = tune(validation.count_correct(ks, sigmas, temperatures, grid_of(lambdas)))
    calibrated = calibrate(validation.log_losses(sigmas, temperatures, simplex_grid(lambdas)))
    return {
        "deepnet": DEEPNET,
        "knn": tuned["knn"],
        "knnlm": tuned["knnlm"],
        "knnlm_perplexity": calibrated["knnlm_perplexity"],
        "resmem_paper": Setting("resmem", min(50, validation.queries.rows.shape[1]), 1.0, 1.0, 1.0),
        "resmem_lambda1": tuned["resmem_lambda1"],
        "resmem": tuned["resmem"],
        "resmem_calibrated": calibrated["resmem_calibrated"],
    }


def _curve_settings(methods: dict[str, Setting], grid: Grid) -> Curves:
    """Return settings that vary k or sigma and keep a method's other hyperparameters."""
    by_k = {("k", name): [methods[name]._replace(k=k) for k in grid.ks] for name in IN_CURVES}
    return by_k | {("sigma", name): [methods[name]._replace(sigma=sigma) for sigma in grid.sigmas] for name in IN_CURVES}


def _predict(scorer: SplitScorer, methods: dict[str, Setting], gate: Gate, others: Iterable[Setting] = ()) -> Outputs:
    """Predict with all methods, and with `others` besides."""
    wanted = {setting for setting in methods.values() if setting.formula in ("resmem", "knnlm")}
    return Outputs(
        scorer.predict(sorted(wanted | set(others))),
        scorer.distributions([methods[name] for name in ON_SIMPLEX]),
        scorer.adaptive(gate, methods["resmem"].sigma),
    )


def _describe_split(searched: Record, scorer: SplitScorer, methods: dict[str, Setting], outputs: Outputs) -> Record:
    queries, targets = scorer.queries, np.asarray(scorer.queries.tokens)
    groups, deepnet = queries.groups, outputs.found[DEEPNET][0]
    methods_found = {
        name: (outputs.found.get(setting) or outputs.on_simplex[setting][:2], outputs.on_simplex.get(setting), setting.hyperparameters())
        for name, setting in methods.items()
    }
    gate_settings = {"k": queries.rows.shape[1], "sigma": methods["resmem"].sigma}
    methods_found["resmem_adaptive"] = outputs.adaptive[:2], outputs.adaptive, gate_settings
    described: Record = {}
    for name, (predictions, probabilities, hyperparameters) in methods_found.items():
        described[name] = accuracy_metrics(predictions, deepnet, targets, groups) | {"hyperparameters": hyperparameters}
        if probabilities:  # other scores are not probabilities, or are 0 for most tokens
            described[name] |= probability_metrics(probabilities, targets)
    described["deepnet"]["hyperparameters"] = {}
    described["resmem_calibrated"]["form"] = methods["resmem_calibrated"].formula
    right = {name: predictions == targets for name, ((predictions, _), *_) in methods_found.items()}
    differences = []
    for one, other in DIFFERENCES:
        difference = right[one].astype(np.float64) - right[other]
        interval = bootstrap_interval(difference, groups)
        differences.append({"method": one, "over": other, "accuracy": float(difference.mean()), "accuracy_ci95": interval})
    shown = {name: searched[name] for name in ("tokens", "documents", "recall_at_k")} | {"groups": int(groups.max()) + 1}
    return shown | {"methods": described, "differences": differences}


def _describe_curves(curves: Curves, grid: Grid, found: Found, targets: Int[np.ndarray, " tokens"]) -> Record:
    """Return test accuracy for every setting of the curves."""
    accuracy = {setting: float(np.mean(predictions == targets)) for setting, (predictions, _) in found.items()}

    def of_axis(axis: str) -> dict[str, list[float]]:
        return {name: [accuracy[setting] for setting in curves[axis, name]] for name in IN_CURVES}

    return {"k": {"values": grid.ks, "accuracy": of_axis("k")}, "sigma": {"values": grid.sigmas, "accuracy": of_axis("sigma")}}


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
