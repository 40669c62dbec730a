"""Study how test accuracy depends on k, sigma, T and lambda (the paper's Figures 5 and 6), without a new search."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from resmem_lm.evaluation.candidates import Setting
from resmem_lm.evaluation.features import MEMORY, Source
from resmem_lm.evaluation.neighbors import Queries, open_queries, truncate_neighbors
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.evaluation.tuning import fit_gate
from resmem_lm.memory.datastore import Datastore, open_datastore
from resmem_lm.report.plots import INK, Figure, legend_above, line, log_ticks
from resmem_lm.report.tables import hyperparameters
from resmem_lm.studies.study import check_values, study, write_study
from resmem_lm.text.shards import QUERY_SPLITS
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record, read_json

AXES = {"k": "k", "sigma": "sigma", "T": "temperature", "lambda": "lambda_"}
LINES = {  # by the method's name in results.json; the last is of this study alone
    "resmem_paper": "ResMem (paper)",
    "resmem": "ResMem",
    "resmem_calibrated": "Calibrated ResMem",
    "resmem_adaptive": "Adaptive ResMem",
    "neighbors_alone": "Adaptive ResMem (neighbors alone)",
}
Values = dict[str, Sequence[int | float]]  # by hyperparameter, in ascending order
Found = dict[tuple[str, int | float], Int[np.ndarray, " queries"]]  # predictions by hyperparameter and value


@study(name="sensitivity")
def study_sensitivity(
    run: Run,
    *,
    ks: tuple[int, ...] | list[int] = (1, 2, 4, 8, 16, 32, 50),
    sigmas: tuple[float, ...] | list[float] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    lambdas: tuple[float, ...] | list[float] = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0),
    boosts: tuple[float, ...] | list[float] = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
    gate_ks: tuple[int, ...] | list[int] = (1, 4, 16, 50),
    gate_sigmas: tuple[float, ...] | list[float] = (0.25, 1.0, 4.0),
) -> Record:
    """Measure test accuracy while one of k, sigma, T and lambda varies. The others are the paper's, or those chosen on validation.

    Args:
        ks: numbers of neighbors; those above the searched number are skipped.
        sigmas: bandwidths.
        lambdas: factors of r_kNN; 0 is DeepNet. Temperatures are those of the datastore.
        boosts: factors of r_kNN for the "boosted" form of Calibrated ResMem, which adds r_kNN to the logits.
        gate_ks: numbers of neighbors for Adaptive ResMem. A gate is fitted for each, which takes most of the time.
        gate_sigmas: bandwidths for Adaptive ResMem, with a gate fitted for each.
    """
    for name, values in {"ks": ks, "sigmas": sigmas, "gate_ks": gate_ks, "gate_sigmas": gate_sigmas}.items():
        check_values(f"study_sensitivity.{name}", values, lambda value: value > 0, "above 0")
    for name, values in {"lambdas": lambdas, "boosts": boosts}.items():
        check_values(f"study_sensitivity.{name}", values, lambda value: value >= 0, "of 0 or more")
    datastore = open_datastore(run.datastore)
    queries = {split: open_queries(run, split) for split in QUERY_SPLITS}
    searched = queries["test"].rows.shape[1]
    varied: Values = {
        "k": sorted({k for k in ks if k <= searched}),
        "sigma": sorted(sigmas),
        "T": sorted(datastore.binding.temperatures),
        "lambda": sorted(lambdas),
    }
    methods = read_json(run.results)["splits"]["test"]["methods"]
    boosted = methods["resmem_calibrated"]["form"] == "boosted"
    found = _vary_fixed(SplitScorer("test", queries["test"], datastore), methods, varied, sorted(boosts) if boosted else sorted(lambdas))
    gate_varied: Values = {"k": sorted({k for k in gate_ks if k <= searched}), "sigma": sorted(gate_sigmas)}
    sigma = methods["resmem_adaptive"]["hyperparameters"]["sigma"]
    found["resmem_adaptive"] = _vary_adaptive(queries, datastore, sigma, gate_varied, MEMORY)
    found["neighbors_alone"] = _vary_adaptive(queries, datastore, sigma, gate_varied, ("neighbors",))
    rows = _rows(found, queries["test"].tokens)
    paper = hyperparameters(methods["resmem_paper"]["hyperparameters"])
    text = (
        f"One hyperparameter varies, and the others are the paper's ({paper}) or those chosen on validation. "
        "Adaptive ResMem has neither T nor lambda; its gate is fitted on validation for each k and sigma."
    )
    text += " Calibrated ResMem's lambda is a factor in the logits, not comparable with the others." if boosted else ""
    draw = functools.partial(_draw, varied=varied, deepnet=100 * methods["deepnet"]["accuracy"], boosted=boosted)
    return write_study(run, "sensitivity", title="Sensitivity (Figures 5 and 6)", text=text, rows=rows, draw=draw)


def _vary_fixed(test: SplitScorer, methods: Record, varied: Values, calibrated_lambdas: Sequence[int | float]) -> dict[str, Found]:
    """Vary ResMem around the paper's and the chosen hyperparameters, and Calibrated ResMem with its own lambdas."""
    found = {}
    for name in ("resmem_paper", "resmem"):
        settings = _settings(Setting.of("resmem", methods[name]["hyperparameters"]), varied)
        predicted = test.predict(sorted(set(settings.values())))
        found[name] = {place: predicted[setting][0] for place, setting in settings.items()}
    calibrated = methods["resmem_calibrated"]
    settings = _settings(Setting.of(calibrated["form"], calibrated["hyperparameters"]), varied | {"lambda": calibrated_lambdas})
    distributions = test.distributions(list(settings.values()))
    return found | {"resmem_calibrated": {place: distributions[setting].predictions for place, setting in settings.items()}}


def _settings(middle: Setting, varied: Values) -> dict[tuple[str, int | float], Setting]:
    """Return the settings that differ from one setting in one hyperparameter."""

    def replace(axis: str, value: int | float) -> Setting:
        changed: dict[str, Any] = {AXES[axis]: value}
        return middle._replace(**changed)

    return {(axis, value): replace(axis, value) for axis in varied for value in varied[axis]}


def _vary_adaptive(queries: dict[str, Queries], datastore: Datastore, sigma: float, varied: Values, sources: tuple[Source, ...]) -> Found:
    """Vary k at the given sigma, and sigma with all searched neighbors, for Adaptive ResMem with some sources."""

    @functools.cache
    def predict(k: int, sigma: float) -> Int[np.ndarray, " queries"]:
        validation, test = (SplitScorer(f"{split}, k {k}", truncate_neighbors(queries[split], k), datastore) for split in QUERY_SPLITS)
        return test.adaptive(fit_gate(validation, sigma, sources)).predictions

    searched = queries["test"].rows.shape[1]
    by_k: Found = {("k", k): predict(int(k), sigma) for k in varied["k"]}
    return by_k | {("sigma", value): predict(searched, value) for value in varied["sigma"]}


def _rows(found: dict[str, Found], targets: Int[np.ndarray, " queries"]) -> list[Record]:
    return [
        {"method": title, "varied": axis, "value": value, "test accuracy, %": 100 * float(np.mean(predictions == targets))}
        for name, title in LINES.items()
        for (axis, value), predictions in found[name].items()
    ]


def _draw(figure: Figure, rows: list[Record], varied: Values, deepnet: float, boosted: bool) -> None:
    for axes, axis in zip(figure.subplots(1, len(varied), sharey=True), varied, strict=True):
        axes.axhline(deepnet, color=f"{INK}0", linestyle=(0, (5, 3)), linewidth=1.2, label="DeepNet")
        for number, title in enumerate(LINES.values()):
            some = [row for row in rows if (row["method"], row["varied"]) == (title, axis)]
            line(axes, number, [row["value"] for row in some], [row["test accuracy, %"] for row in some], title)
        if axis in ("k", "sigma"):
            log_ticks(axes, varied[axis])
        if axis == "lambda" and boosted:  # Calibrated ResMem's values are up to ten times as large as the others'
            axes.set_xscale("symlog", base=2)
            ticks = sorted({int(row["value"]) for row in rows if row["varied"] == axis})
            axes.set_xticks(ticks, [str(value) for value in ticks])
        axes.set_xlabel(axis)
    figure.get_axes()[0].set_ylabel("test accuracy, %")
    legend_above(figure)
