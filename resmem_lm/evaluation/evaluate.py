"""Neighbors -> the table: hyperparameters chosen on validation, results told on test."""

import importlib.metadata
import platform
from typing import Any

import numpy as np
from jaxtyping import Bool

from resmem_lm.errors import UserError
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

DIFFERENCES = (("resmem_adaptive", "resmem"), ("resmem_adaptive", "knnlm"), ("resmem", "knnlm"))


@stage(name="evaluate", after=("search", "build", "train"), policy="redo")
def evaluate(
    run: Run,
    *,
    ks: tuple[int, ...] | list[int] = (1, 2, 4, 8, 16, 32, 50),
    sigmas: tuple[float, ...] | list[float] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    temperatures: tuple[float, ...] | list[float] = (0.7, 1.0, 1.4),
    lambdas: tuple[float, ...] | list[float] = (0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5),
) -> Record:
    """Chooses hyperparameters on validation, evaluates on test, and writes WORKDIR/results.json.

    Args:
        ks: numbers of neighbors to try; those above the searched number are passed over.
        sigmas: bandwidths to try.
        temperatures: temperatures to try, out of those the datastore was built for.
        lambdas: factors of r_kNN to try; those up to 1 are kNN-LM's too. 1.0 must be among them.

    Raises:
        UserError: a temperature that the datastore has no powers' sums for, or no usable k.
    """
    datastore = open_datastore(run.datastore)
    datastore.check_files(*(f"{name}.npy" for name in ("residual_ids", "quantized_residuals", "target_log_probability", "log_power_sums")))
    missing = [t for t in temperatures if t not in datastore.binding.temperatures]
    if missing:
        raise UserError(
            f"evaluate.temperatures: the datastore was built for {list(datastore.binding.temperatures)}, not {missing}: take some of those"
        )
    scorers = {split: SplitScorer(split, open_queries(run, split), datastore) for split in QUERY_SPLITS}
    if not sigmas or not lambdas or min(sigmas) <= 0 or min(lambdas) < 0:
        raise UserError(f"evaluate: needs sigmas above 0 and lambdas of 0 or more; has {sigmas}, {lambdas}")
    searched = scorers["test"].queries.rows.shape[1]
    usable = [k for k in ks if 1 <= k <= searched]
    if not usable or 1.0 not in lambdas or min(lambdas) >= 1 or 1.0 not in temperatures:
        raise UserError(
            f"evaluate: needs 1 to {searched} in ks, 1.0 and less in lambdas, 1.0 in temperatures: {ks}, {lambdas}, {temperatures}"
        )

    grid = grid_of(lambdas)
    tuned = tune(scorers["validation"].count_correct(usable, list(sigmas), list(temperatures), grid))
    paper = Setting("resmem", min(50, searched), 1.0, 1.0, 1.0)
    calibrated = calibrate(scorers["validation"].log_losses(list(sigmas), list(temperatures), simplex_grid(lambdas)))
    methods = {
        "deepnet": DEEPNET,
        "knn": tuned["knn"],
        "knnlm": tuned["knnlm"],
        "knnlm_perplexity": calibrated["knnlm_perplexity"],
        "resmem_paper": paper,
        "resmem_lambda1": tuned["resmem_lambda1"],
        "resmem": tuned["resmem"],
        "resmem_calibrated": calibrated["resmem_calibrated"],
    }
    on_simplex = [methods[name] for name in ("deepnet", "knnlm", "knnlm_perplexity", "resmem_calibrated")]
    sigma = tuned["resmem"].sigma
    gate = fit_gate(scorers["validation"], sigma)
    lines = ("knnlm", "resmem_lambda1", "resmem")
    curves = {
        "k": {name: [methods[name]._replace(k=k) for k in usable] for name in lines},
        "sigma": {name: [methods[name]._replace(sigma=sigma) for sigma in sigmas] for name in lines},
    }
    results: Record = {"splits": {}}
    for split, scorer in scorers.items():
        wanted = {setting for setting in methods.values() if setting.formula in grid}
        if split == "test":
            wanted |= {setting for by_name in curves.values() for settings in by_name.values() for setting in settings}
        found = scorer.predict(sorted(wanted))
        told = scorer.distributions(on_simplex)
        results["splits"][split] = _describe_split(run, split, scorer, methods, found, told, scorer.adaptive(gate, sigma))
        if split == "test":
            targets = np.asarray(scorer.queries.tokens)
            results["curves"] = {
                axis: {
                    "values": usable if axis == "k" else list(sigmas),
                    "accuracy": {name: [float(np.mean(found[s][0] == targets)) for s in settings] for name, settings in by_name.items()},
                }
                for axis, by_name in curves.items()
            }
            deepnet, corrected = found[methods["deepnet"]][0], found[methods["resmem"]][0]
            results["examples"] = corrected_tokens(run, scorer.queries, datastore, methods["resmem"], deepnet, corrected)
    results["datastore"] = {"rows": datastore.live_rows, "bytes_per_row": datastore.bytes / datastore.rows}
    index = read_json(run.index / "index.json")
    results["index"] = {"kind": index["kind"], "candidates": index["candidates"], "shards": len(index["shards"])}
    results["model"] = read_json(run.checkpoints / "model.json")["config"]
    records = {name: run.record(name) for name in ("documents", "vocabulary", "train", "build", "index", "search")}
    results["documents"] = records["documents"]["result"]["documents"]
    results["seconds"] = {name: record["seconds"] for name, record in records.items()}
    results["versions"] = {"python": platform.python_version()} | {
        name: importlib.metadata.version(name)
        for name in ("resmem_lm", "jax", "flax", "optax", "apache-beam", "faiss-cpu", "scann", "sentencepiece", "numpy")
        if _installed(name)
    }
    write_json(run.results, results)
    return {"sha256": sha256(run.results)}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _describe_split(
    run: Run,
    split: str,
    scorer: SplitScorer,
    methods: dict[str, Setting],
    found: dict[Setting, Any],
    told: dict[Setting, Predictions],
    adapted: Predictions,
) -> Record:
    groups, targets = scorer.queries.groups, np.asarray(scorer.queries.tokens)
    deepnet = found[methods["deepnet"]][0]
    described: Record = {}
    right: dict[str, Bool[np.ndarray, " tokens"]] = {}
    for name, setting in methods.items():
        predictions = found[setting] if setting in found else told[setting][:2]
        right[name] = predictions[0] == targets
        described[name] = accuracy_metrics(predictions, deepnet, targets, groups) | {"hyperparameters": setting.hyperparameters()}
        # ResMem's scores are not on the simplex, and kNN alone gives most tokens probability 0.
        described[name] |= probability_metrics(told[setting], targets) if setting in told else {}
    described["deepnet"]["hyperparameters"] = {}
    described["resmem_calibrated"]["form"] = methods["resmem_calibrated"].formula
    described["resmem_adaptive"] = accuracy_metrics(adapted[:2], deepnet, targets, groups) | probability_metrics(adapted, targets)
    described["resmem_adaptive"]["hyperparameters"] = {"k": scorer.queries.rows.shape[1], "sigma": methods["resmem"].sigma}
    right["resmem_adaptive"] = adapted.predictions == targets
    differences = []
    for one, other in DIFFERENCES:
        difference = right[one].astype(np.float64) - right[other]
        interval = bootstrap_interval(difference, groups)
        differences.append({"method": one, "over": other, "accuracy": float(difference.mean()), "accuracy_ci95": interval})
    facts = read_json(run.neighbors / "neighbors.json")[split]
    shown = {name: facts[name] for name in ("tokens", "documents", "recall_at_k")} | {"groups": int(groups.max()) + 1}
    return shown | {"methods": described, "differences": differences}
