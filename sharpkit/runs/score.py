"""Scoring a zoo: every measure on every model, resumable, in one process or in many."""

from __future__ import annotations

import copy
import itertools
import shutil
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import TensorDataset
from tqdm import tqdm

from sharpkit.contract.loading import load_examples
from sharpkit.device import check_device
from sharpkit.errors import RunError
from sharpkit.measures.measure import Measure, measures_stacks
from sharpkit.progress import progress_bar
from sharpkit.run_directory import sole_driver
from sharpkit.runs.held_out import HeldOut
from sharpkit.runs.items import Scorer, WorkItem, hash_data, pending
from sharpkit.runs.measure_values import stated_directions
from sharpkit.runs.request import (
    check_request,
    named_measures,
    recorded,
    run_config,
    settings_hashes,
)
from sharpkit.runs.scores import STORE_NAME, Scores, finished
from sharpkit.runs.shared_data import share
from sharpkit.runs.stacks import StackItem, StackScorer, read_ahead, stacks_of
from sharpkit.runs.store import TEST_METRICS, Key, Outcome, Store
from sharpkit.training.settings import check_whole
from sharpkit.workers import Backend, Failure, Workers, as_workers, error_message, run_items
from sharpkit.zoo.task import Task, tasks_by_name

_SCRATCH_NAME = ".data"
_Split = Literal["train", "test"]


def score_zoo(
    zoo: Task | Mapping[str, Task],
    measures: Measure | Sequence[Measure],
    *,
    out: str | Path | None = None,
    n: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    workers: int | Workers = 1,
    stack: int | None = None,
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
        workers: How many models at a time, or who measures them: `Workers(8, timeout=600)` for
            eight processes that may take ten minutes for one measure of one model,
            `Workers(backend="ray")` for a cluster. All give the same bits. Their `threads` are
            fixed for the run, because rounding follows from them: by default those of the run or,
            if it is new, 1 for workers and torch's number in this process.
        stack: Networks of one shape that are measured together, for measures that can (one-step
            `MSharpness` in the 2-norm), while the next ones are loaded; None for that of the run
            or, if it is new, one by one. Values change by rounding only, which also follows from
            what there is to do; it is fixed for the run as `threads` are. For a device that small
            networks leave idle: on a CPU it gains nothing, on a GPU it has not been measured yet.
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
    if stack is not None:
        check_whole("stack", stack, 1)
    given = as_workers(workers)
    if given.place != "ray":  # its workers may have a GPU that this process lacks
        check_device(device)
    run = None if out is None else Path(out)
    with sole_driver(run), _scratch(run) as scratch:
        alone = torch.get_num_threads() if given.place == "inline" else 1
        before = recorded(run)
        threads = given.threads or before.get("threads") or alone
        stack = before.get("stack") if stack is None else stack
        given = replace(given, threads=threads)
        locations = {name: task.location for name, task in tasks.items()}
        config = run_config(named, n, seed, device, threads, locations)
        if stack is not None:
            config["stack"] = stack
        store = Store(None if run is None else run / STORE_NAME, config)
        store.set_directions(stated_directions(named))
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
                items = _Items(store, tasks, config, given.place, scratch, bar, split)
                items.note_tasks()
                if stack is not None and split == "train":
                    stacks = StackScorer(tasks, called, seed)
                    keys = _in_stacks(stacks, items, keys, stack, given, str(device))
                scorer = Scorer(tasks, called, seed)
                results = run_items(scorer, items.of(keys), given, device=str(device))
                with closing(results):  # workers end at once if this process is interrupted
                    for item, result in results:
                        outcome = (
                            Outcome(error=result.message) if isinstance(result, Failure) else result
                        )
                        items.record(item[:3], outcome)
    return finished(store, run)


def _in_stacks(
    scorer: StackScorer, items: _Items, keys: Sequence[Key], most: int, workers: Workers,
    device: str,
) -> list[Key]:  # fmt: skip
    """Measure models in stacks; the keys that are left, to be done one by one."""
    names = {name for name, measure in scorer.measures.items() if measures_stacks(measure)}
    done = {key for key in keys if key[2] in names}
    stacks = items.stacks_of([key for key in keys if key in done], most)
    if workers.place == "inline":
        stacks = read_ahead(stacks, scorer.load)
    results = run_items(scorer, stacks, workers, device=device)
    with closing(stacks), closing(results):
        for item, result in results:
            if isinstance(result, Failure):  # of the stack as a whole
                done.difference_update(item.keys)
                continue
            items.record_all(result)
    return [key for key in keys if key not in done]


@dataclass
class _Items:
    """The driver's side of the work items: opens the data of each task, and writes the results."""

    store: Store
    tasks: Mapping[str, Task]
    config: Mapping[str, Any]
    backend: Backend
    scratch: Path
    bar: tqdm[Any]
    split: _Split
    data_hashes: dict[str, str] = field(default_factory=dict)
    left: Counter[str] = field(default_factory=Counter)  # items of a task that are to do

    @cached_property
    def _settings(self) -> dict[str, str]:
        measures = {**self.config["measures"], TEST_METRICS: {}}
        return settings_hashes({**self.config, "measures": measures})

    def note_tasks(self) -> None:
        """Keep the hyperparameters and metrics of all tasks that can be opened."""
        for name, task in self.tasks.items():
            with suppress(_Unopened), _opening():  # told when its turn comes
                configs = task.model_configs
                self.store.add_task(name, configs)

    def of(self, keys: Sequence[Key]) -> Iterator[WorkItem]:
        """The items of some keys, task by task; a task is opened when its turn comes."""
        for of_task, data in self._opened(keys):
            yield from (WorkItem(*key, data) for key in of_task)

    def stacks_of(self, keys: Sequence[Key], most: int) -> Generator[StackItem]:
        """The same as stacks of models."""
        for of_task, data in self._opened(keys):
            yield from stacks_of(self.tasks, of_task, most, data)

    def _opened(self, keys: Sequence[Key]) -> Iterator[tuple[list[Key], Any]]:
        """The keys of every task, with its data for the items."""
        self.left = Counter(task for task, _, _ in keys)
        for name, of_task in itertools.groupby(keys, lambda key: key[0]):
            group = list(of_task)
            try:
                with _opening():
                    data = self._open(name)
            except _Unopened as error:
                for key in group:
                    self.record(key, Outcome(error=str(error)))
            else:
                handle = share(data, self.backend, self._folder(name))
                del data  # of many tasks, one at a time is in memory
                yield group, handle

    def record(self, key: Key, outcome: Outcome) -> None:
        """Write what became of an item."""
        self.record_all({key: outcome})

    def record_all(self, outcomes: Mapping[Key, Outcome]) -> None:
        """Write what became of several items, at once."""
        hashes, settings = self.data_hashes, self._settings
        self.store.add_all(
            {
                key: replace(outcome, data_hash=hashes.get(key[0]), settings_hash=settings[key[2]])
                for key, outcome in outcomes.items()
            }
        )
        for task, _, _ in outcomes:
            self.left[task] -= 1
            if self.left[task] == 0:
                shutil.rmtree(self._folder(task), ignore_errors=True)
        self.bar.update(len(outcomes))

    def _open(self, name: str) -> TensorDataset:
        """The subset that all models of a task are measured on, or all of its test data."""
        task = self.tasks[name]
        task.model_configs  # noqa: B018  (raises if they cannot be read)
        if self.split == "test":  # whose files are among those of each item
            return copy.copy(task).dataset("test")
        self.data_hashes[name] = hash_data(self.store, name, task)
        if self.backend != "inline":
            task = copy.copy(task)  # a task keeps its data; here it is not needed again
        examples = load_examples(
            task.dataset("train"), n=self.config["n"], seed=self.config["seed"]
        )
        return TensorDataset(examples.inputs, examples.labels)

    def _folder(self, task: str) -> Path:
        return self.scratch / f"{self.split}-{list(self.tasks).index(task)}"


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
