"""scikit-learn's own checks of an estimator."""

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from resmem_lm.estimators import ResMemClassifier, ResMemRegressor


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")  # scikit-learn casts its own NaN
@parametrize_with_checks([ResMemClassifier(k=2), ResMemRegressor(k=2)])
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)
