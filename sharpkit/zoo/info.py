"""A table of what a zoo holds, which validates every file and never stops at the first problem."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpkit.errors import ArgumentError, SharpkitError
from sharpkit.zoo.formats import Zoo, find_tasks
from sharpkit.zoo.pgdl import PgdlTask
from sharpkit.zoo.pgdl.problems import pgdl_rows
from sharpkit.zoo.recomputed import COLUMNS as AGAIN, OF_ZOO, with_accuracies
from sharpkit.zoo.task_rows import task_rows

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ["task", "model", "layers", "parameters", "train_acc", "test_acc"]
COLUMNS += ["generalization_gap", "problem"]


def zoo_info(
    zoo: Zoo | str | Path, deep: bool = False, *, accuracies: int | None = OF_ZOO
) -> pd.DataFrame:
    """One row per model, with what is wrong with its files; further rows for broken data files.

    Always checked: model_configs.json, each config.json (every layer builds), each weight file
    (opens, shapes agree), that shards are there. With `deep`: every weight is read and finite, one
    forward pass per model is finite, every shard is decoded with its checksums, labels fit. Without
    `deep`, weights and shards of a remote zoo are not copied, only seen to be there.

    Of a zoo in another format, every model that is here is loaded, and with `deep` so are the
    weights before training and the data, with a forward pass; layers are the modules that have
    parameters of their own. Of a zoo that comes without images, test accuracies of some networks
    are computed again on yours, beside the recorded ones.

    Args:
        zoo: An open zoo, its path or URL.
        deep: Read everything.
        accuracies: Of how many networks of a task, evenly chosen, the test accuracy is computed
            again; None for all, 0 for none. In a zoo that has its images with it, of none.

    Returns:
        DataFrame: Columns task, model, layers, parameters, train_acc, test_acc,
        generalization_gap, problem. `problem` is "" where all is well; rows about a task's files
        have no model. Where accuracies were computed again, also recomputed_test_acc, examples (how
        many test images) and read_as (how what the files do not tell was taken, and what it would
        give otherwise).

    Raises:
        ZooFormatError: There is no zoo at the path.
        ArgumentError: A negative number of accuracies.

    Example:
        >>> from sharpkit.zoo import embedded_zoo
        >>> table = zoo_info(embedded_zoo().path)  # your own directory, such as "public_data"
        >>> len(table), bool((table.problem == "").all())
        (96, True)
    """
    import pandas as pd

    if accuracies is not None and accuracies < 0:
        raise ArgumentError(f"accuracies is {accuracies}; expected a number of networks, or None")
    opened = zoo if isinstance(zoo, Zoo) else find_tasks(zoo)
    rows: list[dict[str, Any]] = [
        {"task": name, "problem": problem} for name, problem in opened.refused.items()
    ]
    for task in opened.values():
        try:
            # whose files can be looked into without loading the models
            found = pgdl_rows(task, deep) if isinstance(task, PgdlTask) else task_rows(task, deep)
            rows += with_accuracies(task, found, accuracies)
        except SharpkitError as error:  # of the files that say which models there are
            rows.append({"task": task.name, "problem": str(error)})
    again = AGAIN if any(AGAIN[0] in row for row in rows) else []
    frame = pd.DataFrame(rows, columns=[*COLUMNS, *again])
    counts = {"layers": "Int64", "parameters": "Int64", "model": "string"}
    return frame.astype(counts | ({"examples": "Int64"} if again else {}))
