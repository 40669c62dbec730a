import numpy as np
import pytest

from resmem_lm.evaluation.cache import Cache, fit_cache, predict_with_cache
from resmem_lm.evaluation.candidates import Setting
from resmem_lm.evaluation.neighbors import open_queries
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.evaluation.sources import positions_of
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.workdir.run import Run

KNNLM, RESMEM = Setting("knnlm", 12, 1.0, 1.0, 0.5), Setting("resmem", 12, 1.0, 1.0, 1.0)


@pytest.fixture
def scorer(tiny_run):
    return SplitScorer("test", open_queries(Run(tiny_run), "test"), open_datastore(tiny_run / "datastore"))


def test_a_cache_without_weight_is_knn_lm(scorer):
    found, expected = predict_with_cache(scorer, Cache(KNNLM, 1.0, 0.0)), scorer.distributions([KNNLM])[KNNLM]
    np.testing.assert_array_equal(found.predictions, expected.predictions)
    np.testing.assert_allclose(found.target_probability, expected.target_probability, rtol=1e-5)


def test_the_cache_is_chosen_by_right_predictions(scorer):
    cache = fit_cache(scorer, KNNLM)
    right = [(predict_with_cache(scorer, c).predictions == scorer.queries.tokens).sum() for c in (cache, Cache(KNNLM, 1.0, 0.5))]
    assert right[0] >= right[1]


def test_the_cache_of_a_document_has_no_effect_on_its_first_token(scorer):
    first = positions_of(scorer.queries.document_lengths) == 0
    found, expected = (predict_with_cache(scorer, Cache(KNNLM, 1.0, weight)) for weight in (0.9, 0.0))
    np.testing.assert_array_equal(found.target_probability[first], expected.target_probability[first])
    assert (found.target_probability[~first] != expected.target_probability[~first]).mean() > 0.9


def test_resmem_with_the_document_sees_the_nearest_of_both_memories(scorer):
    for (some, alone), (_, both) in zip(scorer.blocks("alone"), scorer.with_document().blocks("both"), strict=True):
        distances = np.concatenate([alone.neighbors.distances, alone.document.distances], axis=1)
        np.testing.assert_array_equal(both.neighbors.distances, np.sort(distances, axis=1)[:, :12])
        rows, place = np.nonzero(np.asarray(both.neighbors.distances) == np.asarray(alone.document.distances)[:, :1])
        tokens, nearest = np.asarray(both.neighbors.tokens)[rows, place], np.asarray(alone.document.tokens)[rows, 0]
        found = np.isfinite(np.asarray(alone.document.distances)[rows, 0])
        assert (tokens == nearest)[found].mean() > 0.9  # other rows may have the same distance
        assert some.stop > some.start


def test_certified_predictions_with_the_document_are_those_of_all_candidates(scorer):
    predictions, certified = scorer.with_document().predict([RESMEM])[RESMEM]
    assert certified.mean() > 0.5
    assert set(np.unique(predictions)) <= set(np.unique(np.asarray(scorer.queries.candidate_ids)))
