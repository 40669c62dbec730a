import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmem_lm.errors import UserError
from resmem_lm.evaluation.candidates import Setting
from resmem_lm.evaluation.evaluate import evaluate
from resmem_lm.evaluation.neighbors import open_queries
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.evaluation.statistics import accuracy_metrics, bootstrap_interval
from resmem_lm.evaluation.tuning import calibrate, tune
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.report.tables import interval
from resmem_lm.workdir.run import Run

PAPER = Setting("resmem", 12, 1.0, 1.0, 1.0)


@given(st.integers(0, 2**32 - 1), st.integers(2, 40))
def test_an_interval_contains_the_mean_and_is_deterministic(seed, documents):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, documents)
    values, groups = rng.random(lengths.sum()), np.repeat(np.arange(documents), lengths)
    low, high = bootstrap_interval(values, groups)
    assert low <= values.mean() <= high
    assert (low, high) == bootstrap_interval(values, groups)


def test_an_interval_has_the_width_of_the_normal_approximation():
    rng = np.random.default_rng(0)
    values = rng.normal(size=4000)
    low, high = bootstrap_interval(values, np.repeat(np.arange(400), 10))
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(4000), rel=0.15)


def test_tokens_of_one_document_are_not_independent():
    whole_documents = np.repeat(np.random.default_rng(0).random(20) < 0.5, 100).astype(float)
    together = bootstrap_interval(whole_documents, np.repeat(np.arange(20), 100))
    apart = bootstrap_interval(whole_documents, np.arange(2000))
    assert together[1] - together[0] > 5 * (apart[1] - apart[0])


def test_one_document_has_no_interval():
    assert bootstrap_interval(np.ones(100), np.zeros(100, int)) is None
    assert interval(None) == "-"


def test_accuracy_tpr_fpr_and_gain_are_shares_of_all_tokens():
    targets, deepnet, predictions = (np.array(x) for x in ([1, 2, 3, 4, 5, 6], [1, 2, 0, 0, 0, 0], [1, 0, 3, 4, 0, 0]))
    found = accuracy_metrics((predictions, np.ones(6, bool)), deepnet, targets, np.array([0, 0, 1, 1, 1, 1]))
    assert (found["accuracy"], found["tpr"], found["fpr"], found["gain"]) == pytest.approx((3 / 6, 2 / 6, 1 / 6, 1 / 6))


def test_tuning_chooses_the_most_accurate_of_each_kind_and_the_first_of_equals():
    counts = {
        Setting("resmem", 1, 1.0, 1.0, 1.0): 5,
        Setting("resmem", 2, 1.0, 1.0, 1.0): 5,
        Setting("resmem", 2, 1.0, 1.0, 0.5): 9,
        Setting("knnlm", 4, 1.0, 0.7, 1.0): 3,
        Setting("knnlm", 8, 1.0, 1.0, 0.2): 7,
    }
    found = tune(counts)
    assert (found["resmem_lambda1"].k, found["resmem"].lambda_, found["knnlm"].k) == (1, 0.5, 8)
    assert found["knn"] == Setting("knnlm", 4, 1.0, 1.0, 1.0)  # p_kNN has no temperature


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperatures": (0.3, 1.0)}, r"the datastore has no sums for T = \[0.3\]; choose from"),
        ({"temperatures": (1.4,)}, "1.0 in temperatures"),
        ({"sigmas": (0.0, 1.0)}, "needs sigmas above 0"),
        ({"lambdas": (-0.5, 1.0)}, "lambdas of 0 or more"),
        ({"lambdas": (1.0,)}, "1.0 and a smaller number in lambdas"),
        ({"ks": (0, 13)}, "needs a number from 1 to 12 in ks"),
    ],
)
def test_a_grid_without_usable_hyperparameters_is_an_error(tiny_run, setting, message):
    with pytest.raises(UserError, match=message):
        evaluate.function(Run(tiny_run), **setting)


def test_counts_of_the_sweep_equal_counts_of_the_predictions(tiny_run):
    datastore = open_datastore(tiny_run / "datastore")
    scorer = SplitScorer("validation", open_queries(Run(tiny_run), "validation"), datastore)
    counts = scorer.count_correct([1, 12], [0.5, 4.0], [1.0, 1.4], {"resmem": [0.5, 1.0], "knnlm": [0.5, 1.0]})
    assert len(counts) == 2 * 2 * 2 * 2 * 2
    found = scorer.predict(list(counts))
    for setting, (predictions, _) in found.items():
        assert counts[setting] == (predictions == scorer.queries.tokens).sum()
    for setting in counts:
        if setting.formula == "knnlm" and setting.lambda_ == 1:  # p_kNN has no temperature
            assert counts[setting] == counts[setting._replace(temperature=1.0)]


def test_lambda_0_is_deepnet_and_lambda_1_is_knn(tiny_run):
    datastore = open_datastore(tiny_run / "datastore")
    scorer = SplitScorer("test", open_queries(Run(tiny_run), "test"), datastore)
    settings = [Setting("resmem", 12, 1.0, 1.0, 0.0), Setting("knnlm", 12, 1.0, 1.0, 0.0), Setting("knnlm", 1, 1.0, 1.0, 1.0)]
    found = scorer.predict(settings)
    q = scorer.queries
    base = np.asarray(q.candidate_ids)[np.arange(len(q.tokens)), np.argmax(q.candidate_logits, axis=1)]
    np.testing.assert_array_equal(found[settings[0]][0], base)
    np.testing.assert_array_equal(found[settings[1]][0], base)
    np.testing.assert_array_equal(found[settings[2]][0], np.asarray(q.neighbor_tokens)[:, 0])


def test_distributions_agree_with_predictions_and_with_the_losses_of_the_sweep(tiny_run):
    scorer = SplitScorer("test", open_queries(Run(tiny_run), "test"), open_datastore(tiny_run / "datastore"))
    losses = scorer.log_losses([0.5, 4.0], [1.0, 1.4], {"knnlm": [0.0, 0.5], "boosted": [0.0, 4.0], "clipped": [0.5]})
    assert len(losses) == 2 * 2 * 5
    found = scorer.distributions([*losses, *losses])  # a setting may be asked for twice
    for setting, loss in losses.items():
        assert -np.log(found[setting].target_probability).sum() == pytest.approx(loss, rel=1e-3)
        assert (found[setting].confidence <= 1 + 1e-5).all()
    knnlm = [setting for setting in losses if setting.formula == "knnlm"]
    for setting, (predictions, _) in scorer.predict(knnlm).items():
        np.testing.assert_array_equal(found[setting].predictions, predictions)
    deepnet = [setting for setting in losses if setting.lambda_ == 0 and setting.temperature == 1.0]
    assert len({losses[setting].__round__(0) for setting in deepnet}) == 1


def test_calibrating_chooses_the_lowest_loss_of_each_kind():
    losses = {Setting(formula, 12, 1.0, 1.0, lambda_): loss for formula, lambda_, loss in CALIBRATIONS}
    found = calibrate(losses)
    assert (found["knnlm_perplexity"].lambda_, found["resmem_calibrated"]) == (0.25, Setting("clipped", 12, 1.0, 1.0, 0.5))


CALIBRATIONS = [("knnlm", 0.25, 8.0), ("knnlm", 0.5, 9.0), ("boosted", 2.0, 7.0), ("clipped", 0.5, 6.0), ("clipped", 1.0, 8.0)]
