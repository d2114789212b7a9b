"""Worker processes, one item at a time each; one that dies or hangs takes nothing with it.

Pools share a queue between their workers, and a worker killed at a bad moment blocks it. Here every
worker has a pipe of its own, whose other end tells of its death.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import cloudpickle
import torch
from tqdm import tqdm

from sharpkit.errors import RunError
from sharpkit.memory import available_memory, limit_memory
from sharpkit.workers.items import Failure, attempt
from sharpkit.workers.threads import limited_threads

_READY = "ready"
_MOST_FAILED_STARTS = 3  # in a row; more means that no worker can start


@dataclass
class _Job:
    item: Any
    crashes: int = 0


def run_in_processes(
    function: Callable[[Any, str], Any],
    items: Iterable[Any],
    *,
    devices: Sequence[str],
    threads: int,
    timeout: float | None,
    memory: int | None,
) -> Generator[tuple[Any, Any]]:
    """`run_items` in one process per device given."""
    if memory is None and all(torch.device(d).type == "cpu" for d in devices):
        memory = (available_memory(torch.device("cpu")) or 0) // len(devices) or None
    setup = cloudpickle.dumps((function, threads, memory))
    source, again, crew = iter(items), deque[_Job](), dict[int, _Worker]()
    failed_starts = 0

    def next_job() -> _Job | None:
        if again:
            return again.popleft()
        return next((_Job(item) for item in source), None)

    def fill() -> None:
        for slot, device in enumerate(devices):
            if slot not in crew and (job := next_job()) is not None:
                crew[slot] = _Worker(setup, device, job)

    try:
        fill()
        while crew:
            now, deadline = time.monotonic(), min(w.deadline for w in crew.values())
            wait(
                [w.connection for w in crew.values()],
                None if math.isinf(deadline) else max(0.0, deadline - now),
            )
            finished = []
            for slot, worker in list(crew.items()):
                job, message = worker.job, worker.message()
                if message is None:
                    continue
                if message == _READY:
                    failed_starts = 0
                    worker.begin(job, timeout)
                elif isinstance(message, _Died) and not worker.ready:
                    failed_starts += 1
                    if failed_starts >= _MOST_FAILED_STARTS:
                        raise RunError(
                            f"worker processes do not start ({message.reason}). A script that "
                            'uses them needs `if __name__ == "__main__":`'
                        )
                    del crew[slot]
                    again.appendleft(job)
                elif isinstance(message, _Died):
                    del crew[slot]
                    job.crashes += 1
                    if job.crashes > 1:
                        finished.append((job.item, Failure(_death_of(message.reason))))
                    else:
                        again.append(job)
                else:
                    finished.append((job.item, message))
                    if isinstance(message, _Late):
                        finished[-1] = (job.item, Failure(f"stopped after {timeout:g} s"))
                        del crew[slot]
                    elif (following := next_job()) is not None:
                        worker.begin(following, timeout)
                    else:
                        worker.kill()
                        del crew[slot]
            fill()
            yield from finished
    finally:
        for worker in crew.values():
            worker.kill()


class _Late:
    """An item used up its time."""


@dataclass(frozen=True)
class _Died:
    reason: str


class _Worker:
    """One process and the item that it has, or gets as soon as it is ready."""

    def __init__(self, setup: bytes, device: str, job: _Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.job, self.ready, self.deadline = job, False, math.inf
        self._process = context.Process(target=_serve, args=(theirs, setup, device), daemon=True)
        with _interrupts_held():
            self._process.start()
        theirs.close()  # else its end would stay open when the worker dies

    def begin(self, job: _Job, timeout: float | None) -> None:
        """Hand it an item; the clock starts."""
        self.job, self.ready = job, True
        self.deadline = math.inf if timeout is None else time.monotonic() + timeout
        with suppress(OSError):  # it died; the next message says so
            self.connection.send(job.item)

    def message(self) -> Any:
        """A result, `_READY`, `_Died` or `_Late`; None while it works."""
        try:
            if self.connection.poll():
                return self.connection.recv()
        except (EOFError, OSError):
            self._process.join(1.0)  # its pipe closes a moment before it has an exit code
            reason = _reason(self._process.exitcode)
            self.kill()
            return _Died(reason)
        if time.monotonic() >= self.deadline:
            self.kill()
            return _Late()
        return None

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, setup: bytes, device: str) -> None:
    """What a worker process does."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves behind
    function, threads, memory = cloudpickle.loads(setup)
    with limited_threads(threads):
        limit_memory(memory, torch.device(device))
        connection.send(_READY)
        while True:
            try:
                item = connection.recv()
            except EOFError:
                return
            result = attempt(function, item, device)
            try:
                connection.send(result)
            except (TypeError, AttributeError, ValueError) as error:  # pickling, before any byte
                connection.send(Failure(f"its result cannot be sent: {error}"))


def _die_with_parent() -> None:
    """End this process when the one that started it is gone, however that happened."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal: children started here leave it to the driver."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _reason(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    return f"signal {signal.Signals(-code).name}"


def _death_of(reason: str) -> str:
    hint = "; was there too little memory?" if "SIGKILL" in reason else ""
    return f"its worker process died twice ({reason}{hint})"
