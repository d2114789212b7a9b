"""Many independent work items: in this process, in worker processes, or on a Ray cluster.

The process that calls `run_items` is the only one that sees results, so it alone need write them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any

from sharpkit.contract.precision import Precision, current_precision, precision
from sharpkit.workers.cluster import run_on_ray
from sharpkit.workers.outcome import Failure, Item, Result, attempt
from sharpkit.workers.processes import run_in_processes
from sharpkit.workers.settings import Workers, as_workers
from sharpkit.workers.threads import limited_threads


def run_items(
    function: Callable[[Item, str], Result],
    items: Iterable[Item],
    workers: int | Workers = 1,
    *,
    device: str = "cpu",
) -> Generator[tuple[Item, Result | Failure]]:
    """The results of a function on items, in the order in which they are finished.

    An item that raises is a `Failure`; the others go on. In "processes" and "ray", so is one that
    takes too long or too much memory, and one whose worker died twice: a crash is tried once more.
    Every item is computed with the same number of threads and at the `precision` of the caller,
    hence the same bits, in any backend and with any number of workers.

    Args:
        function: Called with an item and the device to use. Workers get a pickled copy, once.
        items: Read only as fast as they are worked on.
        workers: Who computes them.
        device: Such as "cpu"; "cuda" spreads the workers over all GPUs.

    Yields:
        tuple: An item, and its result or `Failure`.

    Raises:
        RunError: The workers cannot start.

    Example:
        >>> sorted(run_items(lambda item, device: 10 * item, [1, 2]))
        [(1, 10), (2, 20)]
    """
    given = as_workers(workers)
    run = {"inline": _run_inline, "processes": run_in_processes, "ray": run_on_ray}[given.place]
    return run(partial(_at_precision, current_precision(), function), items, given, device)


def _at_precision(
    kind: Precision, function: Callable[[Item, str], Result], item: Item, device: str
) -> Result:
    """What a function gives that measures as the driver does, in whichever process."""
    with precision(kind):
        return function(item, device)


def _run_inline(
    function: Callable[[Any, str], Any], items: Iterable[Any], workers: Workers, device: str
) -> Generator[tuple[Any, Any]]:
    """`run_items` in this process."""
    with limited_threads(workers.threads or 1):
        for item in items:
            yield item, attempt(function, item, device)
