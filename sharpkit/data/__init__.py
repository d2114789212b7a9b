"""Data sets by name, as tensors in memory."""

from sharpkit.data.datasets import load_dataset
from sharpkit.data.idx import read_idx

__all__ = ["load_dataset", "read_idx"]
