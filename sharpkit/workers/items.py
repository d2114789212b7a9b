"""Many independent work items: in this process, in worker processes, or on a Ray cluster.

The process that calls `run_items` is the only one that sees results, so it alone need write them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch

from sharpkit.contract.precision import Precision, current_precision, precision
from sharpkit.errors import ArgumentError, SharpkitError
from sharpkit.workers.threads import limited_threads

Backend = Literal["inline", "processes", "ray"]
_LONGEST_MESSAGE = 2000
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Failure:
    """Why an item has no result."""

    message: str


def run_items(
    function: Callable[[Item, str], Result],
    items: Iterable[Item],
    *,
    backend: Backend = "inline",
    workers: int | None = None,
    threads: int = 1,
    timeout: float | None = None,
    memory: int | None = None,
    device: str = "cpu",
    address: str | None = None,
) -> Generator[tuple[Item, Result | Failure]]:
    """The results of a function on items, in the order in which they are finished.

    An item that raises is a `Failure`; the others go on. In "processes" and "ray", so is one that
    takes too long or too much memory, and one whose worker died twice: a crash is tried once more.
    Every item is computed with the same number of threads and at the `precision` of the caller,
    hence the same bits, in any backend and with any number of workers.

    Args:
        function: Called with an item and the device to use. Workers get a pickled copy, once.
        items: Read only as fast as they are worked on.
        backend: "inline", in this process; "processes", in worker processes of this machine
            (a script that asks for them needs `if __name__ == "__main__":`); "ray".
        workers: Items at a time; None for one per GPU, or per `threads` cores.
        threads: CPU threads of one item.
        timeout: Seconds that one item may take; needs a backend that can end it.
        memory: Bytes that one item may allocate on its device; None for an equal share of what is
            free ("processes" on a CPU) or no limit. sharpkit's own measures cut their data into
            chunks that fit half of it; where that binds, the last digits may follow from it.
        device: Such as "cpu"; "cuda" spreads the workers over all GPUs.
        address: Of a Ray cluster, such as "auto"; None for a local one.

    Yields:
        tuple: An item, and its result or `Failure`.

    Raises:
        ArgumentError: An argument out of range, or a timeout without workers.
        RunError: The workers cannot start.

    Example:
        >>> sorted(run_items(lambda item, device: 10 * item, [1, 2]))
        [(1, 10), (2, 20)]
    """
    check_limits(backend, workers, threads, timeout, memory)
    function = partial(_at_precision, current_precision(), function)
    if backend == "inline":
        return _run_inline(function, items, threads, device)
    if backend == "processes":
        from sharpkit.workers.processes import run_in_processes

        devices = _devices(device, workers, threads)
        return run_in_processes(
            function, items, devices=devices, threads=threads, timeout=timeout, memory=memory
        )
    from sharpkit.workers.cluster import run_on_ray

    return run_on_ray(
        function,
        items,
        workers=workers,
        threads=threads,
        timeout=timeout,
        memory=memory,
        device=device,
        address=address,
    )


def default_backend(workers: int) -> Backend:
    """Where to work if the user did not say: one worker is this process, more are processes."""
    return "inline" if workers == 1 else "processes"


def check_limits(
    backend: str,
    workers: int | None,
    threads: int | None,
    timeout: float | None,
    memory: int | None,
) -> None:
    """Raise ArgumentError if one of these arguments of `run_items` is out of range."""
    if backend not in ("inline", "processes", "ray"):
        raise ArgumentError(f'backend must be "inline", "processes" or "ray", got {backend!r}')
    for name, number in (("workers", workers), ("threads", threads), ("memory", memory)):
        if number is not None and number < 1:
            raise ArgumentError(f"{name} must be at least 1, got {number}")
    if timeout is not None and not timeout > 0:
        raise ArgumentError(f"timeout must be a positive number of seconds, got {timeout}")
    if backend == "inline" and (timeout is not None or memory is not None):
        raise ArgumentError(
            'nothing can end an item of backend "inline": timeout and memory need "processes"'
        )


def attempt(function: Callable[[Item, str], Result], item: Item, device: str) -> Result | Failure:
    """The function's result, or what it raised."""
    try:
        return function(item, device)
    except Exception as error:  # whatever an item does, the others are computed
        return Failure(error_message(error))


def error_message(error: Exception) -> str:
    """One line about an error; its type too, unless it is one of sharpkit's."""
    text = " ".join(str(error).split())[:_LONGEST_MESSAGE]
    text = text.encode("utf-8", "backslashreplace").decode()  # any store and terminal takes it
    return text if isinstance(error, SharpkitError) else f"{type(error).__name__}: {text}"


def _at_precision(
    kind: Precision, function: Callable[[Item, str], Result], item: Item, device: str
) -> Result:
    """What a function gives that measures as the driver does, in whichever process."""
    with precision(kind):
        return function(item, device)


def _run_inline(
    function: Callable[[Item, str], Result], items: Iterable[Item], threads: int, device: str
) -> Generator[tuple[Item, Result | Failure]]:
    with limited_threads(threads):
        for item in items:
            yield item, attempt(function, item, device)


def _devices(device: str, workers: int | None, threads: int) -> list[str]:
    """The device of every worker."""
    if torch.device(device).type == "cpu":
        from joblib import cpu_count

        return [device] * (workers or max(1, cpu_count() // threads))
    names = [device]
    if device == "cuda":
        names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [names[i % len(names)] for i in range(workers or len(names))]
