"""Scoring networks and evaluating the scores."""

from sharpkit.runs.evaluate import combine, evaluate
from sharpkit.runs.held_out import (
    brier_score,
    calibration_error,
    held_out_metrics,
    negative_log_likelihood,
)
from sharpkit.runs.score import score_zoo
from sharpkit.runs.score_models import score_models
from sharpkit.runs.scores import Scores
from sharpkit.runs.targets import selection_regret

__all__ = [
    "Scores",
    "brier_score",
    "calibration_error",
    "combine",
    "evaluate",
    "held_out_metrics",
    "negative_log_likelihood",
    "score_models",
    "score_zoo",
    "selection_regret",
]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
