"""What ResMem mends and what it spoils (the paper's Table 2), with hyperparameters by two rules."""

import numpy as np

from resmem_lm.errors import UserError
from resmem_lm.evaluation.candidates import DEEPNET, Formula, Setting
from resmem_lm.evaluation.neighbors import open_queries
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.evaluation.statistics import accuracy_metrics
from resmem_lm.evaluation.tuning import grid_of
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.report.tables import METHOD_TITLES, interval
from resmem_lm.studies.study import study, write_study
from resmem_lm.text.shards import QUERY_SPLITS
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record, read_json

TITLES: dict[Formula, str] = {"resmem": "ResMem", "knnlm": "kNN-LM"}


def choose(right: dict[Setting, int], both: dict[Setting, int], deepnet: int, tokens: int, most_fpr: float) -> dict[str, Setting | None]:
    """The setting of the largest gain, and that of the largest TPR with an FPR below a bound (none if no setting has one).

    Args:
        right: right predictions of each setting.
        both: those among them that DeepNet gets right too.
        deepnet: right predictions of DeepNet.
        tokens: predictions in all.
        most_fpr: the bound.
    """
    allowed = [setting for setting in right if (deepnet - both[setting]) / tokens < most_fpr]
    return {
        "largest gain": max(right, key=lambda setting: right[setting]),
        f"largest TPR, FPR < {most_fpr:g}": max(allowed, key=lambda setting: right[setting] - both[setting]) if allowed else None,
    }


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
    """TPR, FPR and gain on test of ResMem and kNN-LM, for hyperparameters chosen on validation by each rule of the paper.

    Args:
        ks: numbers of neighbors to try; those above the searched number are passed over.
        sigmas: bandwidths to try.
        temperatures: temperatures to try, out of those of the datastore.
        lambdas: factors to try, of both methods.
        most_fpr: the bound of the second rule (paper: 0.05).

    Raises:
        UserError: nothing usable to try.
    """
    datastore = open_datastore(run.datastore)
    scorers = {split: SplitScorer(split, open_queries(run, split), datastore) for split in QUERY_SPLITS}
    usable = [k for k in ks if 1 <= k <= scorers["test"].queries.rows.shape[1]]
    known = [temperature for temperature in temperatures if temperature in datastore.binding.temperatures]
    if not (usable and known and sigmas and min(sigmas) > 0 and lambdas and min(lambdas) >= 0 and min(lambdas) < 1):
        raise UserError(
            f"study_decomposition: needs ks of 1 to {scorers['test'].queries.rows.shape[1]}, sigmas above 0, temperatures of "
            f"{list(datastore.binding.temperatures)} and lambdas of 0 or more, some below 1; has {ks}, {sigmas}, {temperatures}, {lambdas}"
        )
    validation, test = scorers["validation"], scorers["test"]
    deepnet = validation.predict([DEEPNET])[DEEPNET][0] == validation.queries.tokens
    grid = grid_of(lambdas)
    right, both = (validation.count_correct(usable, list(sigmas), known, grid, among=among) for among in (None, deepnet))
    chosen = {
        (formula, rule): setting
        for formula in grid
        for rule, setting in choose(
            {s: n for s, n in right.items() if s.formula == formula}, both, int(deepnet.sum()), len(deepnet), most_fpr
        ).items()
    }
    found = test.predict(sorted({DEEPNET, *(setting for setting in chosen.values() if setting)}))
    targets, groups = np.asarray(test.queries.tokens), test.queries.groups

    def row(method: str, rule: str, told: Record, chosen: Record) -> Record:
        return {
            "method": method,
            "chosen by": rule,
            "TPR, %": 100 * told["tpr"],
            "FPR, %": 100 * told["fpr"],
            "gain, %": 100 * told["gain"],
            "gain, 95%": interval(told["gain_ci95"]),
            "accuracy, %": 100 * told["accuracy"],
            **{shown: chosen.get(name) for name, shown in (("k", "k"), ("sigma", "sigma"), ("temperature", "T"), ("lambda", "lambda"))},
        }

    rows = [
        row(TITLES[formula], rule, accuracy_metrics(found[setting], found[DEEPNET][0], targets, groups), setting.hyperparameters())
        for (formula, rule), setting in chosen.items()
        if setting
    ]
    methods = read_json(run.results)["splits"]["test"]["methods"]
    for name, rule in (("resmem_calibrated", "least perplexity"), ("resmem_adaptive", "fitted")):
        rows.append(row(METHOD_TITLES[name], rule, methods[name], methods[name]["hyperparameters"]))
    text = (
        "Tokens that DeepNet gets wrong and the method right (TPR), the reverse (FPR), and their difference, on test; hyperparameters are "
        "chosen on validation, by the largest gain or by the largest TPR among those with a small FPR, or as the last two say."
    )
    return write_study(run, "decomposition", title="What is corrected and what is spoilt (Table 2)", text=text, rows=rows, draw=None)
