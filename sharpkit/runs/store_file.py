"""The SQLite file of a store: opened to write, or to read whatever a killed process has left."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from sharpkit.digests import stamp
from sharpkit.errors import RunError
from sharpkit.runs.schema import VERSION, is_empty, prepare, version


def open_to_write(path: Path | None) -> sqlite3.Connection:
    """A connection to a store of today's version, created if needed; None for one in memory.

    Raises:
        RunError: If nothing can be written there.
    """
    try:
        # a second process that opens the same run waits for the first
        db = sqlite3.connect(path if path else ":memory:", isolation_level=None, timeout=60)
        prepare(db, path)
        db.execute("PRAGMA journal_mode=WAL")
    except sqlite3.OperationalError as error:
        raise RunError(
            f"{path}: cannot be written ({error}): free space or permissions, then start again"
        ) from error
    return db


def open_to_read(path: Path | None) -> sqlite3.Connection:
    """A connection that cannot write; also for a store in a directory that cannot be written."""
    if path is None:
        raise RunError("a store in memory needs a configuration")
    uri = path.resolve().as_uri()
    try:
        return _current(sqlite3.connect(f"{uri}?mode=ro", uri=True, timeout=60), path)
    except sqlite3.OperationalError:
        if _logs(path):  # which only a writer can apply, and without them results are missing
            return _current(_recovered(path), path)
        return _current(sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True, timeout=60), path)


def _current(db: sqlite3.Connection, path: Path) -> sqlite3.Connection:
    """The store as it is, or brought up to date in memory if it is older or was never filled."""
    try:
        if not is_empty(db) and version(db, path) == VERSION:
            return db
        copy = sqlite3.connect(":memory:", isolation_level=None)
        db.backup(copy)
    except BaseException:
        db.close()
        raise
    db.close()
    prepare(copy, path)
    return copy


def _logs(path: Path) -> list[Path]:
    """What a killed process has written beside a store and not yet into it."""
    beside = [path.with_name(f"{path.name}-{end}") for end in ("wal", "journal")]
    return [log for log in beside if log.is_file() and log.stat().st_size]


def _recovered(path: Path) -> sqlite3.Connection:
    """A copy in memory of a store where nothing can be written, what its logs hold included."""
    parts = [path, *_logs(path)]
    try:
        with tempfile.TemporaryDirectory(prefix="sharpkit-") as folder:
            before = stamp(parts)
            for part in parts:
                shutil.copyfile(part, Path(folder, part.name))
            if stamp(parts) != before:
                raise RunError(
                    f"{path}: a process writes to it while this one can only read it. Read it "
                    "where it is written, or when that process has ended"
                )
            with closing(sqlite3.connect(Path(folder, path.name))) as db:
                copy = sqlite3.connect(":memory:", isolation_level=None)
                db.backup(copy)
    except OSError as error:
        raise RunError(
            f"{path}: has a log of a killed process, and cannot be copied to apply it "
            f"({error.strerror or error}). Copy {', '.join(p.name for p in parts)} to a place that "
            "can be written, and read the copy"
        ) from error
    return copy
