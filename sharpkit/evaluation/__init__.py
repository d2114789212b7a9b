"""Scores of generalization measures on a zoo: conditional mutual information, ranks, intervals."""

from sharpkit.evaluation._weighted import STATISTICS
from sharpkit.evaluation.cmi import CMIResult, conditional_mutual_information
from sharpkit.evaluation.permutation import holm, permutation_p_value
from sharpkit.evaluation.ranks import (
    GranulatedKendall,
    granulated_kendall,
    kendall_tau,
    pearson,
    spearman,
)
from sharpkit.evaluation.resampling import (
    Comparison,
    Interval,
    bootstrap_interval,
    compare_measures,
)
from sharpkit.evaluation.robustness import SignError, SignErrorSummary, sign_error
from sharpkit.evaluation.table import evaluate_measures

__all__ = [
    "STATISTICS",
    "CMIResult",
    "Comparison",
    "GranulatedKendall",
    "Interval",
    "SignError",
    "SignErrorSummary",
    "bootstrap_interval",
    "compare_measures",
    "conditional_mutual_information",
    "evaluate_measures",
    "granulated_kendall",
    "holm",
    "kendall_tau",
    "pearson",
    "permutation_p_value",
    "sign_error",
    "spearman",
]
