"""The SQLite file of a store: its tables, and opening it, also after a killed process."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from sharpkit.digests import stamp
from sharpkit.errors import RunError

VERSION = 5

# version -> the statements that lead to it from the one before; a release adds, and never edits
_STEPS = {
    2: """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE tasks (
    task TEXT PRIMARY KEY, model_configs TEXT NOT NULL, data_hash TEXT, data_stamp TEXT
);
CREATE TABLE items (
    task TEXT, model TEXT, measure TEXT, error TEXT, seconds REAL,
    weights_hash TEXT, weights_stamp TEXT, data_hash TEXT, settings_hash TEXT, device TEXT,
    dtype TEXT, peak_memory INTEGER, environment INTEGER,
    PRIMARY KEY (task, model, measure)
);
CREATE TABLE results (
    task TEXT, model TEXT, measure TEXT, setting TEXT, value REAL NOT NULL, std_error REAL,
    PRIMARY KEY (task, model, measure, setting)
);
CREATE TABLE environments (id INTEGER PRIMARY KEY, content TEXT UNIQUE NOT NULL);
""",
    3: "ALTER TABLE items ADD COLUMN precision TEXT;",
    4: """
ALTER TABLE meta ADD COLUMN checksum TEXT;
ALTER TABLE tasks ADD COLUMN checksum TEXT;
ALTER TABLE items ADD COLUMN checksum TEXT;
""",
    5: "-- possible values stand once in model_configs of new tasks",
}


def open_to_write(path: Path | None) -> sqlite3.Connection:
    """A store of today's version, created if needed; None for one in memory."""
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
        if _tables(db) and _version(db, path) == VERSION:
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


def prepare(db: sqlite3.Connection, path: Path | None) -> None:
    """Create the tables of an empty database, or bring an older store up to date, all or nothing.

    Raises:
        RunError: If the database is something else, or of a later version.
    """
    with db:
        db.execute("BEGIN IMMEDIATE")
        tables = _tables(db)
        if tables and "meta" not in tables:
            raise RunError(f"{path}: a database of something else, with {min(tables)}")
        found = _version(db, path) if tables else min(_STEPS) - 1
        for number in range(found + 1, VERSION + 1):
            for statement in filter(str.strip, _STEPS[number].split(";")):
                db.execute(statement)
        if found < VERSION:
            db.execute(
                "INSERT OR REPLACE INTO meta (key, value) VALUES ('version', ?)",
                (json.dumps(VERSION),),
            )


def _version(db: sqlite3.Connection, path: Path | None) -> int:
    """The version of a store; RunError if it is none that this code knows."""
    row = db.execute("SELECT value FROM meta WHERE key = 'version'").fetchone()
    found = str(row[0]) if row else ""
    if found not in map(str, _STEPS):
        raise RunError(
            f"{path}: store version {found}; this version of sharpkit knows {min(_STEPS)} to "
            f"{VERSION}"
        )
    return int(found)


def _tables(db: sqlite3.Connection) -> set[str]:
    """Their names; none if the process that created the file was killed before it wrote."""
    return {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
