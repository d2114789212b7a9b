"""Scoring networks and evaluating the scores."""

from sharpkit.runs.evaluate import combine, evaluate
from sharpkit.runs.score import Scores, score_zoo
from sharpkit.runs.score_models import score_models
from sharpkit.runs.targets import selection_regret

__all__ = ["Scores", "combine", "evaluate", "score_models", "score_zoo", "selection_regret"]
