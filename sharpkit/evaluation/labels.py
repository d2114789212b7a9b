"""How the statistics of an evaluation are called in figures and reports."""

from sharpkit.evaluation.statistics import LABELS

__all__ = ["LABELS"]
