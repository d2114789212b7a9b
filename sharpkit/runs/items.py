"""Work items of a run, one measure on one model each: which are to do, and how one is done."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from sharpkit.contract.precision import measuring_precision
from sharpkit.digests import described, digest, digest_of_files, stamp
from sharpkit.errors import RunError, SharpkitError
from sharpkit.measures.measure import Estimate, Measure, evaluate_measure
from sharpkit.progress import progress_bar
from sharpkit.runs.provenance import circumstances, dtype_name, restart_peak_memory
from sharpkit.runs.shared_data import shared
from sharpkit.runs.store import Key, Outcome, Store
from sharpkit.workers import error_message
from sharpkit.zoo.keras import KerasModel
from sharpkit.zoo.task import ModelEntry, Task, Weights

_KEPT_BYTES = 2**28  # of the model that is kept


class WorkItem(NamedTuple):
    """One measure on one model; `data` is what `share` returned for the examples of its task."""

    task: str
    model: str
    measure: str
    data: Any


class LastLoaded:
    """The model that was loaded last, as measures that come one after the other ask for it again.

    Each gets a copy of its own: what one does to it, the next does not see. One model is kept, of
    those that are layers and weights from files and nothing else.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[str, ...], nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": None}  # other processes load their own

    def load(self, key: tuple[str, ...], load: Callable[[], nn.Module]) -> nn.Module:
        """What `load` gives, or a copy of what it gave for the same key.

        Args:
            key: Changes whenever the files do.
            load: Called if the last key was another one.
        """
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # two are never in memory
            model = load()
            if not isinstance(model, KerasModel) or _bytes(model) > _KEPT_BYTES:
                return model
            self._kept = key, model
        return copy.deepcopy(self._kept[1])


@dataclass(frozen=True)
class Scorer:
    """Does a work item: loads the model, evaluates the measure, never raises."""

    tasks: Mapping[str, Task]  # the zoo
    measures: Mapping[str, Measure]  # by name
    seed: int  # of the measures' random choices
    last: LastLoaded = field(default_factory=LastLoaded)

    def __call__(self, item: WorkItem, device: str) -> Outcome:
        """The values, or the error, with where they come from."""
        began = time.perf_counter()
        task, measure = self.tasks[item.task], self.measures[item.measure]
        entry = task[item.model]
        # before anything is loaded: a file that changes meanwhile will not fit its hash
        weights_stamp, weights_hash = stamp_of(task, item.model, measure), ""
        restart_peak_memory(device)
        values: dict[str, Estimate] = {}
        dtype, message = None, None
        try:
            weights_hash = hash_of(task, item.model, measure, weights_stamp)
            model = self._loaded(item, entry, weights_stamp).to(device)
            dtype = dtype_name(model)
            with measuring_precision():  # also for a user's own measures
                values = evaluate_measure(
                    measure,
                    model,
                    shared(item.data),
                    seed=self.seed,
                    initial=lambda: entry.load("initial").to(device),
                    metrics=lambda: entry.metrics,
                )
        except Exception as error:  # whatever a model does, the others are scored
            message = error_message(error)
        return Outcome(
            values=values,
            error=message,
            seconds=time.perf_counter() - began,
            weights_hash=weights_hash,
            weights_stamp=weights_stamp,
            dtype=dtype,
            **circumstances(device),
        )

    def _loaded(self, item: WorkItem, entry: ModelEntry, stamp: str) -> nn.Module:
        # with nothing that tells a change, or nobody who asks again
        if not stamp or "missing" in stamp or len(self.measures) == 1:
            return entry.load()
        return self.last.load((item.task, item.model, stamp), entry.load)


def model_files(task: Task, model: str, measure: Measure) -> tuple[Path, ...]:
    """The files that a measure of a model depends on, beside the training data."""
    files = [*task[model].files()]
    if getattr(measure, "needs_initial", False):
        files += task[model].files("initial")
    if getattr(measure, "needs_test_data", False):
        files += task.files("test")
    return tuple(dict.fromkeys(files))


def stamp_of(task: Task, model: str, measure: Measure) -> str:
    """Sizes and times of the files that a measure of a model depends on, and what else it does."""
    return _stamp(task, model_files(task, model, measure)) + _made_from(task[model])


def hash_of(task: Task, model: str, measure: Measure, stamp: str) -> str:
    """SHA-256 of what a measure of a model depends on; empty if a file cannot be read.

    Args:
        task: Of the model.
        model: Its id.
        measure: The measure.
        stamp: What `stamp_of` gives now.
    """
    own: Callable[[Weights], str] | None = getattr(task[model], "digest", None)
    made_from = _made_from(task[model])
    if own is None:
        files = _local(task, model_files(task, model, measure))
        found = _digest_of_copies(files, stamp)
    else:
        found = _digest_of_part(task, own, measure)
    return digest([found, made_from]) if found and made_from else found


def pending(
    store: Store,
    tasks: Mapping[str, Task],
    measures: Mapping[str, Measure],
    limit: int | None,
    *,
    progress: bool,
) -> list[Key]:
    """The work items without a result, and those whose files have changed since.

    Results whose files cannot be read any more are kept. `limit`: only the first models of a task.
    """
    data = {name: _data_hash(store, name, task) for name, task in tasks.items()}
    done, restamped = set[Key](), dict[Key, str]()
    rows = list(store.done())
    for key, known_hash, known_stamp, data_hash in progress_bar(
        iterable=rows, desc="check", unit="result", delay=2, leave=False, progress=progress
    ):
        name, model, measure = key
        if name not in tasks or model not in tasks[name] or measure not in measures:
            continue
        if data_hash and data[name] and data_hash != data[name]:
            continue
        try:
            now = stamp_of(tasks[name], model, measures[measure])
            if known_hash and now != known_stamp:
                found = hash_of(tasks[name], model, measures[measure], now)
                if found and found != known_hash:
                    continue
                if found:
                    restamped[key] = now
        except MemoryError:
            raise
        except Exception:  # gone, or no answer, which is no reason to drop what was found
            pass
        done.add(key)
    store.restamp(restamped)
    return [
        (name, model, measure)
        for name, task in tasks.items()
        for model in list(task)[:limit]
        for measure in measures
        if (name, model, measure) not in done
    ]


def hash_data(store: Store, name: str, task: Task) -> str:
    """The hash of the files of a task's training data, or of data in no file, kept in the store.

    Raises:
        ZooFormatError: They are missing.
        DownloadError: They are remote and cannot be copied.
    """
    files = task.files("train")
    now = _stamp(task, files)
    known_hash, known_stamp = store.data(name)
    if known_hash and now == known_stamp and files:
        return known_hash
    found = digest_of_files(_local(task, files)) if files else _digest_in_memory(task)
    store.set_data(name, found, now)
    return found


def _digest_in_memory(task: Task) -> str:
    """Of examples that are in no file: both splits, as far as they are there."""
    parts = [*task.dataset("train").tensors]
    with suppress(SharpkitError):  # a task may come without test data
        parts += task.dataset("test").tensors
    return digest(described(parts))


def _data_hash(store: Store, name: str, task: Task) -> str | None:
    """The hash of the data if it was known before; None if there is nothing to compare with."""
    if store.data(name)[0] is None:
        return None
    try:
        return hash_data(store, name, task)
    except (MemoryError, RunError):  # of this process, of its store
        raise
    except Exception:  # told when the task is opened
        return None


def _bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def _stamp(task: Task, files: Iterable[Path]) -> str:
    """Sizes and times of files, or what a server tells in their place: no file is read."""
    return stamp(files) if task.mirror is None else " ".join(map(task.mirror.stamp, files))


def _digest_of_part(task: Task, own: Callable[[Weights], str], measure: Measure) -> str:
    """The same of a model whose files have other models as well."""
    parts = [own("final")]
    if getattr(measure, "needs_initial", False):
        parts.append(own("initial"))
    if getattr(measure, "needs_test_data", False):
        parts.append(digest_of_files(_local(task, task.files("test"))))
    return digest(parts) if all(parts) else ""


def _made_from(entry: ModelEntry) -> str:
    """A digest of what a network depends on beside its files; empty for nothing."""
    try:
        text = getattr(entry, "made_from", "")
    except Exception:  # told when it is loaded
        return ""
    return digest([text]) if text else ""


def _local(task: Task, files: Iterable[Path]) -> tuple[Path, ...]:
    return tuple(files if task.mirror is None else map(task.mirror.fetch, files))


@lru_cache(maxsize=2)  # several measures of a model come one after the other
def _digest_of_copies(files: tuple[Path, ...], stamp: str) -> str:
    return digest_of_files(files)
