"""Tasks whose networks were kept at several epochs, and whose images lie elsewhere."""

from sharpkit.zoo.checkpoints.checkpoint import Checkpoint
from sharpkit.zoo.checkpoints.source import Source
from sharpkit.zoo.checkpoints.task import CheckpointTask

__all__ = ["Checkpoint", "CheckpointTask", "Source"]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
