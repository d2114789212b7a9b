"""What a zoo and a task hold, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from sharpkit.zoo.pgdl import PgdlModel, PgdlTask


def tasks_table(zoo: Mapping[str, PgdlTask]) -> pd.DataFrame:
    """One row per task: task, models, path (or URL)."""
    import pandas as pd

    rows = [(task.name, len(task), task.location) for task in zoo.values()]
    return pd.DataFrame(rows, columns=["task", "models", "path"])


def models_table(models: Sequence[PgdlModel]) -> pd.DataFrame:
    """One row per model: task, model, hyperparameters, metrics.

    A hyperparameter and a metric of the same name are two columns.
    """
    import pandas as pd

    ids = [{"task": model.task.name, "model": model.id} for model in models]
    parts = [ids, [model.hyperparameters for model in models], [model.metrics for model in models]]
    return pd.concat([pd.DataFrame(rows) for rows in parts], axis=1)
