import jax
import numpy as np
import pytest

from resmem_lm.errors import UserError
from resmem_lm.evaluation import features
from resmem_lm.evaluation.features import EVERY, MEMORY
from resmem_lm.evaluation.neighbors import open_queries
from resmem_lm.evaluation.saved_gates import load_gate, save_gates
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import read_json

SOURCES = {"resmem_adaptive": MEMORY, "resmem_adaptive_document": EVERY}


@pytest.mark.parametrize("name", list(SOURCES))
def test_the_gates_of_a_run_give_its_results(tiny_run, name):
    scorer = SplitScorer("test", open_queries(Run(tiny_run), "test"), open_datastore(tiny_run / "datastore"))
    method = load_gate(Run(tiny_run), name)
    assert method.sources == SOURCES[name]
    accuracy = (scorer.adaptive(method).predictions == scorer.queries.tokens).mean()
    assert accuracy == pytest.approx(read_json(tiny_run / "results.json")["splits"]["test"]["methods"][name]["accuracy"])


def test_a_gate_is_saved_without_change(tiny_run, tmp_path):
    method = load_gate(Run(tiny_run), "resmem_adaptive")
    save_gates(Run(tmp_path), {"resmem_adaptive": method})
    jax.tree.map(np.testing.assert_array_equal, load_gate(Run(tmp_path), "resmem_adaptive").gate, method.gate)


def test_a_gate_of_other_features_and_a_missing_gate_are_refused(tiny_run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"gates.npz is missing: delete .*results.json"):
        load_gate(Run(tmp_path), "resmem_adaptive")
    with pytest.raises(UserError, match="has no gate of other"):
        load_gate(Run(tiny_run), "other")
    monkeypatch.setitem(features.FEATURES, "exact", (("log_exact_probability",), ("match_length",)))
    with pytest.raises(UserError, match="was fitted with other features"):
        load_gate(Run(tiny_run), "resmem_adaptive")


def test_the_influence_of_a_source_is_what_the_probability_loses_without_it(tiny_run):
    scorer = SplitScorer("test", open_queries(Run(tiny_run), "test"), open_datastore(tiny_run / "datastore"))
    method = load_gate(Run(tiny_run), "resmem_adaptive_document")
    found = scorer.adaptive(method)
    queries = np.array([0, 5, 300, 7])
    influence = scorer.influence(method, queries, found.predictions[queries])
    np.testing.assert_allclose([parts["probability"] for parts in influence], found.confidence[queries], rtol=1e-4)
    assert influence[0]["document"] == 0  # the first token of a document has no earlier one
    assert any(abs(parts["neighbors"]) > 1e-3 for parts in influence)
