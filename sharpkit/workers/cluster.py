"""Work items on a Ray cluster: Ray places them, and starts them again when a node is lost."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from sharpkit.errors import ArgumentError, RunError
from sharpkit.memory import limit_memory
from sharpkit.workers.outcome import Failure, attempt, error_message
from sharpkit.workers.settings import Workers
from sharpkit.workers.threads import limited_threads
from sharpkit.workers.worker import LOOK_EVERY, MOST_STOPPED

_NOTHING = object()
_LONGEST_CANCEL = 30.0  # seconds; Ray kills a process that does not answer after five
_LONGEST_GET = 600.0  # seconds to bring a result from another node


def run_on_ray(
    function: Callable[[Any, str], Any], items: Iterable[Any], workers: Workers, device: str
) -> Generator[tuple[Any, Any]]:
    """`run_items` in Ray tasks, each with its CPUs, GPU and memory requested.

    The time of an item counts from when it is handed to Ray, which has room for it.
    """
    threads, memory, timeout = workers.threads or 1, workers.memory, workers.timeout
    on_gpu = torch.device(device).type == "cuda"
    requests = {"num_cpus": threads, "num_gpus": int(on_gpu), "memory": memory, "max_retries": 1}
    running, stopped = dict[Any, tuple[Any, float]](), _Stopped()
    with _cluster(workers.address, running) as ray:
        compute = ray.remote(**requests)(_compute)
        function_ref = ray.put(function)
        source = iter(items)
        while True:
            room = workers.count or _room(threads, on_gpu)
            while len(running) < room and (item := next(source, _NOTHING)) is not _NOTHING:
                try:
                    ref = compute.remote(function_ref, item, device, threads, memory)
                except TypeError as error:  # Ray's, of what it cannot pickle; pages long
                    reason = str(error).partition("==")[0].strip()
                    yield item, Failure(f"it cannot be sent to a worker: {reason}")
                    continue
                running[ref] = item, time.monotonic() + (timeout or math.inf)
            if not running:
                return
            left = min(deadline for _, deadline in running.values()) - time.monotonic()
            for ref in _finished(list(running), min(max(0.0, left), LOOK_EVERY)):
                item, _ = running.pop(ref)
                yield item, _result(ref)
            stopped.look()
            now = time.monotonic()
            late = [ref for ref, (_, deadline) in running.items() if deadline <= now]
            for ref in set(late).difference(_finished(late, 0.0)):
                item, _ = running.pop(ref)
                ray.cancel(ref, force=True)
                # until its place is free, so that the next one's time does not begin before
                ray.wait([ref], timeout=_LONGEST_CANCEL)
                yield item, Failure(f"stopped after {timeout:g} s")


@contextmanager
def _cluster(address: str | None, running: Mapping[Any, Any]) -> Iterator[Any]:
    """The module `ray`, connected; at the end, what runs is cancelled, what was started ends."""
    try:
        import ray
    except ImportError as error:
        raise ArgumentError("backend \"ray\" needs Ray: pip install 'sharpkit[ray]'") from error

    starts = not ray.is_initialized()
    if starts:
        try:
            ray.init(
                address=address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (OSError, RuntimeError, TimeoutError) as error:
            name = "of this machine starts" if address is None else f"at {address!r}"
            raise RunError(f"no Ray cluster {name}: {error_message(error)}") from error
    try:
        yield ray
    except ray.exceptions.RayError as error:
        raise RunError(f"the Ray cluster is lost: {error_message(error)}") from error
    finally:
        for ref in running:
            with suppress(ray.exceptions.RayError):
                ray.cancel(ref, force=True)
        if starts:
            ray.shutdown()


def _room(threads: int, on_gpu: bool) -> int:
    """Items that the cluster has room for now: nodes come and go."""
    import ray

    resources = ray.cluster_resources()
    return max(1, int(resources.get("GPU", 0) if on_gpu else resources["CPU"] // threads))


def _finished(refs: list[Any], seconds: float) -> list[Any]:
    """All that are finished, after waiting so many seconds at most for the first."""
    import ray

    if not refs:
        return []
    ray.wait(refs, timeout=seconds)
    ready: list[Any] = ray.wait(refs, num_returns=len(refs), timeout=0)[0]
    return ready


class _Stopped:
    """Ray's processes of this machine that are stopped: Ray itself would wait for them for ever."""

    def __init__(self) -> None:
        self._looked, self._seen = time.monotonic(), dict[int, int]()

    def look(self) -> None:
        """End those that have been found stopped in every look for some time; Ray tries again."""
        if time.monotonic() - self._looked < LOOK_EVERY:
            return
        self._looked = time.monotonic()
        self._seen = {pid: self._seen.get(pid, 0) + 1 for pid in _stopped_workers()}
        for pid, times in self._seen.items():
            if times >= MOST_STOPPED:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)


def _stopped_workers() -> Iterator[int]:
    """Where the system tells: processes with the names that Ray gives its workers, if stopped."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            name = (folder / "cmdline").read_bytes()
            if name.startswith(b"ray::"):
                state = (folder / "stat").read_bytes().rpartition(b")")[2].split()[0]
                if state in (b"T", b"t"):
                    yield int(folder.name)


def _compute(
    function: Callable[[Any, str], Any], item: Any, device: str, threads: int, memory: int | None
) -> Any:
    """One item, in a process of Ray."""
    limit_memory(memory, torch.device(device))
    with limited_threads(threads):
        return attempt(function, item, device)


def _result(ref: Any) -> Any:
    import ray

    try:
        return ray.get(ref, timeout=_LONGEST_GET)
    except ray.exceptions.RayTaskError as error:  # the function's own errors are caught before
        return Failure(f"its result cannot be sent: {error_message(error)}")
    except ray.exceptions.RayError as error:
        return Failure(f"its worker was lost twice ({error_message(error)})")
