"""Models of one task and one shape that are loaded, hashed and measured together."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from sharpkit.contract.precision import measuring_precision
from sharpkit.measures.measure import Estimate, Measure, evaluate_stack
from sharpkit.runs.items import hash_of, stamp_of
from sharpkit.runs.provenance import circumstances, dtype_name, restart_peak_memory
from sharpkit.runs.shared_data import shared
from sharpkit.runs.store import Key, Outcome
from sharpkit.workers import error_message
from sharpkit.zoo.keras.model import layers_text
from sharpkit.zoo.task import Task


class Loaded(NamedTuple):
    """A model, or why there is none, and by measure the stamp and hash of what it depends on."""

    model: nn.Module | None
    sources: dict[str, tuple[str, str]]
    error: str | None
    seconds: float


class StackItem(NamedTuple):
    """Some measures on some models of a task.

    `data` is what `share` returned for its examples; `loaded` are the models, if another thread
    loads them: emptied when they are used.
    """

    task: str
    models: tuple[str, ...]
    measures: tuple[str, ...]
    data: Any
    loaded: list[Future[Loaded]]

    @property
    def keys(self) -> list[Key]:
        """What it does."""
        return [(self.task, model, measure) for model in self.models for measure in self.measures]


def stacks_of(
    tasks: Mapping[str, Task], keys: Iterable[Key], most: int, data: Any
) -> Iterator[StackItem]:
    """The stacks of the keys of one task, each of so many models at most.

    Models come together that have the same measures to do and, as far as their entries tell
    without loading them (by a `config`), the same layers.
    """
    measures: dict[tuple[str, str], list[str]] = {}
    for name, model, measure in keys:
        measures.setdefault((name, model), []).append(measure)
    waiting: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for (name, model), own in measures.items():
        kind = name, _layers(tasks[name], model), tuple(own)
        models = waiting.setdefault(kind, [])
        models.append(model)
        if len(models) == most:
            yield StackItem(name, tuple(waiting.pop(kind)), tuple(own), data, [])
    for (name, _, kinds), models in waiting.items():
        yield StackItem(name, tuple(models), kinds, data, [])


def _layers(task: Task, model: str) -> str:
    """The layers of a model as text; empty if only loading tells."""
    if task.mirror is not None:  # its files would be copied for this
        return ""
    try:
        return layers_text(task[model].config)  # type: ignore[attr-defined]
    except Exception:  # there is none, or it is told when it is loaded
        return ""


def read_ahead(
    items: Iterable[StackItem], load: Callable[[str, str, Sequence[str]], Loaded]
) -> Generator[StackItem]:
    """The same items; while one is worked on, a thread loads the models of the next."""
    pool, ahead = ThreadPoolExecutor(1, "sharpkit-load"), None
    try:
        for item in items:
            item.loaded.extend(
                pool.submit(load, item.task, model, item.measures) for model in item.models
            )
            if ahead is not None:
                yield ahead
            ahead = item
        if ahead is not None:
            yield ahead
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class StackScorer:
    """Does a stack: loads its models, unless they are, and evaluates its measures."""

    tasks: Mapping[str, Task]  # the zoo
    measures: Mapping[str, Measure]  # by name
    seed: int  # of the measures' random choices

    def load(self, task: str, model: str, measures: Sequence[str]) -> Loaded:
        """One model; never raises."""
        began, sources = time.perf_counter(), dict[str, tuple[str, str]]()
        module, message, of_task = None, None, self.tasks[task]
        try:
            for name in measures:
                # before anything is loaded: a file that changes meanwhile will not fit its hash
                stamp = stamp_of(of_task, model, self.measures[name])
                sources[name] = stamp, ""
                sources[name] = stamp, hash_of(of_task, model, self.measures[name], stamp)
            module = of_task[model].load()
        except Exception as error:  # whatever a model does, the others are scored
            message = error_message(error)
        return Loaded(module, sources, message, time.perf_counter() - began)

    def __call__(self, item: StackItem, device: str) -> dict[Key, Outcome]:
        """The values of every model and measure, or the error, with where they come from."""
        if item.loaded:
            loaded = [future.result() for future in item.loaded]
            item.loaded.clear()
        else:
            loaded = [self.load(item.task, model, item.measures) for model in item.models]
        restart_peak_memory(device)
        models = {
            id_: each.model.to(device)
            for id_, each in zip(item.models, loaded, strict=True)
            if each.model is not None
        }
        outcomes: dict[Key, Outcome] = {}
        for measure in item.measures:
            began = time.perf_counter()
            values = self._values(measure, models, item.data)
            share = (time.perf_counter() - began) / max(len(models), 1)
            around = circumstances(device)
            for id_, each in zip(item.models, loaded, strict=True):
                stamp, hash_ = each.sources.get(measure, (None, None))
                outcome = Outcome(
                    error=each.error,
                    seconds=each.seconds / len(item.measures) + share,
                    weights_hash=hash_,
                    weights_stamp=stamp,
                    dtype=None if each.model is None else dtype_name(each.model),
                    **around,
                )
                found = values.get(id_)
                if isinstance(found, Exception):
                    outcome = replace(outcome, error=error_message(found))
                elif found is not None:
                    outcome = replace(outcome, values=found)
                outcomes[item.task, id_, measure] = outcome
        return outcomes

    def _values(
        self, measure: str, models: Mapping[str, nn.Module], data: Any
    ) -> dict[str, dict[str, Estimate] | Exception]:
        """By model."""
        if not models:
            return {}
        with measuring_precision():
            found = evaluate_stack(
                self.measures[measure], list(models.values()), shared(data), seed=self.seed
            )
        return dict(zip(models, found, strict=True))
