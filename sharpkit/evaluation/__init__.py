"""Scores of generalization measures on a zoo: conditional mutual information, ranks, intervals."""

from sharpkit.evaluation.arguments import expected_direction
from sharpkit.evaluation.cmi import CMIResult, conditional_mutual_information
from sharpkit.evaluation.null import ScoreNull, score_null
from sharpkit.evaluation.permutation import holm, permutation_p_value
from sharpkit.evaluation.ranks import (
    GranulatedKendall,
    granulated_kendall,
    kendall_tau,
    pearson,
    spearman,
)
from sharpkit.evaluation.regression import CombinedPredictor, combined_predictor, r_squared
from sharpkit.evaluation.resampling import (
    Comparison,
    Interval,
    bootstrap_interval,
    compare_measures,
)
from sharpkit.evaluation.robustness import SignError, SignErrorSummary, sign_error
from sharpkit.evaluation.statistics import STATISTICS
from sharpkit.evaluation.table import evaluate_hyperparameters, evaluate_measures

__all__ = [
    "STATISTICS",
    "CMIResult",
    "CombinedPredictor",
    "Comparison",
    "GranulatedKendall",
    "Interval",
    "ScoreNull",
    "SignError",
    "SignErrorSummary",
    "bootstrap_interval",
    "combined_predictor",
    "compare_measures",
    "conditional_mutual_information",
    "evaluate_hyperparameters",
    "evaluate_measures",
    "expected_direction",
    "granulated_kendall",
    "holm",
    "kendall_tau",
    "pearson",
    "permutation_p_value",
    "r_squared",
    "score_null",
    "sign_error",
    "spearman",
]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
