"""Study the predictions that ResMem corrects and loses (the paper's Table 2), with hyperparameters chosen by two rules."""

from collections.abc import Iterator

import numpy as np

from resmem_lm.evaluation.candidates import DEEPNET, Formula, Setting
from resmem_lm.evaluation.evaluate import Grid
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.evaluation.statistics import accuracy_metrics
from resmem_lm.evaluation.tuning import grid_of
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.report.tables import METHOD_TITLES, interval
from resmem_lm.studies.study import open_scorers, study, usable_grid, write_study
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record, read_json

RULES = {"resmem_calibrated": "lowest perplexity", "resmem_adaptive": "fitted"}  # how `evaluate` chose the other methods
COLUMNS = {"k": "k", "sigma": "sigma", "T": "temperature", "lambda": "lambda"}
Choice = tuple[Formula, str, Setting]  # a method, the rule, and the hyperparameters


@study(name="decomposition")
def study_decomposition(
    run: Run,
    *,
    ks: tuple[int, ...] | list[int] = (1, 2, 4, 8, 16, 32, 50),
    sigmas: tuple[float, ...] | list[float] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    temperatures: tuple[float, ...] | list[float] = (0.7, 1.0, 1.4),
    lambdas: tuple[float, ...] | list[float] = (0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    most_fpr: float = 0.05,
) -> Record:
    """Measure TPR, FPR and gain of ResMem and kNN-LM on test, with hyperparameters chosen on validation by each rule of the paper.

    Args:
        ks: numbers of neighbors to try; those above the searched number are skipped.
        sigmas: bandwidths to try.
        temperatures: temperatures to try; those missing from the datastore are skipped.
        lambdas: factors to try, for both methods.
        most_fpr: upper bound of the FPR in the second rule (paper: 0.05).
    """
    datastore = open_datastore(run.datastore)
    scorers = open_scorers(run, datastore)
    searched = scorers["test"].queries.rows.shape[1]
    given = Grid(list(ks), list(sigmas), list(temperatures), list(lambdas))
    grid = usable_grid("study_decomposition", given, searched, datastore.binding.temperatures)
    rows = _chosen_rows(scorers["test"], list(_choices(scorers["validation"], grid, most_fpr)))
    methods = read_json(run.results)["splits"]["test"]["methods"]
    rows += [_row(METHOD_TITLES[name], rule, methods[name], methods[name]["hyperparameters"]) for name, rule in RULES.items()]
    text = (
        "Share of test tokens that DeepNet predicts wrongly and the method correctly (TPR), the reverse (FPR), and the difference (gain). "
        "Hyperparameters are chosen on validation: by the largest gain, or by the largest TPR with a small FPR. Calibrated ResMem is "
        "chosen by the lowest perplexity, and the gate of Adaptive ResMem is fitted."
    )
    return write_study(run, "decomposition", title="Corrected and lost predictions (Table 2)", text=text, rows=rows)


def choose(right: dict[Setting, int], both: dict[Setting, int], deepnet: int, tokens: int, most_fpr: float) -> dict[str, Setting | None]:
    """Return the setting with the largest gain, and the setting with the largest TPR whose FPR is below `most_fpr`, or None.

    `right` counts the correct predictions of each setting, `deepnet` those of DeepNet, and `both` the tokens that both predict correctly.
    """
    allowed = [setting for setting in right if (deepnet - both[setting]) / tokens < most_fpr]
    return {
        "largest gain": max(right, key=lambda setting: right[setting]),
        f"largest TPR, FPR < {most_fpr:g}": max(allowed, key=lambda setting: right[setting] - both[setting]) if allowed else None,
    }


def _choices(validation: SplitScorer, grid: Grid, most_fpr: float) -> Iterator[Choice]:
    """Yield the hyperparameters that each rule chooses for each method."""
    deepnet = validation.predict([DEEPNET])[DEEPNET][0] == validation.queries.tokens
    formulas = grid_of(grid.lambdas)
    right, both = (validation.count_correct(grid.ks, grid.sigmas, grid.temperatures, formulas, among=among) for among in (None, deepnet))
    for formula in formulas:
        its = {setting: count for setting, count in right.items() if setting.formula == formula}
        for rule, setting in choose(its, both, int(deepnet.sum()), len(deepnet), most_fpr).items():
            if setting:
                yield formula, rule, setting


def _chosen_rows(test: SplitScorer, choices: list[Choice]) -> list[Record]:
    found = test.predict(sorted({DEEPNET, *(setting for *_, setting in choices)}))
    targets, groups = np.asarray(test.queries.tokens), test.queries.groups
    metrics = {setting: accuracy_metrics(found[setting], found[DEEPNET][0], targets, groups) for *_, setting in choices}
    return [_row(METHOD_TITLES[formula], rule, metrics[setting], setting.hyperparameters()) for formula, rule, setting in choices]


def _row(method: str, rule: str, metrics: Record, chosen: Record) -> Record:
    return {
        "method": method,
        "chosen by": rule,
        "TPR, %": 100 * metrics["tpr"],
        "FPR, %": 100 * metrics["fpr"],
        "gain, %": 100 * metrics["gain"],
        "gain, 95%": interval(metrics["gain_ci95"]),
        "accuracy, %": 100 * metrics["accuracy"],
        **{column: chosen.get(name) for column, name in COLUMNS.items()},
    }
