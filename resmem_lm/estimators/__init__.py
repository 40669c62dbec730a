"""ResMem for any classifier or regressor, as scikit-learn estimators (paper, section 3 and Remark 3.1)."""

from resmem_lm.estimators.classifier import ResMemClassifier
from resmem_lm.estimators.regressor import ResMemRegressor

__all__ = ["ResMemClassifier", "ResMemRegressor"]
