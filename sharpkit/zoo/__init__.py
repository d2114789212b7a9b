"""Zoos of trained networks: what a task is, and the formats in which zoos are stored."""

from sharpkit.zoo.checkpoints import Checkpoint, CheckpointTask
from sharpkit.zoo.embedded import embedded_zoo
from sharpkit.zoo.fetch import fetch_zoo
from sharpkit.zoo.formats import Zoo, load_zoo
from sharpkit.zoo.grid import check_grid
from sharpkit.zoo.info import zoo_info
from sharpkit.zoo.keras import KerasModel, build_model, load_weights, read_weights, write_weights
from sharpkit.zoo.pgdl import PgdlModel, PgdlTask
from sharpkit.zoo.recomputed import Recomputed
from sharpkit.zoo.stacked import StackedModel, StackedTask
from sharpkit.zoo.task import ModelEntry, Task
from sharpkit.zoo.writer import ZooWriter, write_zoo

__all__ = [
    "Checkpoint",
    "CheckpointTask",
    "KerasModel",
    "ModelEntry",
    "PgdlModel",
    "PgdlTask",
    "Recomputed",
    "StackedModel",
    "StackedTask",
    "Task",
    "Zoo",
    "ZooWriter",
    "build_model",
    "check_grid",
    "embedded_zoo",
    "fetch_zoo",
    "load_weights",
    "load_zoo",
    "read_weights",
    "write_weights",
    "write_zoo",
    "zoo_info",
]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
