"""Scoring a zoo and evaluating the scores."""

from sharpkit.runs.evaluate import combine, evaluate
from sharpkit.runs.score import Scores, score_zoo

__all__ = ["Scores", "combine", "evaluate", "score_zoo"]
