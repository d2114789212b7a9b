"""The PGDL competition's format."""

from sharpkit.zoo.pgdl.model import WEIGHT_FILES, PgdlModel
from sharpkit.zoo.pgdl.task import EXPECTED, PgdlTask, pgdl_tasks

__all__ = ["EXPECTED", "WEIGHT_FILES", "PgdlModel", "PgdlTask", "pgdl_tasks"]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
