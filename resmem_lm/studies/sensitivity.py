"""How test accuracy depends on k, sigma, T and lambda (the paper's Figures 5 and 6), from one search."""

import functools
from typing import Any

import numpy as np
from jaxtyping import Int

from resmem_lm.errors import UserError
from resmem_lm.evaluation.candidates import Setting
from resmem_lm.evaluation.neighbors import open_queries, truncate_neighbors
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.evaluation.tuning import fit_gate
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.report.plots import INK, Figure, line
from resmem_lm.report.tables import hyperparameters
from resmem_lm.studies.study import study, write_study
from resmem_lm.text.shards import QUERY_SPLITS
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record, read_json

AXES = {"k": "k", "sigma": "sigma", "T": "temperature", "lambda": "lambda_"}
# Names in results.json, and in the table and the plot.
LINES = {
    "resmem_paper": "ResMem (paper)",
    "resmem": "ResMem",
    "resmem_calibrated": "Calibrated ResMem",
    "resmem_adaptive": "Adaptive ResMem",
}
Place = tuple[str, int | float]  # the hyperparameter that varies, and its value


def _varied(setting: Setting, axis: str, value: int | float) -> Setting:
    changed: dict[str, Any] = {AXES[axis]: value}
    return setting._replace(**changed)


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
    """Test accuracy where one of k, sigma, T and lambda varies and the others are the paper's, or those chosen on validation.

    Args:
        ks: numbers of neighbors; those above the searched number are passed over.
        sigmas: bandwidths.
        lambdas: factors of r_kNN; 0 is DeepNet. Temperatures are those of the datastore.
        boosts: factors of r_kNN for Calibrated ResMem, in place of `lambdas` where its form is "boosted": there r_kNN changes logits.
        gate_ks: numbers of neighbors for Adaptive ResMem, whose gate is fitted anew for each, on validation; that takes most of the time.
        gate_sigmas: bandwidths for Adaptive ResMem, as `gate_ks`.

    Raises:
        UserError: a number that cannot be, or nothing to vary.
    """
    lists = {"ks": ks, "sigmas": sigmas, "lambdas": lambdas, "boosts": boosts, "gate_ks": gate_ks, "gate_sigmas": gate_sigmas}
    for name, some in lists.items():
        zero = name in ("lambdas", "boosts")
        if not some or min(some) < 0 or (min(some) == 0 and not zero):
            raise UserError(f"study_sensitivity.{name} = {some}: take one or more numbers, {'0 or more' if zero else 'above 0'}")
    datastore = open_datastore(run.datastore)
    queries = {split: open_queries(run, split) for split in QUERY_SPLITS}
    test = SplitScorer("test", queries["test"], datastore)
    targets, searched = np.asarray(test.queries.tokens), test.queries.rows.shape[1]
    methods = read_json(run.results)["splits"]["test"]["methods"]
    values: dict[str, list[int] | list[float]] = {
        "k": sorted({k for k in ks if k <= searched}),
        "sigma": sorted(sigmas),
        "T": sorted(datastore.binding.temperatures),
        "lambda": sorted(lambdas),
    }

    def around(middle: Setting) -> dict[Place, Setting]:
        own = values | {"lambda": sorted(boosts)} if middle.formula == "boosted" else values
        return {(axis, value): _varied(middle, axis, value) for axis in own for value in own[axis]}

    @functools.cache
    def refitted(k: int, sigma: float) -> Int[np.ndarray, " queries"]:
        validation, some = (SplitScorer(f"{split}, k {k}", truncate_neighbors(queries[split], k), datastore) for split in QUERY_SPLITS)
        return some.adaptive(fit_gate(validation, sigma), sigma).predictions

    predictions: dict[str, dict[Place, Int[np.ndarray, " queries"]]] = {}
    for name in ("resmem_paper", "resmem"):
        settings = around(Setting.of("resmem", methods[name]["hyperparameters"]))
        found = test.predict(sorted(set(settings.values())))
        predictions[name] = {place: found[setting][0] for place, setting in settings.items()}
    form = methods["resmem_calibrated"]["form"]
    settings = around(Setting.of(form, methods["resmem_calibrated"]["hyperparameters"]))
    told = test.distributions(list(settings.values()))
    predictions["resmem_calibrated"] = {place: told[setting].predictions for place, setting in settings.items()}
    sigma = methods["resmem_adaptive"]["hyperparameters"]["sigma"]
    predictions["resmem_adaptive"] = {("k", k): refitted(k, sigma) for k in sorted({k for k in gate_ks if k <= searched})}
    predictions["resmem_adaptive"] |= {("sigma", value): refitted(searched, value) for value in sorted(gate_sigmas)}

    rows: list[Record] = [
        {"method": title, "varied": axis, "value": value, "test accuracy, %": 100 * float(np.mean(found == targets))}
        for name, title in LINES.items()
        for (axis, value), found in predictions[name].items()
    ]
    deepnet = 100 * methods["deepnet"]["accuracy"]

    def draw(figure: Figure) -> None:
        for axes, axis in zip(figure.subplots(1, len(values), sharey=True), values, strict=True):
            axes.axhline(deepnet, color=f"{INK}0", linestyle=(0, (5, 3)), linewidth=1.2, label="DeepNet")
            for number, title in enumerate(LINES.values()):
                some = [row for row in rows if (row["method"], row["varied"]) == (title, axis)]
                line(axes, number, [row["value"] for row in some], [row["test accuracy, %"] for row in some], title)
            if axis in ("k", "sigma"):
                axes.set_xscale("log", base=2)
                axes.set_xticks(values[axis], [f"{value:g}" for value in values[axis]])
                axes.minorticks_off()
            if axis == "lambda" and form == "boosted":  # up to ten times as large as the others'
                axes.set_xscale("symlog", base=2)
                ticks = sorted({*map(int, lambdas), *map(int, boosts)})
                axes.set_xticks(ticks, [str(value) for value in ticks])
            axes.set_xlabel(axis)
        figure.get_axes()[0].set_ylabel("test accuracy, %")
        handles, labels = figure.get_axes()[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False)

    paper = hyperparameters(methods["resmem_paper"]["hyperparameters"])
    text = (
        f"One hyperparameter varies, the others stay as in the paper ({paper}) or as chosen on validation. Adaptive "
        "ResMem has neither T nor lambda; its gate is fitted anew on validation for each k (the nearest of the neighbors) and sigma."
    )
    text += " Calibrated ResMem's lambda is a factor in the logits, and not to be compared with the others'." if form == "boosted" else ""
    return write_study(run, "sensitivity", title="Sensitivity (Figures 5 and 6)", text=text, rows=rows, draw=draw)
