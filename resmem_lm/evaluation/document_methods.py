"""Methods that also use the earlier tokens of a query's own document, as rows of a memory that no other document sees."""

from typing import NamedTuple

from resmem_lm.evaluation.adaptive import Adaptive
from resmem_lm.evaluation.cache import Cache, fit_cache, predict_with_cache
from resmem_lm.evaluation.candidates import Setting
from resmem_lm.evaluation.features import EVERY
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.evaluation.statistics import Found
from resmem_lm.evaluation.tuning import Grid, best_resmem, fit_gate


class DocumentMethods(NamedTuple):
    """kNN-LM with a cache, ResMem with the nearest rows of datastore and document, and Adaptive ResMem with the document's features."""

    cache: Cache
    resmem: Setting
    adaptive: Adaptive


def fit_document_methods(validation: SplitScorer, grid: Grid, knnlm: Setting, sigma: float) -> DocumentMethods:
    """Choose hyperparameters on validation and fit the gate, for the chosen kNN-LM and ResMem's bandwidth."""
    return DocumentMethods(fit_cache(validation, knnlm), best_resmem(validation.with_document(), grid), fit_gate(validation, sigma, EVERY))


def predict_with_document(scorer: SplitScorer, methods: DocumentMethods) -> dict[str, Found]:
    """Return the predictions of each method."""
    cached, adaptive = predict_with_cache(scorer, methods.cache), scorer.adaptive(methods.adaptive)
    resmem = scorer.with_document().predict([methods.resmem])[methods.resmem]
    return {
        "knnlm_cache": Found(cached[:2], cached, methods.cache.hyperparameters()),
        "resmem_document": Found(resmem, None, methods.resmem.hyperparameters()),
        "resmem_adaptive_document": Found(adaptive[:2], adaptive, scorer.gate_hyperparameters(methods.adaptive)),
    }
