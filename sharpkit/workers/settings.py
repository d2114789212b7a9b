"""How many work items are computed at a time, where, and how much each may take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from sharpkit.errors import ArgumentError

Backend = Literal["inline", "processes", "ray"]


@dataclass(frozen=True)
class Workers:
    """Who computes the models, trainings or spectra of a run; only `threads` may change a bit.

    Every function with an argument `workers` takes one of these, or a number n for `Workers(n)`.

    Args:
        count: Items at a time; None for one in this process or, of a backend with workers, one per
            GPU or per `threads` cores.
        backend: "inline", in this process, one item at a time; "processes", in worker processes of
            this machine (a script that asks for them needs `if __name__ == "__main__":`); "ray", on
            a Ray cluster. None for "processes" if `count` is more than one, else "inline".
        threads: CPU threads of one item; None for what the run says, mostly 1.
        timeout: Seconds that one item may take; needs a backend that can end it.
        memory: Bytes that one item may allocate on its device; None for an equal share of what is
            free ("processes" on a CPU) or no limit. sharpkit's own measures cut their data into
            chunks that fit half of it; where that binds, the last digits may follow from it.
        address: Of a Ray cluster, such as "auto"; None for one that is started on this machine.

    Raises:
        ArgumentError: An argument out of range, or one that the backend cannot heed.

    Example:
        >>> Workers(4).place, Workers().place, Workers(1, backend="processes", timeout=60.0).place
        ('processes', 'inline', 'processes')
    """

    count: int | None = None
    backend: Backend | None = None
    threads: int | None = None
    timeout: float | None = None
    memory: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.backend not in (None, *get_args(Backend)):
            raise ArgumentError(
                f'backend must be "inline", "processes" or "ray", got {self.backend!r}'
            )
        numbers = {"workers": self.count, "threads": self.threads, "memory": self.memory}
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise ArgumentError(f"{name} must be at least 1, got {number}")
        if self.timeout is not None and not self.timeout > 0:
            raise ArgumentError(f"timeout must be a positive number of seconds, got {self.timeout}")
        if self.place == "inline" and (self.count or 1) > 1:
            raise ArgumentError(
                f'workers = {self.count}, but backend "inline" has only this process: leave out '
                'backend, or give "processes" or "ray"'
            )
        if self.place == "inline" and (self.timeout is not None or self.memory is not None):
            raise ArgumentError(
                'nothing can end an item of backend "inline": timeout and memory need "processes"'
            )
        if self.place != "ray" and self.address is not None:
            raise ArgumentError(
                f"address = {self.address!r} is of a Ray cluster, but the backend is "
                f'"{self.place}": leave out address, or give backend "ray"'
            )

    @property
    def place(self) -> Backend:
        """The backend, also where none was named."""
        return self.backend or ("inline" if self.count in (None, 1) else "processes")


def as_workers(workers: int | Workers) -> Workers:
    """The argument `workers` of a function: a number stands for so many workers.

    Example:
        >>> as_workers(4)
        Workers(count=4, backend=None, threads=None, timeout=None, memory=None, address=None)
    """
    if isinstance(workers, Workers):
        return workers
    if not isinstance(workers, int):
        raise ArgumentError(f"workers is {workers!r}: expected a number or sharpkit.Workers(...)")
    return Workers(workers)


def on_one_thread(workers: int | Workers) -> Workers:
    """Workers for what has the same bits only on one thread, such as trainings.

    Raises:
        ArgumentError: If they ask for more threads.
    """
    given = as_workers(workers)
    if (given.threads or 1) > 1:
        raise ArgumentError(
            f"threads = {given.threads}, but a training uses one, so that its bits depend on "
            "nothing else: leave threads out, and give more workers"
        )
    return replace(given, threads=1)
