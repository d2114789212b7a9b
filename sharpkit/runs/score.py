"""Scoring a zoo: every measure on every model, resumable, in one process or in many."""

from __future__ import annotations

import copy
import itertools
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.data import TensorDataset
from tqdm import tqdm

from sharpkit.contract.loading import load_examples
from sharpkit.contract.rules import measuring_rules
from sharpkit.device import check_device
from sharpkit.display import html_of, lines_of
from sharpkit.errors import ArgumentError, RunError
from sharpkit.files import atomic_path, write_csv
from sharpkit.lock import sole_driver
from sharpkit.measures.measure import Measure, describe
from sharpkit.progress import progress_bar
from sharpkit.runs.directions import stated_directions
from sharpkit.runs.fingerprint import digest_of_settings
from sharpkit.runs.held_out import HeldOut
from sharpkit.runs.items import Scorer, WorkItem, hash_data, pending
from sharpkit.runs.shared_data import share
from sharpkit.runs.store import TEST_METRICS, Key, Outcome, Store
from sharpkit.runs.tables import write_scores
from sharpkit.workers import (
    Backend,
    Failure,
    check_limits,
    default_backend,
    error_message,
    run_items,
)
from sharpkit.zoo.task import Task, tasks_by_name

if TYPE_CHECKING:
    import pandas as pd

STORE_NAME = "results.sqlite"
_SCRATCH_NAME = ".data"
_Split = Literal["train", "test"]
# settings that determine the values of every measure
_COMMON = ("n", "seed", "device", "threads", "rules", "precision")


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

    def metrics(self) -> pd.DataFrame:
        """Accuracies, losses and generalization gap of every model of the tasks.

        Returns:
            pandas.DataFrame: One row per task and model: task, model, a column for each metric that
            is known (train_acc, test_acc, train_loss, test_loss, ..., and those of `test_metrics`;
            NaN where a model lacks it),
            and generalization_gap = train_acc − test_acc; of models without accuracies, in its
            place, loss_gap = test_loss − train_loss.

        Example:
            >>> import sharpkit as sk
            >>> measure = sk.MSharpness(m=1, rho=0.1)
            >>> scores = sk.score_zoo(sk.embedded_zoo(), measure, n=8, limit=1)
            >>> columns = ["train_acc", "test_acc", "generalization_gap"]
            >>> scores.metrics()[columns].loc[0].round(4).to_dict()
            {'train_acc': 0.986, 'test_acc': 0.8207, 'generalization_gap': 0.1653}
        """
        import pandas as pd

        rows = [
            {"task": task, "model": model, **_metrics(entry)}
            for task, configs in self.model_configs.items()
            for model, entry in configs.items()
        ]
        computed = self._store.test_metrics()
        rows = [row | computed.get((row["task"], row["model"]), {}) for row in rows]
        frame = pd.DataFrame(rows, columns=None if rows else ["task", "model"])
        if "train_acc" not in frame and {"train_loss", "test_loss"} <= set(frame.columns):
            return frame.assign(loss_gap=frame["test_loss"] - frame["train_loss"])
        accuracies = frame.reindex(columns=["train_acc", "test_acc"]).astype(float)
        return frame.assign(generalization_gap=accuracies["train_acc"] - accuracies["test_acc"])

    @property
    def failures(self) -> pd.DataFrame:
        """One row per model and measure that failed: task, model, measure, error."""
        return self._store.failures()

    def provenance(self) -> pd.DataFrame:
        """One row per model and measure: time, hashes, device, precision, peak memory, versions."""
        return self._store.provenance()

    def export(self, path: str | Path) -> Path:
        """Write every value with its provenance to a .csv or .parquet file.

        Raises:
            ArgumentError: If it has another suffix, or the library for Parquet is missing.
        """
        path = Path(path)
        table = self.frame().merge(self.provenance(), on=["task", "model", "measure"])
        if path.suffix == ".csv":
            write_csv(table, path)
        elif path.suffix == ".parquet":
            try:
                with atomic_path(path) as temporary:
                    table.to_parquet(temporary, index=False)
            except ImportError as error:
                raise ArgumentError(
                    "Parquet needs pyarrow: pip install 'sharpkit[parquet]'"
                ) from error
        else:
            raise ArgumentError(f"{path}: expected a name that ends in .csv or .parquet")
        return path

    @property
    def model_configs(self) -> dict[str, dict[str, Any]]:
        """Task name -> its model_configs (hyperparameters and metrics of every model)."""
        return self._store.model_configs()

    @property
    def config(self) -> dict[str, Any]:
        """What the run computes: measures, n, seed, device, threads, rules, precision, tasks."""
        return self._store.config

    @property
    def directions(self) -> dict[str, Any]:
        """Measure -> what its large values should mean: 1 a large gap, -1 a small one, or None.

        Of a measure whose values differ in this, a dict of these by `form`. Measures of a run by
        an earlier version are absent.
        """
        return self._store.directions

    def __repr__(self) -> str:
        if self._store.closed:
            return f"Scores: {self._store.path or 'in memory'}, closed"
        return lines_of(self._head(), self.frame())

    def _repr_html_(self) -> str:
        return repr(self) if self._store.closed else html_of(self._head(), self.frame())

    def _head(self) -> str:
        frame, failed = self.frame(), len(self.failures)
        models, measures = (frame[name].nunique() for name in ("model", "measure"))
        counts = f"{models} models, {measures} measures, {len(frame)} values, {failed} failures"
        return f"Scores: {counts}"

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
    backend: Backend | None = None,
    workers: int | None = None,
    threads: int | None = None,
    timeout: float | None = None,
    memory: int | None = None,
    address: str | None = None,
    test_metrics: bool = False,
    progress: bool = True,
) -> Scores:
    """Every measure on every model of a zoo; each result is saved as soon as it is there.

    Started again with the same arguments, it skips what is done, unless the files that it was
    computed from have changed. A model that fails is recorded with its error, and the others are
    scored; failures are tried again at the next start.

    Args:
        zoo: A zoo, one of its tasks, or a mapping of names to tasks.
        measures: One or several, each a callable `(model, data, *, seed)`.
        out: Run directory; None keeps the results in memory.
        n: Number of training examples, a seeded subset, the same for all models; None for all.
        limit: Only the first models of each task; the rest can follow later.
        seed: Of the subset and of the measures' random choices.
        device: Where the models run, such as "cpu" or "cuda".
        backend: "inline", in this process, one model at a time; "processes", in worker processes
            of this machine (a script then needs `if __name__ == "__main__":`); "ray", on a Ray
            cluster. All give the same bits. None for "processes" with several `workers`, else
            "inline".
        workers: Models at a time; None for one per GPU, or per `threads` cores, of a backend that
            has workers.
        threads: CPU threads per model, fixed for the run because rounding follows from them; None
            for those of the run or, if it is new, 1 for workers and torch's number for "inline".
        timeout: Seconds that one measure of one model may take; needs workers.
        memory: Bytes that a worker may allocate for it on its device; None for an equal share of
            what is free.
        address: Of the Ray cluster, such as "auto"; None starts one on this machine.
        test_metrics: Also compute calibration (ECE, negative log-likelihood, Brier score) and the
            accuracy on corrupted images from the test data of the zoo, as columns of `.metrics()`
            that `evaluate(..., target="test_acc_blur")` takes; see `held_out_metrics`. A later
            start may ask for them.
        progress: Show a bar with the time left.

    Returns:
        Scores: `.frame()`, `.metrics()`, `.failures`, `.provenance()`.

    Raises:
        RunError: If `out` holds a run of another configuration or precision, or of an older
            version's rules, belongs to another process, or cannot be written; or if workers cannot
            start.
        ArgumentError: If an argument is out of range, the device cannot be used, a measure needs
            groups of more than n examples, or two measures have the same name.

    Example:
        >>> import sharpkit as sk
        >>> zoo = sk.embedded_zoo()
        >>> scores = sk.score_zoo(zoo, sk.MSharpness(m=[1, 16], rho=0.1), n=32, limit=2)
        >>> list(scores.frame().columns)
        ['task', 'model', 'measure', 'm', 'rho', 'value', 'std_error']
        >>> len(scores.frame())
        4
    """
    tasks = tasks_by_name(zoo)
    named = named_measures(measures)
    check_request(named, n, limit)
    backend = backend or default_backend(workers or 1)
    check_limits(backend, workers, threads, timeout, memory)
    if backend == "inline" and (workers or 1) > 1:
        raise ArgumentError(
            f'workers = {workers}, but backend "inline" has only this process: leave out backend, '
            'or give "processes" or "ray"'
        )
    if backend != "ray":  # its workers may have a GPU that this process lacks
        check_device(device)
    run = None if out is None else Path(out)
    with sole_driver(run), _scratch(run) as scratch:
        threads = threads or recorded_threads(run) or _default_threads(backend)
        locations = {name: task.location for name, task in tasks.items()}
        config = run_config(named, n, seed, device, threads, locations)
        store = Store(None if run is None else run / STORE_NAME, config)
        store.set_directions(stated_directions(named))
        run_them = partial(
            run_items,
            backend=backend,
            workers=workers,
            threads=threads,
            timeout=timeout,
            memory=memory,
            device=str(device),
            address=address,
        )
        rounds: list[tuple[Mapping[str, Measure], _Split]] = [(named, "train")]
        if test_metrics:
            rounds.append(({TEST_METRICS: HeldOut()}, "test"))
        for called, split in rounds:
            keys = pending(store, tasks, called, limit, progress=progress)
            total = sum(min(len(task), limit or len(task)) for task in tasks.values()) * len(called)
            with progress_bar(
                total=total,
                initial=total - len(keys),
                desc="score" if split == "train" else "test data",
                unit="model",
                progress=progress,
            ) as bar:
                items = _Items(store, tasks, config, backend, scratch, bar, split)
                results = run_them(Scorer(tasks, called, seed), items.of(keys))
                with closing(results):  # workers end at once if this process is interrupted
                    for item, result in results:
                        outcome = (
                            Outcome(error=result.message) if isinstance(result, Failure) else result
                        )
                        items.record(item[:3], outcome)
    scores = Scores(store)
    warn_if_all_failed(scores)
    if run is not None:
        write_scores(scores.frame(), run)
    return scores


class _Items:
    """The driver's side of the work items: opens the data of each task, and writes the results."""

    def __init__(
        self,
        store: Store,
        tasks: Mapping[str, Task],
        config: Mapping[str, Any],
        backend: Backend,
        scratch: Path,
        bar: tqdm[Any],
        split: _Split,
    ) -> None:
        self._store, self._tasks, self._config = store, tasks, config
        self._backend, self._scratch, self._bar, self._split = backend, scratch, bar, split
        self._data_hashes: dict[str, str] = {}
        self._left: Counter[str] = Counter()
        measures = {**config["measures"], TEST_METRICS: {}}
        self._settings = settings_hashes({**config, "measures": measures})

    def of(self, keys: Sequence[Key]) -> Iterator[WorkItem]:
        """The items of some keys, task by task; a task is opened when its turn comes."""
        self._left = Counter(task for task, _, _ in keys)
        for name, task in self._tasks.items():
            with suppress(_Unopened), _opening():  # told when its turn comes
                configs = task.model_configs
                self._store.add_task(name, configs)
        for name, of_task in itertools.groupby(keys, lambda key: key[0]):
            group = list(of_task)
            try:
                with _opening():
                    data = self._open(name)
            except _Unopened as error:
                for key in group:
                    self.record(key, Outcome(error=str(error)))
            else:
                handle = share(data, self._backend, self._folder(name))
                del data  # of many tasks, one at a time is in memory
                yield from (WorkItem(*key, handle) for key in group)

    def record(self, key: Key, outcome: Outcome) -> None:
        """Write what became of an item."""
        task, _, measure = key
        complete = replace(
            outcome, data_hash=self._data_hashes.get(task), settings_hash=self._settings[measure]
        )
        self._store.add(*key, complete)
        self._left[task] -= 1
        if self._left[task] == 0:
            shutil.rmtree(self._folder(task), ignore_errors=True)
        self._bar.update()

    def _open(self, name: str) -> TensorDataset:
        """The subset that all models of a task are measured on, or all of its test data."""
        task = self._tasks[name]
        task.model_configs  # noqa: B018  (raises if they cannot be read)
        if self._split == "test":  # whose files are among those of each item
            return copy.copy(task).dataset("test")
        self._data_hashes[name] = hash_data(self._store, name, task)
        if self._backend != "inline":
            task = copy.copy(task)  # a task keeps its data; here it is not needed again
        examples = load_examples(
            task.dataset("train"), n=self._config["n"], seed=self._config["seed"]
        )
        return TensorDataset(examples.inputs, examples.labels)

    def _folder(self, task: str) -> Path:
        return self._scratch / f"{self._split}-{list(self._tasks).index(task)}"


class _Unopened(Exception):
    """A task cannot be opened, for whatever reason; the others can."""


@contextmanager
def _opening() -> Iterator[None]:
    """Turn whatever a task's files cause into `_Unopened`; what is wrong with the run passes."""
    try:
        yield
    except (MemoryError, RunError):
        raise
    except Exception as error:
        raise _Unopened(error_message(error)) from error


@contextmanager
def _scratch(run: Path | None) -> Iterator[Path]:
    """A folder for the data that workers share; what a killed driver left in it is removed."""
    if run is None:
        with tempfile.TemporaryDirectory(prefix="sharpkit-") as temporary:
            yield Path(temporary)
        return
    folder = run / _SCRATCH_NAME
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_config(
    measures: Mapping[str, Measure],
    n: int | None,
    seed: int,
    device: str | torch.device,
    threads: int,
    tasks: Mapping[str, str | None],
) -> dict[str, Any]:
    """What a run computes, as the store keeps it; a task that is in no file has no place."""
    return {
        "measures": {name: describe(measure)[1] for name, measure in measures.items()},
        "n": n,
        "seed": seed,
        "device": torch.device(device).type,
        "threads": threads,
        **measuring_rules(),
        "tasks": dict(tasks),
    }


def settings_hashes(config: Mapping[str, Any]) -> dict[str, str]:
    """Measure -> SHA-256 of all settings that determine its values."""
    common = {key: config[key] for key in _COMMON}
    return {
        name: digest_of_settings({"name": name, "measure": measure} | common)
        for name, measure in config["measures"].items()
    }


def named_measures(measures: Measure | Sequence[Measure]) -> dict[str, Measure]:
    """The measures by name; ArgumentError if there is none, or two have the same name."""
    several = measures if isinstance(measures, Sequence) else [measures]
    names = [describe(measure)[0] for measure in several]
    if not names:
        raise ArgumentError("no measure is given")
    if TEST_METRICS in names:
        raise ArgumentError(f"{TEST_METRICS!r} is no name for a measure: runs use it themselves")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ArgumentError(
            f"two measures have the same name, {twice[0]!r}: give one of them another `name`, such "
            f"as MSharpness(..., name={twice[0] + '_2'!r}) or make_measure(..., name=...)"
        )
    return dict(zip(names, several, strict=True))


def check_request(measures: Mapping[str, Measure], n: int | None, limit: int | None = None) -> None:
    """ArgumentError if a number is below 1 or a measure has groups of more than n examples."""
    for label, number in (("n", n), ("limit", limit)):
        if number is not None and number < 1:
            raise ArgumentError(f"{label} must be at least 1, got {number}")
    for name, measure in measures.items():
        m = getattr(measure, "m", 1)
        largest = max(m) if isinstance(m, Sequence) else m
        if n is not None and largest > n:
            raise ArgumentError(f"{name}: m = {largest} is larger than n = {n} examples")


def _metrics(entry: Any) -> Mapping[str, Any]:
    """What a zoo recorded of a model, if it did."""
    metrics = entry.get("metrics") if isinstance(entry, Mapping) else None
    return metrics if isinstance(metrics, Mapping) else {}


def warn_if_all_failed(scores: Scores) -> None:
    """Say first that there is nothing, where a table would only be empty."""
    failures = scores.failures
    if len(failures) and scores.frame().empty:
        first = failures.iloc[0]
        warnings.warn(
            f"nothing could be scored: all {len(failures)} attempts failed, the first "
            f"({first.model}, {first.measure}) with: {first.error}. `.failures` has all",
            stacklevel=3,
        )


def recorded_threads(run: Path | None) -> int | None:
    """The threads that a run was started with."""
    if run is None or not (run / STORE_NAME).is_file():
        return None
    scores = Scores.open(run)
    threads: int | None = scores.config.get("threads")
    scores.close()
    return threads


def _default_threads(backend: Backend) -> int:
    return torch.get_num_threads() if backend == "inline" else 1
