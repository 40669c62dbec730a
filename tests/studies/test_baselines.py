import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmem_lm.errors import UserError
from resmem_lm.evaluation.neighbors import open_queries
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.maintenance.delete import delete
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.report.tables import METHOD_TITLES
from resmem_lm.studies import infinigram
from resmem_lm.studies.baselines import ranges, study_baselines, token_groups
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50), st.lists(st.integers(1, 9), min_size=1, max_size=5, unique=True).map(sorted))
def test_every_token_is_in_one_range(values, edges):
    masks = [some for _, some in ranges(np.array(values), [float(edge) for edge in edges])]
    np.testing.assert_array_equal(np.sum(masks, axis=0), 1)


def test_accuracies_equal_the_results_and_the_groups_add_up(tiny_copy):
    study_baselines(tiny_copy, lambdas=(0.0, 0.5, 1.0))
    rows = read_json(tiny_copy / "studies/baselines/results.json")["rows"]
    methods = read_json(tiny_copy / "results.json")["splits"]["test"]["methods"]
    whole = rows[0]
    for name in ("deepnet", "knn", "knnlm", "resmem_paper", "resmem", "resmem_adaptive"):
        assert whole[f"{METHOD_TITLES[name]}, %"] == pytest.approx(100 * methods[name]["accuracy"])
    for by in ("frequency", "distance", "confidence"):
        some = [row for row in rows if row["by"] == by]
        assert sum(row["tokens"] for row in some) == whole["tokens"]
        for column in (column for column in whole if column.endswith(", %")):
            assert sum(row["tokens"] * row[column] for row in some) / whole["tokens"] == pytest.approx(whole[column])
    if infinigram.installed():  # a weight of 0 is DeepNet, so the chosen weights are at least as good on validation
        assert whole["infini-gram with DeepNet, %"] > whole["DeepNet, %"] - 2


def test_frequencies_count_live_rows_only(tiny_copy):
    datastore = open_datastore(tiny_copy / "datastore")
    scorer = SplitScorer("test", open_queries(Run(tiny_copy), "test"), datastore)
    for shard in range(len(datastore.shards)):
        for document in datastore.documents(shard)[:2]:
            delete(Run(tiny_copy), document=document["id"])
    few = open_datastore(tiny_copy / "datastore")
    counts = np.zeros(256, int)
    for first, tokens in zip(few.offsets, few.shard_arrays("tokens"), strict=False):
        np.add.at(counts, tokens[~few.is_deleted(first + np.arange(len(tokens)))], 1)
    assert counts.sum() == few.live_rows < few.rows
    found = {shown: some for by, shown, some in token_groups(scorer, few) if by == "frequency"}
    np.testing.assert_array_equal(found["below 10"], counts[scorer.queries.tokens] < 10)


@pytest.mark.parametrize("lambdas", [(), (0.5, 1.5), (-0.1,)])
def test_weights_outside_0_to_1_are_refused(tiny_run, lambdas):
    with pytest.raises(UserError, match="take one or more numbers from 0 to 1"):
        study_baselines.function(Run(tiny_run), lambdas=lambdas)
