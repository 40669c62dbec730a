"""Choose hyperparameters on validation."""

from collections.abc import Sequence
from typing import NamedTuple

from resmem_lm.evaluation.adaptive import Adaptive, fit
from resmem_lm.evaluation.calibrated import SimplexFormula
from resmem_lm.evaluation.candidates import Formula, Setting
from resmem_lm.evaluation.features import MEMORY, Source
from resmem_lm.evaluation.scorer import SplitScorer

BOOSTS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)  # lambdas of "boosted", where r_kNN changes logits
FIT_TOKENS = 2**16  # validation tokens that fit the gate


class Grid(NamedTuple):
    """Hyperparameters to try."""

    ks: list[int]
    sigmas: list[float]
    temperatures: list[float]
    lambdas: list[float]


def tune(counts: dict[Setting, int]) -> dict[str, Setting]:
    """Return the most accurate settings of kNN alone, kNN-LM, ResMem with lambda 1, and ResMem with any lambda."""

    def winner(allowed: list[Setting]) -> Setting:
        return max(allowed, key=counts.__getitem__)  # the first of equal settings

    resmem, knnlm = ([s for s in counts if s.formula == formula] for formula in ("resmem", "knnlm"))
    return {
        "knn": winner([s for s in knnlm if s.lambda_ == 1])._replace(temperature=1.0),  # p_kNN has no temperature
        "knnlm": winner([s for s in knnlm if s.lambda_ < 1]),
        "resmem_lambda1": winner([s for s in resmem if s.lambda_ == 1]),
        "resmem": winner(resmem),
    }


def calibrate(losses: dict[Setting, float]) -> dict[str, Setting]:
    """Return the settings with the lowest log loss, of kNN-LM and of Calibrated ResMem in either form."""

    def winner(*formulas: Formula) -> Setting:
        return min((setting for setting in losses if setting.formula in formulas), key=losses.__getitem__)

    return {"knnlm_perplexity": winner("knnlm"), "resmem_calibrated": winner("boosted", "clipped")}


def grid_of(lambdas: Sequence[float]) -> dict[Formula, list[float]]:
    """Return the lambdas for `tune` to try: all for ResMem, those up to 1 for kNN-LM."""
    return {"resmem": list(lambdas), "knnlm": [value for value in lambdas if value <= 1]}


def simplex_grid(lambdas: Sequence[float]) -> dict[SimplexFormula, list[float]]:
    """Return the lambdas for `calibrate` to try. kNN-LM needs lambda < 1: kNN alone gives most tokens probability 0."""
    return {"knnlm": [value for value in lambdas if value < 1], "boosted": list(BOOSTS), "clipped": list(lambdas)}


def best_resmem(validation: SplitScorer, grid: Grid) -> Setting:
    """Return ResMem's most accurate setting."""
    counts = validation.count_correct(grid.ks, grid.sigmas, grid.temperatures, {"resmem": grid.lambdas})
    return max(counts, key=counts.__getitem__)


def fit_gate(validation: SplitScorer, sigma: float, sources: tuple[Source, ...] = MEMORY) -> Adaptive:
    """Fit Adaptive ResMem's gate on validation tokens with all of their neighbors."""
    return Adaptive(fit(*validation.gate_inputs(sigma, sources, FIT_TOKENS)), sigma, sources)
