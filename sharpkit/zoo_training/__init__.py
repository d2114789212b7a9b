"""Training of zoos: a grid of hyperparameters becomes a zoo on disk."""

from sharpkit.zoo_training.cost import training_cost
from sharpkit.zoo_training.cost_result import TrainingCost
from sharpkit.zoo_training.recipe import Recipe
from sharpkit.zoo_training.zoo import TrainingReport, train_zoo

__all__ = ["Recipe", "TrainingCost", "TrainingReport", "train_zoo", "training_cost"]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
