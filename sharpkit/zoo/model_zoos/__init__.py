"""Model zoos of Schuerholt et al. 2022 and phase-transition zoos: a folder for each network."""

from sharpkit.zoo.model_zoos.task import EXPECTED, ModelZoo, model_zoo_tasks

__all__ = ["EXPECTED", "ModelZoo", "model_zoo_tasks"]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
