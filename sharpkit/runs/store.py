"""The results of a run in one SQLite file, committed work item by work item.

Every row carries a checksum: what a failing disk or copy has changed is told, and computed again.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpkit.doors import reading
from sharpkit.errors import RunError
from sharpkit.measures.measure import Estimate, parse_setting
from sharpkit.run_directory import changes, refuse_another
from sharpkit.runs.store_file import open_to_read, open_to_write
from sharpkit.zoo.files import json_text
from sharpkit.zoo.shared_values import pack, unpack

if TYPE_CHECKING:
    import pandas as pd

Key = tuple[str, str, str]  # task, model, measure
TEST_METRICS = "test_metrics"  # stands for a measure whose values are columns of the metrics
_DAMAGED = "its stored values are damaged (wrong checksum); the same run computes them again"
# what an item's checksum covers of it
_KEY = ("task", "model", "measure")
_FACTS = (
    "seconds", "weights_hash", "data_hash", "settings_hash", "device", "dtype", "precision",
    "peak_memory",
)  # fmt: skip
_CHECKED = ", ".join((*_KEY, "error", *_FACTS))


@dataclass(frozen=True)
class Outcome:
    """What became of one work item, one measure on one model."""

    # setting -> value; empty if it failed
    values: Mapping[str, Estimate] = field(default_factory=dict)
    error: str | None = None  # what it failed with
    seconds: float | None = None  # wall time
    weights_hash: str | None = None  # SHA-256 over the model's files
    weights_stamp: str | None = None  # their sizes and times
    data_hash: str | None = None  # SHA-256 over the files of the data
    settings_hash: str | None = None  # SHA-256 of everything else that determines the values
    device: str | None = None  # name of the processor or GPU
    dtype: str | None = None  # of the weights
    precision: str | None = None  # of float32 arithmetic, "full" or "tf32"
    peak_memory: int | None = None  # bytes; of the GPU, or of the worker process
    environment: str | None = None  # versions and host, as JSON


class Store:
    """One run's results on disk, or in memory.

    The values of a work item are written in a single transaction, so a killed process leaves
    either all of them or none.

    Args:
        path: The SQLite file; None keeps everything in memory.
        config: What the run computes. Kept from the first result on; a store with another one is
            then refused. None opens an existing store to read only.

    Raises:
        RunError: If the file is not a store, belongs to another configuration or to other
            rules of measuring, or cannot be written.
    """

    def __init__(self, path: Path | None, config: Mapping[str, Any] | None = None) -> None:
        self.path, self.closed = path, False
        self._checked: tuple[tuple[int, int], set[Key]] | None = None
        with reading(path, RunError, "a sharpkit results store"):
            self._db = open_to_read(path) if config is None else open_to_write(path)
            if config is not None:
                self._agree_on(json.loads(json.dumps(config)))

    def close(self) -> None:
        """Close the file; nothing can be read any more."""
        self._db.close()
        self.closed = True

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the run."""
        return self._meta("config")

    @property
    def directions(self) -> dict[str, Any]:
        """What was noted by `set_directions`."""
        return self._meta("directions")

    # --- writing -----------------------------------------------------------------------------

    def add_task(self, task: str, model_configs: Mapping[str, Any]) -> None:
        """Keep a task's hyperparameters and metrics, so that the run can be evaluated alone."""
        entries, lists = pack(model_configs.values())
        text = json_text([lists, dict(zip(model_configs, entries, strict=True))])
        with self._transaction() as db:
            db.execute(
                "INSERT INTO tasks (task, model_configs, checksum) VALUES (?, ?, ?) "
                "ON CONFLICT (task) DO UPDATE SET model_configs = excluded.model_configs, "
                "checksum = excluded.checksum",
                (task, text, _checksum(task, text)),
            )

    def set_data(self, task: str, hash_: str, stamp: str) -> None:
        """Keep the hash of a task's data files, with their sizes and times."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO tasks (task, model_configs, checksum, data_hash, data_stamp) "
                "VALUES (?, '{}', ?, ?, ?) ON CONFLICT (task) DO UPDATE SET "
                "data_hash = excluded.data_hash, data_stamp = excluded.data_stamp",
                (task, _checksum(task, "{}"), hash_, stamp),
            )

    def add(self, task: str, model: str, measure: str, outcome: Outcome) -> None:
        """Write one work item: its values, or the error that it failed with."""
        self.add_all({(task, model, measure): outcome})

    def add_all(self, outcomes: Mapping[Key, Outcome]) -> None:
        """Write several work items, all of them or none."""
        with self._transaction() as db:
            for key, outcome in outcomes.items():
                _insert(db, key, outcome)

    def set_directions(self, directions: Mapping[str, Any]) -> None:
        """Note what large values of the measures should mean: measure -> 1, -1, None or by form."""
        with self._transaction() as db:
            self._note(db, "directions", self.directions | dict(directions))

    def restamp(self, stamps: Mapping[Key, str]) -> None:
        """Note that the files of work items have other times, but the same contents."""
        with self._transaction() as db:
            db.executemany(
                "UPDATE items SET weights_stamp = ? WHERE task = ? AND model = ? AND measure = ?",
                [(stamp, *key) for key, stamp in stamps.items()],
            )

    # --- reading -----------------------------------------------------------------------------

    def model_configs(self) -> dict[str, dict[str, Any]]:
        """Task name -> its parsed model_configs.json; without tasks whose row is damaged."""
        found = {}
        for task, text, checksum in self._rows(
            "SELECT task, model_configs, checksum FROM tasks ORDER BY rowid"
        ):
            if checksum not in (None, _checksum(task, text)):
                warnings.warn(
                    f"{self.path}: the hyperparameters of a task, {task!r}, are damaged (wrong "
                    "checksum). The run that scored it, started again, writes them anew",
                    stacklevel=2,
                )
                continue
            with reading(f"{self.path}, task {task!r}", RunError, "JSON"):
                content = json.loads(text)  # a mapping, if of an earlier version
                lists, entries = content if isinstance(content, list) else ([], content)
                found[task] = {id_: unpack(entry, lists) for id_, entry in entries.items()}
        return found

    def data(self, task: str) -> tuple[str | None, str | None]:
        """Hash and stamp of a task's data files, as far as known."""
        rows = self._rows("SELECT data_hash, data_stamp FROM tasks WHERE task = ?", task)
        return rows[0] if rows else (None, None)

    def done(self) -> Iterator[tuple[Key, str | None, str | None, str | None]]:
        """What succeeded: its key, and the hash, stamp and data hash that it was computed from."""
        for task, model, measure, *known in self._intact_rows(
            "SELECT task, model, measure, weights_hash, weights_stamp, data_hash FROM items "
            "WHERE error IS NULL"
        ):
            yield (task, model, measure), *known

    def results(self) -> pd.DataFrame:
        """One row per value: task, model, measure, the setting's columns, value, std_error."""
        import pandas as pd

        rows = self._intact_rows(
            "SELECT task, model, measure, setting, value, std_error FROM results "
            # the order of completion must not show in the columns,
            "WHERE measure != ? ORDER BY measure, setting",
            TEST_METRICS,
        )
        with reading(f"{self.path}, settings", RunError, "name=value pairs"):
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
        ).astype({"value": float, "std_error": float})  # SQLite keeps NaN as NULL
        # nor in the rows
        by = frame.assign(model=frame["model"].map(_numeric_last))
        order = by.sort_values(["task", "measure", "model", *columns], kind="stable").index
        return frame.loc[order].reset_index(drop=True)

    def test_metrics(self) -> dict[tuple[str, str], dict[str, float]]:
        """(task, model) -> what was computed on the test data, column -> value."""
        found: dict[tuple[str, str], dict[str, float]] = {}
        for task, model, _, column, value in self._intact_rows(
            "SELECT task, model, measure, setting, value FROM results WHERE measure = ? "
            "ORDER BY rowid",
            TEST_METRICS,
        ):
            found.setdefault((task, model), {})[column] = value
        return found

    def failures(self) -> pd.DataFrame:
        """One row per failed work item: task, model, measure, error."""
        import pandas as pd

        damaged = self._damaged()
        rows = [
            (*key, _DAMAGED if tuple(key) in damaged else error)
            for *key, error in self._rows(
                "SELECT task, model, measure, error FROM items ORDER BY task, model, measure"
            )
            if error is not None or tuple(key) in damaged
        ]
        return pd.DataFrame(rows, columns=["task", "model", "measure", "error"])

    def provenance(self) -> pd.DataFrame:
        """One row per work item: where its values come from."""
        import pandas as pd

        environments = {id_: _environment(text) for id_, text in self._environments().items()}
        columns = [*_KEY, *_FACTS]
        rows = self._rows(f"SELECT {', '.join(columns)}, environment FROM items")
        return pd.DataFrame(
            [dict(zip(columns, row, strict=False)) | environments.get(row[-1], {}) for row in rows],
            columns=[*columns, "sharpkit", "torch", "numpy", "python", "platform", "host"],
        )

    def _damaged(self) -> set[Key]:
        """The work items whose rows, or whose values, are not as they were written."""
        ((elsewhere,),) = self._rows("PRAGMA data_version")  # changes with others' writes
        state = elsewhere, self._db.total_changes
        if self._checked is None or self._checked[0] != state:
            self._checked = state, self._found_damaged()
        return self._checked[1]

    def _found_damaged(self) -> set[Key]:
        values: dict[Key, list[tuple[Any, ...]]] = {}
        for task, model, measure, *row in self._rows(
            "SELECT task, model, measure, setting, value, std_error FROM results ORDER BY rowid"
        ):
            values.setdefault((task, model, measure), []).append(tuple(row))
        environments = self._environments()
        damaged = set(values)
        for *checked, environment, checksum in self._rows(
            f"SELECT {_CHECKED}, environment, checksum FROM items"
        ):
            key: Key = (checked[0], checked[1], checked[2])
            found = _item_checksum(checked, values.get(key, ()), environments.get(environment))
            if checksum in (None, found):  # None in rows of earlier versions
                damaged.discard(key)
            else:
                damaged.add(key)
        return damaged

    def _intact_rows(self, query: str, *arguments: Any) -> list[Any]:
        """Rows that begin with task, model and measure, without those of damaged work items."""
        damaged = self._damaged()
        return [row for row in self._rows(query, *arguments) if row[:3] not in damaged]

    def _environments(self) -> dict[int, str]:
        return dict(self._rows("SELECT id, content FROM environments"))

    def _rows(self, query: str, *arguments: Any) -> list[Any]:
        """All rows of a query; RunError if the file cannot give them."""
        with reading(self.path, RunError, "a results store that is not damaged"):
            return self._db.execute(query, arguments).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the block is written, or nothing."""
        try:
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
        except (sqlite3.DatabaseError, UnicodeEncodeError) as error:
            raise RunError(
                f"{self.path}: cannot be written ({error}). What was finished before is safe: "
                "start again when the cause is gone"
            ) from error

    def _meta(self, key: str) -> dict[str, Any]:
        for value, checksum in self._rows("SELECT value, checksum FROM meta WHERE key = ?", key):
            if checksum not in (None, _checksum(key, value)):
                raise RunError(f"{self.path}: the stored {key} is damaged (wrong checksum)")
            with reading(f"{self.path}, {key}", RunError, "JSON"):
                content: dict[str, Any] = json.loads(value)
                return content
        return {}

    def _note(self, db: sqlite3.Connection, key: str, content: Any) -> None:
        text = json.dumps(content)
        db.execute(
            "INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", (key, text, _checksum(key, text))
        )

    def _agree_on(self, config: dict[str, Any]) -> None:
        with self._transaction() as db:
            there = self.config
            if self._has_results():
                refuse_another(there, config, self.path)
            elif changes(there, config):  # all that there is are failures of what was given up
                db.execute("DELETE FROM items")
                db.execute("DELETE FROM tasks")
            self._note(db, "config", config)

    def _has_results(self) -> bool:
        row = self._db.execute("SELECT 1 FROM items WHERE error IS NULL LIMIT 1").fetchone()
        return row is not None


def _insert(db: sqlite3.Connection, key: Key, outcome: Outcome) -> None:
    """Write one work item in a transaction."""
    if outcome.environment is not None:
        db.execute(
            "INSERT OR IGNORE INTO environments (content) VALUES (?)", (outcome.environment,)
        )
    db.execute("DELETE FROM results WHERE task = ? AND model = ? AND measure = ?", key)
    values = [
        (setting, float(v.value), float(v.std_error)) for setting, v in outcome.values.items()
    ]
    db.executemany(
        "INSERT INTO results VALUES (?, ?, ?, ?, ?, ?)", [(*key, *row) for row in values]
    )
    checked = (*key, outcome.error, *(getattr(outcome, fact) for fact in _FACTS))
    checksum = _item_checksum(checked, values, outcome.environment)
    db.execute(
        f"INSERT OR REPLACE INTO items ({_CHECKED}, weights_stamp, environment, checksum) "
        f"VALUES ({'?, ' * len(checked)}?, (SELECT id FROM environments WHERE content = ?), ?)",
        (*checked, outcome.weights_stamp, outcome.environment, checksum),
    )


def _environment(text: str) -> dict[str, Any]:
    """Versions and host; none if they are damaged, of which the items' checksums tell."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _item_checksum(
    checked: Sequence[Any], values: Sequence[tuple[Any, ...]], environment: str | None
) -> str:
    """Of a work item with its values in the order of writing."""
    return _checksum(*checked, *values, environment)


def _checksum(*content: Any) -> str:
    """16 hexadecimal digits; numbers enter with all their digits, and NaN as SQLite keeps it."""
    text = repr(content).replace("nan", "None").encode("utf-8", "backslashreplace")
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def _numeric_last(model: str) -> tuple[int, int, str]:
    is_number = model.isascii() and model.isdigit()
    return (0, int(model), "") if is_number else (1, 0, model)
