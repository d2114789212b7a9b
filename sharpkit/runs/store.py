"""The results of a run in one SQLite file, committed work item by work item."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpkit.errors import RunError
from sharpkit.measures.measure import Estimate, parse_setting

if TYPE_CHECKING:
    import pandas as pd

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE tasks (task TEXT PRIMARY KEY, model_configs TEXT NOT NULL);
CREATE TABLE items (
    task TEXT, model TEXT, measure TEXT, error TEXT, seconds REAL,
    PRIMARY KEY (task, model, measure)
);
CREATE TABLE results (
    task TEXT, model TEXT, measure TEXT, setting TEXT, value REAL NOT NULL, std_error REAL,
    PRIMARY KEY (task, model, measure, setting)
);
"""
_VERSION = 1


class Store:
    """One run's results on disk, or in memory.

    A work item is one measure on one model; its values are written in a single transaction, so a
    killed process leaves either all of them or none.

    Args:
        path: The SQLite file; None keeps everything in memory.
        config: What the run computes. Written once; a store with another one is refused. None
            opens an existing store to read only.

    Raises:
        RunError: If the file is not a store, or belongs to another configuration.
    """

    def __init__(self, path: Path | None, config: Mapping[str, Any] | None = None) -> None:
        self.path = path
        try:
            if config is None:
                self._db = _open_to_read(path)
            else:
                # a second process that opens the same run waits for the first
                self._db = sqlite3.connect(
                    path if path else ":memory:", isolation_level=None, timeout=60
                )
                self._create()
            version = self._meta("version")
        except sqlite3.DatabaseError as error:
            raise RunError(
                f"{path}: not a sharpkit results store, or it cannot be opened ({error})"
            ) from error
        if version != _VERSION:
            raise RunError(f"{path}: store version {version}, expected {_VERSION}")
        if config is not None:
            self._agree_on(json.loads(json.dumps(config)))

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the run."""
        value: dict[str, Any] = self._meta("config") or {}
        return value

    def add_task(self, task: str, model_configs: Mapping[str, Any]) -> None:
        """Keep a task's hyperparameters and metrics, so that the run can be evaluated alone."""
        self._db.execute(
            "INSERT INTO tasks VALUES (?, ?) ON CONFLICT (task) "
            "DO UPDATE SET model_configs = excluded.model_configs",
            (task, json.dumps(model_configs)),
        )

    def model_configs(self) -> dict[str, dict[str, Any]]:
        """Task name -> its parsed model_configs.json."""
        rows = self._db.execute("SELECT task, model_configs FROM tasks ORDER BY rowid")
        return {task: json.loads(text) for task, text in rows}

    def done(self) -> set[tuple[str, str, str]]:
        """The (task, model, measure) that succeeded."""
        rows = self._db.execute("SELECT task, model, measure FROM items WHERE error IS NULL")
        return set(rows)

    def add(
        self,
        task: str,
        model: str,
        measure: str,
        values: Mapping[str, Estimate],
        seconds: float,
        error: str | None = None,
    ) -> None:
        """Write one work item: its values, or the error that it failed with."""
        item = (task, model, measure)
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute(
                "DELETE FROM results WHERE task = ? AND model = ? AND measure = ?", item
            )
            self._db.executemany(
                "INSERT INTO results VALUES (?, ?, ?, ?, ?, ?)",
                [(*item, setting, v.value, v.std_error) for setting, v in values.items()],
            )
            self._db.execute(
                "INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?)", (*item, error, seconds)
            )

    def results(self) -> pd.DataFrame:
        """One row per value: task, model, measure, the setting's columns, value, std_error."""
        import pandas as pd

        rows = self._db.execute(
            "SELECT task, model, measure, setting, value, std_error FROM results"
        ).fetchall()
        settings = {row[3]: parse_setting(row[3]) for row in rows}
        columns = dict.fromkeys(key for columns in settings.values() for key in columns)
        frame = pd.DataFrame(
            [
                {
                    "task": task,
                    "model": model,
                    "measure": measure,
                    **{key: settings[setting].get(key) for key in columns},
                    "value": value,
                    "std_error": std_error,
                }
                for task, model, measure, setting, value, std_error in rows
            ],
            columns=["task", "model", "measure", *columns, "value", "std_error"],
        )
        # the order of completion must not show
        by = frame.assign(model=frame["model"].map(_numeric_last))
        order = by.sort_values(["task", "measure", "model", *columns], kind="stable").index
        return frame.loc[order].reset_index(drop=True)

    def failures(self) -> pd.DataFrame:
        """One row per failed work item: task, model, measure, error."""
        import pandas as pd

        rows = self._db.execute(
            "SELECT task, model, measure, error FROM items WHERE error IS NOT NULL "
            "ORDER BY task, model, measure"
        ).fetchall()
        return pd.DataFrame(rows, columns=["task", "model", "measure", "error"])

    def seconds(self) -> float:
        """Time spent on all items."""
        total = self._db.execute("SELECT TOTAL(seconds) FROM items").fetchone()[0]
        return float(total)

    def _create(self) -> None:
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master")}
            if "meta" in tables:
                return
            if tables:
                raise RunError(f"{self.path}: a database of something else, with {min(tables)}")
            for statement in filter(str.strip, _SCHEMA.split(";")):
                self._db.execute(statement)
            self._db.execute("INSERT INTO meta VALUES ('version', ?)", (json.dumps(_VERSION),))
        self._db.execute("PRAGMA journal_mode=WAL")

    def _meta(self, key: str) -> Any:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def _agree_on(self, config: dict[str, Any]) -> None:
        self._db.execute("INSERT OR IGNORE INTO meta VALUES ('config', ?)", (json.dumps(config),))
        stored = self._meta("config")
        if stored != config:
            changes = [
                f"{key}: {json.dumps(stored.get(key))} there, {json.dumps(config.get(key))} now"
                for key in sorted({*stored, *config})
                if stored.get(key) != config.get(key)
            ]
            raise RunError(
                f"{self.path}: the run was started with another configuration "
                f"({'; '.join(changes)}). Give it the same one, or another directory"
            )


def _open_to_read(path: Path | None) -> sqlite3.Connection:
    """A connection that cannot write; also for a store in a directory that cannot be written."""
    if path is None:
        raise RunError("a store in memory needs a configuration")
    for mode in ("mode=ro", "mode=ro&immutable=1"):
        db = sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True, timeout=60)
        try:
            db.execute("SELECT 1 FROM sqlite_master").fetchone()
            return db
        except sqlite3.OperationalError as error:
            db.close()
            reason = error
    raise reason


def _numeric_last(model: str) -> tuple[int, int, str]:
    return (0, int(model), "") if model.isdigit() else (1, 0, model)
