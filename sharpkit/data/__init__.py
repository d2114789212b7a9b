"""Data sets by name, as tensors in memory."""

from sharpkit.data.datasets import load_dataset

__all__ = ["load_dataset"]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
