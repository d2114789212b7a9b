"""Keras 2 layer lists and HDF5 weights as torch modules, and back, without TensorFlow."""

from sharpkit.zoo.keras.model import KerasModel, build_model
from sharpkit.zoo.keras.weights import check_weights, load_weights, read_weights, write_weights

__all__ = [
    "KerasModel",
    "build_model",
    "check_weights",
    "load_weights",
    "read_weights",
    "write_weights",
]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
