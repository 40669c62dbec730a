"""Tokens that ResMem mends where DeepNet is wrong but near (the paper's Figure 2), with the neighbors that decided them."""

import numpy as np

from resmem_lm.errors import UserError, check_least
from resmem_lm.evaluation.candidates import DEEPNET, Setting
from resmem_lm.evaluation.examples import corrected_tokens, draw_tokens
from resmem_lm.evaluation.neighbors import BASE_CANDIDATES, open_queries
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.studies.study import study, write_study
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record, read_json


@study(name="examples")
def study_examples(run: Run, *, examples: int = 300, near: int = 5) -> Record:
    """Test tokens that DeepNet gets wrong and ResMem right, drawn at random among those whose token is nearly DeepNet's.

    ResMem has the hyperparameters that `evaluate` chose.

    Args:
        examples: how many; fewer where there are not so many.
        near: the token is among so many that DeepNet finds most probable.

    Raises:
        UserError: no example asked for, or a rank that is not known of each token.
    """
    check_least("study_examples", 1, examples=examples)
    if not 2 <= near <= BASE_CANDIDATES:
        raise UserError(f"study_examples.near = {near}: take 2 to {BASE_CANDIDATES} (a token that DeepNet gets wrong is not its first)")
    datastore, queries = open_datastore(run.datastore), open_queries(run, "test")
    chosen = read_json(run.results)["splits"]["test"]["methods"]["resmem"]["hyperparameters"]
    setting = Setting.of("resmem", chosen)
    scorer = SplitScorer("test", queries, datastore)
    found = scorer.predict(sorted({DEEPNET, setting}))
    deepnet, corrected = found[DEEPNET][0], found[setting][0]
    all_mended = np.flatnonzero((deepnet != queries.tokens) & (corrected == queries.tokens))
    # The first candidates are DeepNet's most probable tokens, which is all that is needed for a rank among the nearest.
    above = queries.candidate_logits[all_mended][:, :BASE_CANDIDATES] > queries.target_logits[all_mended][:, None]
    ranks = dict(zip(all_mended.tolist(), (1 + above.sum(axis=1)).tolist(), strict=True))
    pool = np.array([query for query, rank in ranks.items() if rank <= near], np.int64)
    drawn = draw_tokens(pool, examples)
    log_probability = queries.target_logits[drawn] - queries.log_partition[drawn][:, scorer.unit_number]
    shown: list[Record] = [
        example | {"rank": ranks[int(query)], "probability": float(np.exp(value))}
        for query, value, example in zip(
            drawn, log_probability, corrected_tokens(run, queries, datastore, setting, deepnet, corrected, drawn), strict=True
        )
    ]
    rows: list[Record] = [
        {
            "document": example["document"],
            "context": example["context"],
            "token": example["target"],
            "DeepNet": example["deepnet"],
            "rank of the token for DeepNet": example["rank"],
            "neighbor's document": nearest.get("document"),
            "neighbor's context": nearest.get("context"),
            "distance": nearest.get("distance"),
        }
        for example in shown
        for nearest in [*example["neighbors"], {}][:1]
    ]
    share = f"{len(pool) / len(all_mended):.0%}" if len(all_mended) else "none"
    text = (
        f"{len(shown):,} test tokens drawn at random among the {len(pool):,} that DeepNet gets wrong but has among its {near} most "
        f"probable tokens, and that ResMem gets right ({share} of the {len(all_mended):,} that it mends). ResMem has the "
        "hyperparameters chosen on validation; the neighbors are those that add most to the token, and the weights of all k sum to 1."
    )
    title = "Wrong but near: examples (Figure 2)"
    return write_study(run, "examples", title=title, text=text, rows=rows, draw=None, examples=shown)
