"""scikit-learn's own checks of an estimator."""

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from resmem_lm.estimators import ResMemClassifier, ResMemRegressor


@pytest.mark.filterwarnings("default")
@parametrize_with_checks([ResMemClassifier(k=2), ResMemRegressor(k=2)])
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)
