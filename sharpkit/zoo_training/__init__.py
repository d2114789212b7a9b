"""Training of zoos: a grid of hyperparameters becomes a zoo on disk."""

from sharpkit.zoo_training.recipe import Recipe
from sharpkit.zoo_training.zoo import TrainingReport, train_zoo

__all__ = ["Recipe", "TrainingReport", "train_zoo"]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
