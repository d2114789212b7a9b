"""Scoring a zoo: every measure on every model, resumable."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import TensorDataset
from tqdm import tqdm

from sharpkit.errors import ArgumentError, RunError, SharpkitError
from sharpkit.functional import load_examples
from sharpkit.measures.measure import Measure, describe, evaluate_measure
from sharpkit.runs.lock import sole_driver
from sharpkit.runs.store import Store
from sharpkit.zoo import ModelEntry, Task

if TYPE_CHECKING:
    import pandas as pd

STORE_NAME = "results.sqlite"


class Scores:
    """The scores of a run: what every measure gave for every model.

    Args:
        store: The open store of the run.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    @classmethod
    def open(cls, run: str | Path) -> Scores:
        """The scores in a run directory.

        Raises:
            RunError: If the directory holds no run.
        """
        path = Path(run) / STORE_NAME
        if not path.is_file():
            raise RunError(f"{run}: not a run directory (there is no {STORE_NAME} in it)")
        return cls(Store(path))

    def frame(self) -> pd.DataFrame:
        """One row per value: task, model, measure, setting columns (m, rho), value, std_error."""
        return self._store.results()

    @property
    def failures(self) -> pd.DataFrame:
        """One row per model and measure that failed: task, model, measure, error."""
        return self._store.failures()

    @property
    def model_configs(self) -> dict[str, dict[str, Any]]:
        """Task name -> its model_configs (hyperparameters and metrics of every model)."""
        return self._store.model_configs()

    @property
    def config(self) -> dict[str, Any]:
        """What the run computes: measures, n, seed, device."""
        return self._store.config

    def close(self) -> None:
        """Close the store."""
        self._store.close()


def score_zoo(
    zoo: Task | Mapping[str, Task],
    measures: Measure | Sequence[Measure],
    *,
    out: str | Path | None = None,
    n: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Scores:
    """Every measure on every model of a zoo; each result is saved as soon as it is there.

    Started again with the same arguments, it skips what is done. A model that fails is recorded
    with its error, and the others are scored; failures are tried again at the next start.

    Args:
        zoo: A zoo, one of its tasks, or a mapping of names to tasks.
        measures: One or several, each a callable (model, data, *, seed).
        out: Run directory; None keeps the results in memory.
        n: Number of training examples, a seeded subset, the same for all models; None for all.
        limit: Only the first models of each task; the rest can follow later.
        seed: Of the subset and of the measures' random choices.
        device: Where the models run, such as "cpu" or "cuda".
        progress: Show a bar with the time left.

    Returns:
        Scores: `.frame()`, `.failures`.

    Raises:
        RunError: If `out` holds a run of another configuration, belongs to another process, or
            cannot be written.
        ArgumentError: If n or limit is less than 1, or two measures have the same name.

    Example:
        >>> import sharpkit as sk
        >>> zoo = sk.embedded_zoo()
        >>> scores = sk.score_zoo(zoo, sk.MSharpness(m=[1, 16], rho=0.1), n=32, limit=2)
        >>> list(scores.frame().columns)
        ['task', 'model', 'measure', 'm', 'rho', 'value', 'std_error']
        >>> len(scores.frame())
        4
    """
    tasks = {zoo.name: zoo} if isinstance(zoo, Task) else dict(zoo)
    named = _named(measures)
    for label, number in (("n", n), ("limit", limit)):
        if number is not None and number < 1:
            raise ArgumentError(f"{label} must be at least 1, got {number}")
    config = {
        "measures": {name: describe(measure)[1] for name, measure in named.items()},
        "n": n,
        "seed": seed,
        "device": torch.device(device).type,
        "tasks": {name: str(Path(task.path).resolve()) for name, task in tasks.items()},
    }
    run = None if out is None else Path(out)
    with sole_driver(run):
        store = Store(None if run is None else run / STORE_NAME, config)
        done = store.done()
        items = [
            (name, model, measure)
            for name, task in tasks.items()
            for model in list(task)[:limit]
            for measure in named
            if (name, model, measure) not in done
        ]
        total = sum(min(len(task), limit or len(task)) for task in tasks.values()) * len(named)
        data: dict[str, TensorDataset | SharpkitError] = {}
        with tqdm(
            total=total,
            initial=total - len(items),
            desc="score",
            unit="model",
            disable=None if progress else True,
        ) as bar:
            for name, model, measure in items:
                if name not in data:
                    data[name] = _open_task(store, tasks[name], name, n, seed)
                _score_one(
                    store,
                    name,
                    tasks[name][model],
                    measure,
                    named[measure],
                    data[name],
                    seed,
                    device,
                )
                bar.update()
    return Scores(store)


def _named(measures: Measure | Sequence[Measure]) -> dict[str, Measure]:
    several = measures if isinstance(measures, Sequence) else [measures]
    named = {describe(measure)[0]: measure for measure in several}
    if not named:
        raise ArgumentError("no measure is given")
    if len(named) != len(several):
        raise ArgumentError("two measures have the same name: give one of them another `name`")
    return named


def _open_task(
    store: Store, task: Task, name: str, n: int | None, seed: int
) -> TensorDataset | SharpkitError:
    """The subset that all models of a task are measured on, or why there is none."""
    try:
        store.add_task(name, task.model_configs)
        examples = load_examples(task.dataset("train"), n=n, seed=seed)
        return TensorDataset(examples.inputs, examples.labels)
    except SharpkitError as error:
        return error


def _score_one(
    store: Store,
    task: str,
    entry: ModelEntry,
    name: str,
    measure: Measure,
    data: TensorDataset | SharpkitError,
    seed: int,
    device: str | torch.device,
) -> None:
    began = time.perf_counter()
    try:
        if isinstance(data, SharpkitError):
            raise data
        values = evaluate_measure(
            measure,
            entry.load().to(device),
            data,
            seed=seed,
            initial=lambda: entry.load("initial").to(device),
        )
        store.add(task, entry.id, name, values, time.perf_counter() - began)
    except Exception as error:  # whatever a model does, the others are scored
        message = (
            str(error) if isinstance(error, SharpkitError) else f"{type(error).__name__}: {error}"
        )
        store.add(task, entry.id, name, {}, time.perf_counter() - began, message)
