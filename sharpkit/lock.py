"""One driver at a time in a run directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sharpkit.errors import RunError
from sharpkit.files import remove_leftovers

LOCK_NAME = ".lock"


@contextmanager
def sole_driver(run: Path | None) -> Iterator[None]:
    """Hold a run directory, created if needed; the system lets go when the process dies.

    What an earlier process left half written in it is removed.

    Args:
        run: The directory; None, for a run in memory, locks nothing.

    Raises:
        RunError: If another process writes to it, or it cannot be created or written.
    """
    if run is None:
        yield
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run / LOCK_NAME, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise RunError(
            f"{run}: another process is working on this run. Wait for it, or choose another "
            "directory"
        ) from error
    except OSError as error:
        raise RunError(f"{run}: cannot write to the run directory ({error.strerror})") from error
    try:
        remove_leftovers(run)
        yield
    finally:
        lock.release()
