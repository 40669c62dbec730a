"""Study tokens that DeepNet gets wrong by a small margin and ResMem right (the paper's Figure 2), with the deciding neighbors."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from resmem_lm.errors import UserError, check_least
from resmem_lm.evaluation.candidates import DEEPNET, Setting
from resmem_lm.evaluation.examples import corrected_tokens, draw_tokens
from resmem_lm.evaluation.neighbors import open_queries
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.evaluation.sources import BASE_CANDIDATES
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.studies.study import study, write_study
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record, read_json


class Corrected(NamedTuple):
    """The test tokens that DeepNet gets wrong and ResMem right, and the rank of each among DeepNet's most probable tokens."""

    deepnet: Int[np.ndarray, " tokens"]  # predictions
    resmem: Int[np.ndarray, " tokens"]
    queries: Int[np.ndarray, " corrected"]
    ranks: Int[np.ndarray, " corrected"]


@study(name="examples")
def study_examples(run: Run, *, examples: int = 300, near: int = 5) -> Record:
    """Show random test tokens that DeepNet gets wrong and ResMem right, where the true token is among DeepNet's most probable tokens.

    ResMem has the hyperparameters that `evaluate` chose.

    Args:
        examples: largest number of examples.
        near: largest rank of the true token among DeepNet's most probable tokens.
    """
    check_least("study_examples", 1, examples=examples)
    if not 2 <= near <= BASE_CANDIDATES:
        raise UserError(f"study_examples.near = {near}: take 2 to {BASE_CANDIDATES} (a token that DeepNet gets wrong is not its first)")
    scorer = SplitScorer("test", open_queries(run, "test"), open_datastore(run.datastore))
    setting = Setting.of("resmem", read_json(run.results)["splits"]["test"]["methods"]["resmem"]["hyperparameters"])
    corrected = _find_corrected(scorer, setting)
    pool = corrected.queries[corrected.ranks <= near]
    shown = _describe(run, scorer, setting, corrected, draw_tokens(pool, examples))
    share = f"{len(pool) / len(corrected.queries):.0%}" if len(corrected.queries) else "none"
    text = (
        f"ResMem corrects {len(corrected.queries):,} test tokens that DeepNet predicts wrongly. For {len(pool):,} of them ({share}) the "
        f"true token is among DeepNet's {near} most probable tokens. The list has {len(shown):,} of these, drawn at random. ResMem has "
        "the hyperparameters chosen on validation. The neighbors shown add most to the true token; the weights of all k sum to 1."
    )
    title = "Examples of corrected predictions (Figure 2)"
    return write_study(run, "examples", title=title, text=text, rows=[_row(example) for example in shown], examples=shown)


def _find_corrected(scorer: SplitScorer, setting: Setting) -> Corrected:
    queries = scorer.queries
    found = scorer.predict(sorted({DEEPNET, setting}))
    deepnet, resmem = found[DEEPNET][0], found[setting][0]
    corrected = np.flatnonzero((deepnet != queries.tokens) & (resmem == queries.tokens))
    # The first candidates are DeepNet's most probable tokens, so the rank of a token among them is exact.
    above = queries.candidate_logits[corrected][:, :BASE_CANDIDATES] > queries.target_logits[corrected][:, None]
    return Corrected(deepnet, resmem, corrected, 1 + above.sum(axis=1))


def _describe(run: Run, scorer: SplitScorer, setting: Setting, corrected: Corrected, drawn: Int[np.ndarray, " drawn"]) -> list[Record]:
    """Return the drawn tokens as examples, with the rank and the probability that DeepNet gives the true token."""
    queries = scorer.queries
    ranks = corrected.ranks[np.searchsorted(corrected.queries, drawn)]
    log_probability = queries.target_logits[drawn] - queries.log_partition[drawn][:, scorer.unit_number]
    examples = corrected_tokens(run, queries, scorer.datastore, setting, corrected.deepnet, corrected.resmem, drawn)
    return [
        example | {"rank": int(rank), "probability": float(np.exp(value))}
        for example, rank, value in zip(examples, ranks, log_probability, strict=True)
    ]


def _row(example: Record) -> Record:
    """Return an example as a row of the table, with the neighbor that adds most."""
    nearest: Record = next(iter(example["neighbors"]), {})
    return {
        "document": example["document"],
        "context": example["context"],
        "token": example["target"],
        "DeepNet": example["deepnet"],
        "DeepNet's rank of the token": example["rank"],
        "neighbor's document": nearest.get("document"),
        "neighbor's context": nearest.get("context"),
        "distance": nearest.get("distance"),
    }
