"""How well measures predict generalization: statistics, their intervals, and what noise has."""

from sharpkit.evaluation.arguments import expected_direction
from sharpkit.evaluation.bootstrap import Comparison, Interval, bootstrap_interval, compare_measures
from sharpkit.evaluation.cmi import CMIResult, conditional_mutual_information
from sharpkit.evaluation.correlations import (
    GranulatedKendall,
    granulated_kendall,
    kendall_tau,
    pearson,
    spearman,
)
from sharpkit.evaluation.null import CMINull, cmi_null
from sharpkit.evaluation.permutation import holm, permutation_p_value
from sharpkit.evaluation.rating_table import rate_by_hyperparameter, rate_measures
from sharpkit.evaluation.regression import CombinedPredictor, combined_predictor, r_squared
from sharpkit.evaluation.sign_errors import SignError, SignErrorSummary, sign_error
from sharpkit.evaluation.statistics import STATISTICS

__all__ = [
    "STATISTICS",
    "CMINull",
    "CMIResult",
    "CombinedPredictor",
    "Comparison",
    "GranulatedKendall",
    "Interval",
    "SignError",
    "SignErrorSummary",
    "bootstrap_interval",
    "cmi_null",
    "combined_predictor",
    "compare_measures",
    "conditional_mutual_information",
    "expected_direction",
    "granulated_kendall",
    "holm",
    "kendall_tau",
    "pearson",
    "permutation_p_value",
    "r_squared",
    "rate_by_hyperparameter",
    "rate_measures",
    "sign_error",
    "spearman",
]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
