"""A run directory: one driver at a time, and one configuration, which a later start must repeat."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sharpkit.contract.measuring_rules import refuse_other_rules
from sharpkit.doors import MAX_CONFIG_BYTES, parse_json, reading, shown
from sharpkit.errors import RunError
from sharpkit.files import atomic_path, read_regular, remove_leftovers

LOCK_NAME = ".lock"
_MAX_SHOWN = 500  # characters of a setting in an error


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


def claim(path: Path, config: Mapping[str, Any]) -> None:
    """Note in a JSON file what a directory is for; RunError if it is for something else."""
    config = json.loads(json.dumps(config))
    if path.exists():
        refuse_another(read_claim(path), config, path)
    else:
        write_claim(path, config)


def read_claim(path: Path) -> dict[str, Any]:
    """What a run has noted of its configuration; RunError if it cannot be read, or is no object."""
    where = f"{path} is damaged; delete it, or choose another directory"
    with reading(where, RunError, "a JSON file"):
        content = parse_json(where, read_regular(path, MAX_CONFIG_BYTES), RunError)
    if not isinstance(content, dict):
        raise RunError(f"{where}: found {shown(content)}, expected an object")
    return content


def write_claim(path: Path, config: Mapping[str, Any]) -> None:
    """Note a configuration in a JSON file, in one step."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n")


def refuse_another(there: Mapping[str, Any], now: Mapping[str, Any], where: object) -> None:
    """Raise RunError, with what differs, if a run was started with another configuration.

    Of configurations that note the rules of measuring, other rules are told first.

    Example:
        >>> refuse_another({"lr": 0.1, "seed": 0}, {"lr": 0.2, "seed": 0}, "runs/mine")
        Traceback (most recent call last):
        sharpkit.errors.RunError: runs/mine: was started with another configuration (lr: 0.1 \
there, 0.2 now). Give it the same one, or another directory
    """
    if "rules" in now:
        refuse_other_rules(there, str(where))
    if changed := changes(there, now):
        raise RunError(
            f"{where}: was started with another configuration ({changed}). Give it the same one, "
            "or another directory"
        )


def changes(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which settings differ; "" if none does.

    Example:
        >>> changes({"training": {"lr": 0.1, "seed": 0}}, {"training": {"lr": 0.2, "seed": 0}})
        'training: lr: 0.1 there, 0.2 now'
    """
    return "; ".join(
        f"{shown(key)[1:-1]}: {_change(there.get(key), now.get(key))}"
        for key in dict.fromkeys([*there, *now])
        if there.get(key) != now.get(key)
    )


def _change(there: Any, now: Any) -> str:
    inner = isinstance(there, Mapping) and isinstance(now, Mapping) and changes(there, now)
    return inner or f"{_brief(there)} there, {_brief(now)} now"


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
