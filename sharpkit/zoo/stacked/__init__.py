"""Networks in stacks, one file for many of one shape, beside the competition's data files."""

from sharpkit.zoo.stacked.model import StackedModel
from sharpkit.zoo.stacked.task import EXPECTED, StackedTask, stacked_tasks

__all__ = ["EXPECTED", "StackedModel", "StackedTask", "stacked_tasks"]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
