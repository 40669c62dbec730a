"""Neighbours -> the table: hyperparameters chosen on validation, results told on test."""

import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from resmem_lm import adaptive
from resmem_lm.calibrated import SimplexFormula, calibration_error
from resmem_lm.candidates import DEEPNET, Formula, Setting
from resmem_lm.datastore import open_datastore
from resmem_lm.errors import UserError
from resmem_lm.examples import mended_tokens
from resmem_lm.scoring import SplitScorer, Told
from resmem_lm.search import QUERY_SPLITS, open_queries
from resmem_lm.storage import AnyPath, read_json, sha256, write_json
from resmem_lm.workdir import Record, stage

BOOTSTRAP_SAMPLES = 2000
BOOSTS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)  # lambda of "boosted", where r_kNN is a change of the logits
FIT_TOKENS = 2**16  # of validation, that the adaptive gate is fitted to
DIFFERENCES = (("resmem_adaptive", "resmem"), ("resmem_adaptive", "knnlm"), ("resmem", "knnlm"))


def tune(counts: dict[Setting, int]) -> dict[str, Setting]:
    """The settings with most right predictions: of kNN alone, kNN-LM, and ResMem with lambda 1 and with any lambda."""

    def winner(allowed: list[Setting]) -> Setting:
        return max(allowed, key=counts.__getitem__)  # the first of those

    resmem, knnlm = ([s for s in counts if s.formula == formula] for formula in ("resmem", "knnlm"))
    return {
        "knn": winner([s for s in knnlm if s.lambda_ == 1])._replace(temperature=1.0),  # p_kNN has none
        "knnlm": winner([s for s in knnlm if s.lambda_ < 1]),
        "resmem_lambda1": winner([s for s in resmem if s.lambda_ == 1]),
        "resmem": winner(resmem),
    }


def calibrate(losses: dict[Setting, float]) -> dict[str, Setting]:
    """The settings under which the true tokens are most probable: of kNN-LM, and of Calibrated ResMem in either form."""

    def winner(*formulas: Formula) -> Setting:
        return min((setting for setting in losses if setting.formula in formulas), key=lambda setting: losses[setting])

    return {"knnlm_perplexity": winner("knnlm"), "resmem_calibrated": winner("boosted", "clipped")}


def grid_of(lambdas: Sequence[float]) -> dict[Formula, list[float]]:
    """What `tune` chooses among: every lambda for ResMem, those up to 1 for kNN-LM."""
    return {"resmem": list(lambdas), "knnlm": [value for value in lambdas if value <= 1]}


def simplex_grid(lambdas: Sequence[float]) -> dict[SimplexFormula, list[float]]:
    """What `calibrate` chooses among. kNN alone, of lambda 1, gives most tokens no probability."""
    return {"knnlm": [value for value in lambdas if value < 1], "boosted": list(BOOSTS), "clipped": list(lambdas)}


def fit_gate(validation: SplitScorer, sigma: float) -> adaptive.Gate:
    """Adaptive ResMem's gate, fitted on the tokens of validation with all of their neighbours."""
    return adaptive.fit(*validation.known(sigma, FIT_TOKENS))


def bootstrap_interval(values: Float[np.ndarray, " tokens"], groups: Int[np.ndarray, " tokens"]) -> tuple[float, float] | None:
    """95% interval of the mean of `values` over tokens, groups drawn with replacement (tokens of one are not independent).

    Args:
        values: of each token.
        groups: the number of its document, or of the work that has several (`Queries.groups`): 0, 1, ...

    Returns:
        Its ends; None for a single group, which says nothing of others.
    """
    sums, tokens = np.bincount(groups, weights=values), np.bincount(groups)
    if len(sums) < 2:
        return None
    draws = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=BOOTSTRAP_SAMPLES)
    means = (draws @ sums) / (draws @ tokens)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def describe(
    found: tuple[Int[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]],
    deepnet: Int[np.ndarray, " tokens"],
    targets: Int[np.ndarray, " tokens"],
    groups: Int[np.ndarray, " tokens"],
) -> Record:
    """Accuracy, TPR (DeepNet wrong, this right), FPR (the reverse) and gain = TPR - FPR, as shares of all tokens (paper, Table 2)."""
    predictions, sure = found
    right, deepnet_right = predictions == targets, deepnet == targets
    tpr, fpr = float(np.mean(right & ~deepnet_right)), float(np.mean(~right & deepnet_right))
    return {
        "accuracy": float(np.mean(right)),
        "accuracy_ci95": bootstrap_interval(right.astype(np.float64), groups),
        "tpr": tpr,
        "fpr": fpr,
        "gain": tpr - fpr,
        "gain_ci95": bootstrap_interval(right.astype(np.float64) - deepnet_right, groups),
        "certified": float(np.mean(sure)),
    }


def describe_distribution(told: Told, targets: Int[np.ndarray, " tokens"]) -> Record:
    """Perplexity and expected calibration error of a method whose scores are probabilities."""
    least = np.finfo(np.float32).tiny  # a token may be less probable than float32 can say
    return {
        "perplexity": float(np.exp(-np.mean(np.log(np.maximum(told.target_probability, least), dtype=np.float64)))),
        "calibration_error": calibration_error(told.confidence, told.predictions == targets),
    }


@stage(name="evaluate", after=("search", "build", "train"), output="results.json", redo=True)
def evaluate(
    workdir: AnyPath,
    *,
    ks: tuple[int, ...] | list[int] = (1, 2, 4, 8, 16, 32, 50),
    sigmas: tuple[float, ...] | list[float] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    temperatures: tuple[float, ...] | list[float] = (0.7, 1.0, 1.4),
    lambdas: tuple[float, ...] | list[float] = (0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5),
) -> Record:
    """Chooses hyperparameters on validation, evaluates on test, and writes WORKDIR/results.json.

    Args:
        ks: numbers of neighbours to try; those above the searched number are passed over.
        sigmas: bandwidths to try.
        temperatures: temperatures to try, out of those the datastore was built for.
        lambdas: factors of r_kNN to try; those up to 1 are kNN-LM's too. 1.0 must be among them.

    Raises:
        UserError: a temperature that the datastore has no powers' sums for, or no usable k.
    """
    datastore = open_datastore(workdir / "datastore")
    datastore.check_files(*(f"{name}.npy" for name in ("residual_ids", "residual_codes", "target_log_probability", "log_power_sums")))
    missing = [t for t in temperatures if t not in datastore.binding.temperatures]
    if missing:
        raise UserError(
            f"evaluate.temperatures: the datastore was built for {list(datastore.binding.temperatures)}, not {missing}: take some of those"
        )
    scorers = {split: SplitScorer(split, open_queries(workdir, split), datastore) for split in QUERY_SPLITS}
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
        results["splits"][split] = _describe_split(workdir, split, scorer, methods, found, told, scorer.adaptive(gate, sigma))
        if split == "test":
            targets = np.asarray(scorer.queries.tokens)
            results["curves"] = {
                axis: {
                    "values": usable if axis == "k" else list(sigmas),
                    "accuracy": {name: [float(np.mean(found[s][0] == targets)) for s in settings] for name, settings in by_name.items()},
                }
                for axis, by_name in curves.items()
            }
            deepnet, mended = found[methods["deepnet"]][0], found[methods["resmem"]][0]
            results["examples"] = mended_tokens(workdir, scorer.queries, datastore, methods["resmem"], deepnet, mended)
    results["datastore"] = {"rows": datastore.remembered_rows, "bytes_per_row": datastore.bytes / datastore.rows}
    index = read_json(workdir / "index" / "index.json")
    results["index"] = {"kind": index["kind"], "candidates": index["candidates"], "shards": len(index["shards"])}
    results["model"] = read_json(workdir / "checkpoints" / "model.json")["config"]
    records = {
        name: read_json(workdir / "stages" / f"{name}.json") for name in ("documents", "vocabulary", "train", "build", "index", "search")
    }
    results["documents"] = records["documents"]["result"]["documents"]
    results["seconds"] = {name: record["seconds"] for name, record in records.items()}
    results["versions"] = {"python": platform.python_version()} | {
        name: importlib.metadata.version(name)
        for name in ("resmem_lm", "jax", "flax", "optax", "apache-beam", "faiss-cpu", "scann", "sentencepiece", "numpy")
        if _installed(name)
    }
    write_json(workdir / "results.json", results)
    return {"sha256": sha256(workdir / "results.json")}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _describe_split(
    workdir: AnyPath,
    split: str,
    scorer: SplitScorer,
    methods: dict[str, Setting],
    found: dict[Setting, Any],
    told: dict[Setting, Told],
    adapted: Told,
) -> Record:
    groups, targets = scorer.queries.groups, np.asarray(scorer.queries.tokens)
    deepnet = found[methods["deepnet"]][0]
    described: Record = {}
    right: dict[str, Bool[np.ndarray, " tokens"]] = {}
    for name, setting in methods.items():
        predictions = found[setting] if setting in found else told[setting][:2]
        right[name] = predictions[0] == targets
        described[name] = describe(predictions, deepnet, targets, groups) | {"hyperparameters": setting.hyperparameters()}
        # ResMem's scores are not on the simplex, and kNN alone gives most tokens probability 0.
        described[name] |= describe_distribution(told[setting], targets) if setting in told else {}
    described["deepnet"]["hyperparameters"] = {}
    described["resmem_calibrated"]["form"] = methods["resmem_calibrated"].formula
    described["resmem_adaptive"] = describe(adapted[:2], deepnet, targets, groups) | describe_distribution(adapted, targets)
    described["resmem_adaptive"]["hyperparameters"] = {"k": scorer.queries.rows.shape[1], "sigma": methods["resmem"].sigma}
    right["resmem_adaptive"] = adapted.predictions == targets
    differences = []
    for one, other in DIFFERENCES:
        difference = right[one].astype(np.float64) - right[other]
        interval = bootstrap_interval(difference, groups)
        differences.append({"method": one, "over": other, "accuracy": float(difference.mean()), "accuracy_ci95": interval})
    facts = read_json(workdir / "neighbors" / "neighbors.json")[split]
    shown = {name: facts[name] for name in ("tokens", "documents", "recall_at_k")} | {"groups": int(groups.max()) + 1}
    return shown | {"methods": described, "differences": differences}
