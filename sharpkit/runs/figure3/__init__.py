"""The three panels of Foret et al.'s Figure 3, from trainings and a zoo to the picture."""

from sharpkit.runs.figure3.figure import Figure3, figure3
from sharpkit.runs.figure3.plan import Plan, read_plan

__all__ = ["Figure3", "Plan", "figure3", "read_plan"]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
