"""What a command line names - tasks, models, checkpoints, measures - and scoring just that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.utils.data import TensorDataset

from sharpkit.errors import ArgumentError, SharpkitError
from sharpkit.measures import MSharpness
from sharpkit.measures.attention_geometry import has_attention
from sharpkit.measures.catalog import chosen_measures
from sharpkit.measures.recorded import KINDS
from sharpkit.runs.checkpoints import load_arrays, load_checkpoint, load_data
from sharpkit.runs.score import score_zoo
from sharpkit.runs.score_models import score_models
from sharpkit.runs.scores import Scores
from sharpkit.runs.trained import is_trained, load_trained, same_examples, trained_data
from sharpkit.safe_text import printable
from sharpkit.zoo import PgdlModel, Task, Zoo, load_zoo

_NAMED = 10  # tasks or models in a message
Loaders = dict[str, Callable[[], nn.Module]]


def opened_zoo(
    path: str,
    *,
    build: str | None = None,
    table: str | None = None,
    data: str | None = None,
    columns: Mapping[str, str] | None = None,
    hyperparameters: Sequence[str] | None = None,
) -> Zoo:
    """`load_zoo`, with data by name or as an .npz file."""
    examples = None if data is None else load_data(data)
    return load_zoo(
        path,
        build=build,
        table=table,
        data=examples,
        columns=columns,
        hyperparameters=hyperparameters,
    )


def zoo_models(
    zoo: Zoo, task: str | None, ids: Sequence[str], weights: Literal["final", "initial"] = "final"
) -> tuple[Loaders, TensorDataset]:
    """Some models of a task (None for the only one), not yet loaded, and its training data.

    Raises:
        ArgumentError: If the zoo has no such task or model, or several tasks and none is named.
    """
    if task is None and len(zoo) > 1:
        raise ArgumentError(f"the zoo has several tasks, name one: {_listed(zoo)}")
    name = task or next(iter(zoo))
    entries = chosen_tasks(zoo, [name])[name]
    unknown = set(ids) - set(entries)
    if unknown or not ids:
        wrong = f"no model {sorted(unknown)[0]!r} in" if unknown else "name one or more models of"
        raise ArgumentError(f"{wrong} {printable(name)}: {_listed(entries)}")
    models: Loaders = {f"model {i}": partial(entries[i].load, weights) for i in ids}
    return models, entries.dataset("train")


def chosen_tasks(zoo: Mapping[str, Task], names: Sequence[str]) -> dict[str, Task]:
    """The tasks with these names in the zoo's order, all for none; ArgumentError for another."""
    if unknown := set(names) - set(zoo):
        raise ArgumentError(f"no task {sorted(unknown)[0]!r}: the zoo has {_listed(zoo)}")
    return {name: task for name, task in zoo.items() if not names or name in names}


def checkpoint_models(
    checkpoints: Sequence[str], build: str | None, data: str | None
) -> tuple[Loaders, TensorDataset]:
    """Models of weight files by name, not yet loaded, and their training data.

    Runs of `sharpkit train` need neither `build` ("module:callable" that builds the model) nor
    `data` (an .npz file with x_train and y_train, or the name of a data set).

    Raises:
        ArgumentError: If they were trained on different data, or `build` or `data` is missing.
    """
    names = {Path(c).stem: c for c in checkpoints}
    if len(names) < len(checkpoints):
        names = {c: c for c in checkpoints}
    first = checkpoints[0]
    if data is None and is_trained(first):
        for other in checkpoints[1:]:
            if not same_examples(first, other):
                raise ArgumentError(
                    f"{Path(first).parent} and {Path(other).parent} were trained on different data "
                    "or labels: measure them one by one, or give --build and --data"
                )
        loaders: Loaders = {name: partial(load_trained, c, build) for name, c in names.items()}
        return loaders, trained_data(first)[0]
    if build is None or data is None:
        raise ArgumentError(
            f"{first} is not from `sharpkit train`, so it needs --build module:callable and "
            "--data FILE.npz"
        )
    loaders = {name: partial(load_checkpoint, c, build) for name, c in names.items()}
    return loaders, load_data(data)[0]


def score_tasks(
    zoo: Zoo, tasks: Sequence[str], measures: str, m_sharpness: MSharpness, **options: Any
) -> Scores:
    """Score tasks of a zoo by name, all for none; the options are those of `score_zoo`.

    Measures are comma-separated names, or "all": those that a model of these tasks can have.

    Raises:
        ArgumentError: An unknown task or measure, or a group larger than the examples.
    """
    selected = chosen_tasks(zoo, tasks)
    suits = traits_of_tasks(selected) if measures == "all" else {}
    chosen = chosen_measures(measures, m_sharpness, **suits)
    m = m_sharpness.m
    n, largest = options.get("n"), m if isinstance(m, int) else max(m)
    if n is not None and largest > n and m_sharpness in chosen:
        raise ArgumentError(f"--m {largest} is larger than --n {n}: a group has m of n examples")
    return score_zoo(selected, chosen, **options)


def score_checkpoints(
    checkpoints: Sequence[str],
    build: str | None,
    data: str | None,
    measures: str,
    m_sharpness: MSharpness,
    **options: Any,
) -> Scores:
    """Score weight files; see `checkpoint_models`, `score_tasks`; options are of `score_models`."""
    models, train = checkpoint_models(checkpoints, build, data)
    suits = traits_of_models(models, train) if measures == "all" else {}
    test = trained_data(checkpoints[0])[1] if data is None else load_data(data)[1]
    if test is None:
        test = load_arrays(str(data), "test")  # says what is missing
    chosen = chosen_measures(measures, m_sharpness, **suits)
    return score_models(models, chosen, train, test, loss=m_sharpness.loss, **options)


def traits_of_tasks(tasks: Mapping[str, Task]) -> dict[str, bool]:
    """What the first model of some task has: images, attention, a recorded length of training."""
    found = {"images": False, "attention": False, "recorded": False}
    for task in tasks.values():
        for id_ in islice(task, 1):
            with suppress(SharpkitError):  # told when the model is scored
                entry = task[id_]
                found["recorded"] |= not set(KINDS).isdisjoint(entry.metrics)
                if isinstance(entry, PgdlModel):  # which tells without weights and data
                    found["images"] |= len(entry.config.get("input_shape", ())) == 3
                    found["attention"] |= has_attention(entry.build())
                else:
                    found["images"] |= len(task.dataset("train")[0][0].shape) == 3
                    found["attention"] |= has_attention(entry.load())
    return found


def traits_of_models(models: Loaders, train: TensorDataset) -> dict[str, bool]:
    """The same of models that are loaded one by one."""
    attention = False
    for load in models.values():
        with suppress(Exception):  # whatever the user's function raises is told when it is scored
            attention = has_attention(load())
            break
    return {"images": len(train[0][0].shape) == 3, "attention": attention, "recorded": False}


def _listed(names: Iterable[str]) -> str:
    """The names, of many the first."""
    first = list(islice(names, _NAMED + 1))
    return printable(", ".join(first if len(first) <= _NAMED else [*first[:_NAMED], "..."]))
