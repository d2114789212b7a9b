"""Scoring a zoo and evaluating the scores."""

from sharpkit.runs.evaluate import evaluate
from sharpkit.runs.score import Scores, score_zoo

__all__ = ["Scores", "evaluate", "score_zoo"]
