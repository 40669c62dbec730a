"""How test accuracy depends on k, sigma, T and lambda (the paper's Figures 5 and 6), from one search."""

from typing import Any

from resmem_lm.candidates import Setting
from resmem_lm.datastore import open_datastore
from resmem_lm.plots import INK, Figure, line
from resmem_lm.scoring import SplitScorer
from resmem_lm.search import open_queries
from resmem_lm.storage import AnyPath, read_json
from resmem_lm.studies.study import study, write_study
from resmem_lm.workdir import Record

AXES = {"k": "k", "sigma": "sigma", "T": "temperature", "lambda": "lambda_"}


def _varied(setting: Setting, axis: str, value: int | float) -> Setting:
    changed: dict[str, Any] = {AXES[axis]: value}
    return setting._replace(**changed)


@study(name="sensitivity")
def study_sensitivity(
    workdir: AnyPath,
    *,
    ks: tuple[int, ...] | list[int] = (1, 2, 4, 8, 16, 32, 50),
    sigmas: tuple[float, ...] | list[float] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    lambdas: tuple[float, ...] | list[float] = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0),
) -> Record:
    """Test accuracy where one of k, sigma, T and lambda varies and the others are the paper's, or those chosen on validation.

    Args:
        ks: numbers of neighbours; those above the searched number are passed over.
        sigmas: bandwidths.
        lambdas: factors of r_kNN; 0 is DeepNet. Temperatures are those of the datastore.
    """
    datastore = open_datastore(workdir / "datastore")
    scorer = SplitScorer("test", open_queries(workdir, "test"), datastore)
    searched = scorer.queries.rows.shape[1]
    methods = read_json(workdir / "results.json")["splits"]["test"]["methods"]
    values: dict[str, list[int] | list[float]] = {
        "k": sorted({k for k in ks if 1 <= k <= searched}),
        "sigma": sorted(sigmas),
        "T": sorted(datastore.binding.temperatures),
        "lambda": sorted(lambdas),
    }
    rows: list[Record] = []
    curves: dict[tuple[str, str], list[float]] = {}
    for name, title in (("resmem_paper", "others as in the paper"), ("resmem", "others chosen on validation")):
        middle = Setting.of("resmem", methods[name]["hyperparameters"])
        settings = {(axis, value): _varied(middle, axis, value) for axis in values for value in values[axis]}
        found = scorer.predict(sorted(set(settings.values())))
        for axis in values:
            accuracy = [float((found[settings[axis, value]][0] == scorer.queries.tokens).mean()) for value in values[axis]]
            curves[axis, title] = accuracy
            rows += [
                {"varied": axis, "value": value, "others": title.removeprefix("others "), "test accuracy, %": 100 * a}
                for value, a in zip(values[axis], accuracy, strict=True)
            ]
    deepnet = 100 * methods["deepnet"]["accuracy"]

    def draw(figure: Figure) -> None:
        for axes, axis in zip(figure.subplots(1, len(values), sharey=True), values, strict=True):
            axes.axhline(deepnet, color=f"{INK}0", linestyle=(0, (5, 3)), linewidth=1.2, label="DeepNet")
            for number, title in enumerate(("others as in the paper", "others chosen on validation")):
                line(axes, number, values[axis], [100 * a for a in curves[axis, title]], f"ResMem, {title}")
            if axis in ("k", "sigma"):
                axes.set_xscale("log", base=2)
                axes.set_xticks(values[axis], [f"{value:g}" for value in values[axis]])
                axes.minorticks_off()
            axes.set_xlabel(axis)
        figure.get_axes()[0].set_ylabel("test accuracy, %")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False)

    text = "One hyperparameter varies, the others stay as in the paper (k 50, sigma 1, T 1, lambda 1) or as chosen on validation."
    return write_study(workdir, "sensitivity", title="Sensitivity (Figures 5 and 6)", text=text, rows=rows, draw=draw)
