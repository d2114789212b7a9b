"""Where downloads are kept, and writing files such that no reader or crash sees half of one."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from sharpkit.errors import RunError
from sharpkit.safe_text import cell

if TYPE_CHECKING:
    import pandas as pd

MAX_BYTES = 2**33  # of one file that is read at once
_TEMPORARY = re.compile(r"\..+\.(\d+)-[0-9a-f]{32}\.tmp", re.DOTALL)
_UNPACKING = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)-[0-9a-f]{32}\.unpacking", re.DOTALL)


def cache_folder() -> Path:
    """Where downloads are kept: `SHARPKIT_CACHE`, if set, else the platform's folder."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("SHARPKIT_CACHE") or user_cache_dir("sharpkit"))


@contextmanager
def open_regular(path: Path, max_bytes: int = MAX_BYTES) -> Iterator[BufferedReader]:
    """An ordinary file, opened to read its bytes; nothing that could block or never end.

    Raises:
        OSError: It cannot be opened, is a pipe, a device or the like, or is larger.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if status.st_size > max_bytes:
            reason = f"it has {status.st_size:,} bytes; at most {max_bytes:,} are read"
            raise OSError(errno.EFBIG, reason, str(path))
        yield file


def read_regular(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of an ordinary file; see `open_regular`."""
    with open_regular(path, max_bytes) as file:
        return file.read()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error.

    The content reaches the disk before the name does, and the name before this returns, so a power
    cut leaves the old file or the new one, and what was written first is there if what was written
    later is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(temporary):
            # whoever reads the message knows only the name that was asked for
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, to be renamed to it when it is full, else removed at the end.

    What killed processes have left of such folders there is removed first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    owner = f"{_machine()}-{os.getpid()}-{uuid.uuid4().hex}"
    temporary = target.with_name(f".{target.name}.{owner}.unpacking")
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(*folders: Path) -> None:
    """Remove what processes that are no more have left of `atomic_path` and `temporary_folder`."""
    for folder in folders:
        for path in folder.glob(".*.unpacking"):
            match = _UNPACKING.fullmatch(path.name)
            if match and match[1] == _machine() and not _runs(int(match[2])):
                shutil.rmtree(path, ignore_errors=True)
        for path in folder.glob(".*.tmp"):
            match = _TEMPORARY.fullmatch(path.name)
            if match and not _runs(int(match[1])):
                with suppress(OSError):
                    path.unlink()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A RunError that names the path where the block cannot write, as on a full disk."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror or error}). What was saved before is "
            "intact: free space or permissions, then run the same again to go on"
        ) from error


def write_csv(table: pd.DataFrame, path: Path, *, digits: str | None = None) -> None:
    """Write a table without its index as CSV in one step, its text made safe for spreadsheets.

    `digits` is the format of numbers, such as "%.6g"; None for all digits.

    Example:
        >>> import pandas as pd, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "scores.csv")
        ...     write_csv(pd.DataFrame({"task": ["=1+1"], "value": [-0.5]}), path)
        ...     print(path.read_text())
        task,value
        '=1+1,-0.5
    """
    with atomic_path(path) as temporary:
        _safe_cells(table).to_csv(temporary, index=False, float_format=digits)


def _safe_cells(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose text, column names included, no spreadsheet takes for a formula."""
    import pandas as pd

    safe, safely = table.copy(deep=False), cache(cell)  # most texts stand in many rows
    for name in table.columns:
        if table[name].dtype == object or isinstance(table[name].dtype, pd.StringDtype):
            values = [safely(v) if isinstance(v, str) else v for v in table[name]]
            safe[name] = pd.Series(values, index=table.index, dtype=object)
    names = [cell(name) if isinstance(name, str) else name for name in table.columns]
    return safe.set_axis(names, axis=1)


def _machine() -> str:
    """A short name of this machine: a folder on a network disk may belong to another's process."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _runs(process: int) -> bool:
    """Whether there is such a process; where that cannot be told, there may be."""
    if os.name == "nt":  # where signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _without_waiting(path: str, flags: int) -> int:
    """Open a pipe although nobody writes to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    with suppress(OSError):  # Windows, and some network disks, have no such thing
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
