"""Work items on a Ray cluster: Ray places them, and starts them again when a node is lost."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch

from sharpkit.errors import ArgumentError, RunError
from sharpkit.memory import limit_memory
from sharpkit.workers.items import Failure, attempt, error_message
from sharpkit.workers.threads import limited_threads

_NOTHING = object()


def run_on_ray(
    function: Callable[[Any, str], Any],
    items: Iterable[Any],
    *,
    workers: int | None,
    threads: int,
    timeout: float | None,
    memory: int | None,
    device: str,
    address: str | None,
) -> Generator[tuple[Any, Any]]:
    """`run_items` in Ray tasks, each with its CPUs, GPU and memory requested.

    The time of an item counts from when it is handed to Ray, which has room for it.
    """
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
        except ConnectionError as error:
            raise RunError(f"no Ray cluster at {address!r}: {error}") from error
    on_gpu = torch.device(device).type == "cuda"
    requests = {"num_cpus": threads, "num_gpus": int(on_gpu), "memory": memory, "max_retries": 1}
    compute = ray.remote(**requests)(_compute)
    function_ref = ray.put(function)
    source, running = iter(items), dict[Any, tuple[Any, float]]()

    def room() -> int:
        if workers is not None:
            return workers
        resources = ray.cluster_resources()  # nodes come and go
        return max(1, int(resources.get("GPU", 0) if on_gpu else resources["CPU"] // threads))

    try:
        while True:
            while len(running) < room() and (item := next(source, _NOTHING)) is not _NOTHING:
                ref = compute.remote(function_ref, item, device, threads, memory)
                running[ref] = item, time.monotonic() + (timeout or math.inf)
            if not running:
                return
            left = min(deadline for _, deadline in running.values()) - time.monotonic()
            ready, _ = ray.wait(list(running), timeout=None if math.isinf(left) else max(0, left))
            for ref in ready:
                item, _ = running.pop(ref)
                yield item, _result(ref)
            now = time.monotonic()
            for ref in [ref for ref, (_, deadline) in running.items() if deadline <= now]:
                item, _ = running.pop(ref)
                ray.cancel(ref, force=True)
                yield item, Failure(f"stopped after {timeout:g} s")
    finally:
        for ref in running:
            ray.cancel(ref, force=True)
        if starts:
            ray.shutdown()


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
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        return Failure(f"its worker was lost twice ({error_message(error)})")
