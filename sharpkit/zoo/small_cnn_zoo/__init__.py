"""The Small CNN Zoo of Unterthiner et al. 2020: one row of weights for each checkpoint."""

from sharpkit.zoo.small_cnn_zoo.task import EXPECTED, SmallCnns, small_cnn_tasks

__all__ = ["EXPECTED", "SmallCnns", "small_cnn_tasks"]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
