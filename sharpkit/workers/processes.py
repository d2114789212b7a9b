"""Worker processes, one item at a time each; one that dies, stops or hangs takes nothing with it.

Pools share a queue between their workers, and a worker killed at a bad moment blocks it. Here every
worker has a connection of its own, and a thread of the driver that alone waits for it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import cloudpickle
import torch

from sharpkit.errors import RunError
from sharpkit.memory import available_memory
from sharpkit.workers.outcome import Failure
from sharpkit.workers.serving import Ready, Refused
from sharpkit.workers.settings import Workers
from sharpkit.workers.worker import LOOK_EVERY, Died, Worker

_MOST_FAILED_STARTS = 3  # in a row; more means that no worker can start
_START = 300.0  # seconds that a worker may take to start
_LEAST_START = 60.0  # with a shorter limit for items: a busy machine takes long to import


@dataclass
class _Job:
    item: Any
    crashes: int = 0


def run_in_processes(
    function: Callable[[Any, str], Any], items: Iterable[Any], workers: Workers, device: str
) -> Generator[tuple[Any, Any]]:
    """`run_items` in worker processes of this machine."""
    threads, memory = workers.threads or 1, workers.memory
    devices = _devices(device, workers.count, threads)
    if memory is None and torch.device(device).type == "cpu":
        memory = (available_memory(torch.device("cpu")) or 0) // len(devices) or None
    setup = cloudpickle.dumps((function, threads, memory))
    crew = _Crew(setup, iter(items), devices, workers.timeout)
    try:
        while crew.fill():
            yield from crew.finished()
    finally:
        crew.end()


class _Crew:
    """The workers of a run, by their place, and the jobs that are to be done again."""

    def __init__(
        self, setup: bytes, source: Iterator[Any], devices: Sequence[str], timeout: float | None
    ) -> None:
        self._setup, self._source, self._devices = setup, source, devices
        self._timeout = math.inf if timeout is None else timeout
        self._start = _START if timeout is None else max(timeout, _LEAST_START)
        self._workers = dict[int, Worker]()
        self._again = deque[_Job]()
        self._events = SimpleQueue[tuple[Worker, Any]]()
        self._failed_starts = 0
        self._looked = time.monotonic()

    def fill(self) -> bool:
        """Start a worker at every place that is free, if there is a job; whether any works."""
        for place, device in enumerate(self._devices):
            if place not in self._workers and (job := self._next()) is not None:
                worker = Worker(self._setup, device, job, self._events, self._start)
                self._workers[place] = worker
        return bool(self._workers)

    def finished(self) -> Iterator[tuple[Any, Any]]:
        """Wait for whatever happens first; the items that are finished by it."""
        deadline = min(worker.deadline for worker in self._workers.values())
        wait = min(deadline - time.monotonic(), LOOK_EVERY)
        events = self._drain(max(0.0, wait))
        now = time.monotonic()  # what comes from now on counts, however late it is looked at
        for worker, message in events:
            place = next((p for p, w in self._workers.items() if w is worker), None)
            if place is not None:  # else it was given up before
                yield from self._take(place, worker, message)
        for place, worker in list(self._workers.items()):
            if now >= worker.deadline:
                yield from self._late(place, worker)
        if now - self._looked >= LOOK_EVERY:
            self._looked = now
            for worker in self._workers.values():
                worker.look()

    def end(self) -> None:
        """End all processes."""
        for worker in self._workers.values():
            worker.end()

    def _next(self) -> _Job | None:
        if self._again:
            return self._again.popleft()
        return next((_Job(item) for item in self._source), None)

    def _drain(self, seconds: float) -> list[tuple[Worker, Any]]:
        """All events that are there, or the first within so many seconds."""
        events = []
        try:
            events.append(self._events.get(timeout=seconds))
            while True:
                events.append(self._events.get_nowait())
        except Empty:
            return events

    def _take(self, place: int, worker: Worker, message: Any) -> Iterator[tuple[Any, Any]]:
        """Act on what came of a worker."""
        if isinstance(message, Ready):
            self._failed_starts = 0
            worker.begin(worker.job, (worker.job.item,), self._timeout)
        elif isinstance(message, Refused):
            raise RunError(f"worker processes cannot load what they shall do ({message.reason})")
        elif isinstance(message, Died):
            reason = worker.reason()
            self._lost(place, f"{reason}: {message.reason}" if reason == "no process" else reason)
            yield from self._crashed(worker, reason)
        else:
            yield worker.job.item, message
            if (following := self._next()) is not None:
                worker.begin(following, (following.item,), self._timeout)
            else:
                self._workers.pop(place).end()

    def _late(self, place: int, worker: Worker) -> Iterator[tuple[Any, Any]]:
        if worker.ready:
            self._workers.pop(place).end()
            yield worker.job.item, Failure(f"stopped after {self._timeout:g} s")
        else:
            self._lost(place, f"not ready after {self._start:g} s")
            self._again.appendleft(worker.job)

    def _lost(self, place: int, reason: str) -> None:
        """Give a worker up; RunError if none can start."""
        worker = self._workers.pop(place)
        worker.end()
        self._failed_starts += not worker.ready
        if self._failed_starts >= _MOST_FAILED_STARTS:
            raise RunError(
                f"worker processes do not start ({reason}). A script that uses them needs "
                '`if __name__ == "__main__":`'
            )

    def _crashed(self, worker: Worker, reason: str) -> Iterator[tuple[Any, Any]]:
        """Do its job again, unless it was at fault twice."""
        job: _Job = worker.job
        job.crashes += worker.ready
        if job.crashes > 1:
            hint = "; was there too little memory?" if "SIGKILL" in reason else ""
            yield job.item, Failure(f"its worker process died twice ({reason}{hint})")
        elif worker.ready:
            self._again.append(job)
        else:
            self._again.appendleft(job)


def _devices(device: str, workers: int | None, threads: int) -> list[str]:
    """The device of every worker."""
    if torch.device(device).type == "cpu":
        from joblib import cpu_count

        return [device] * (workers or max(1, cpu_count() // threads))
    names = [device]
    if device == "cuda":
        names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [names[i % len(names)] for i in range(workers or len(names))]
