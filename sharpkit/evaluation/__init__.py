"""Scores of generalization measures on a zoo: conditional mutual information, ranks, intervals."""

from sharpkit.evaluation.arguments import expected_direction
from sharpkit.evaluation.bootstrap import (
    Comparison,
    Interval,
    bootstrap_interval,
    compare_measures,
)
from sharpkit.evaluation.cmi import CMIResult, conditional_mutual_information
from sharpkit.evaluation.correlations import (
    GranulatedKendall,
    granulated_kendall,
    kendall_tau,
    pearson,
    spearman,
)
from sharpkit.evaluation.null import ScoreNull, score_null
from sharpkit.evaluation.permutation import holm, permutation_p_value
from sharpkit.evaluation.rating_table import evaluate_hyperparameters, evaluate_measures
from sharpkit.evaluation.regression import CombinedPredictor, combined_predictor, r_squared
from sharpkit.evaluation.sign_errors import SignError, SignErrorSummary, sign_error
from sharpkit.evaluation.statistics import STATISTICS

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
