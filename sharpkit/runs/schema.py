"""The tables of a results store, and how older stores become like today's."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from sharpkit.errors import RunError

VERSION = 4

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
}


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
        found = version(db, path) if tables else min(_STEPS) - 1
        for number in range(found + 1, VERSION + 1):
            for statement in filter(str.strip, _STEPS[number].split(";")):
                db.execute(statement)
        if found < VERSION:
            db.execute(
                "INSERT OR REPLACE INTO meta (key, value) VALUES ('version', ?)",
                (json.dumps(VERSION),),
            )


def is_empty(db: sqlite3.Connection) -> bool:
    """Whether nothing was ever written, as when the process that created the file was killed."""
    return not _tables(db)


def version(db: sqlite3.Connection, path: Path | None) -> int:
    """The version of a store.

    Raises:
        RunError: If it is none that this code knows.
    """
    row = db.execute("SELECT value FROM meta WHERE key = 'version'").fetchone()
    found = str(row[0]) if row else ""
    if found not in map(str, _STEPS):
        raise RunError(
            f"{path}: store version {found}; this version of sharpkit knows {min(_STEPS)} to "
            f"{VERSION}"
        )
    return int(found)


def _tables(db: sqlite3.Connection) -> set[str]:
    return {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
