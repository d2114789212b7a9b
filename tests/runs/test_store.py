"""The store of a run: old versions, changed files, and a system that lets it down."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from contextlib import closing

import pandas as pd
import pytest
import torch
from zoos import write_small_zoo

import sharpkit as sk
from sharpkit.errors import ArgumentError, RunError
from sharpkit.measures.measure import Estimate
from sharpkit.runs.store import Outcome, Store
from sharpkit.runs.store_file import VERSION
from sharpkit.zoo.grid import model_configs

MEASURE = sk.MSharpness(m=[1, 4], rho=0.1)

# what earlier versions wrote, without precision and checksums
VERSION_2 = """
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
CREATE TABLE environments (id INTEGER PRIMARY KEY, content TEXT UNIQUE NOT NULL);
CREATE TABLE results (
    task TEXT, model TEXT, measure TEXT, setting TEXT, value REAL NOT NULL, std_error REAL,
    PRIMARY KEY (task, model, measure, setting)
);
"""


@pytest.fixture
def task(tmp_path):
    return sk.load_zoo(write_small_zoo(tmp_path / "zoo"))["small"]


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def score(task, out, **arguments):
    return sk.score_zoo(task, MEASURE, out=out, progress=False, **{"n": 10, **arguments})


def counting(calls):
    def norm(model, data, *, seed):
        calls.append(1)
        return float(sum(p.detach().square().sum() for p in model.parameters()))

    return norm


def write_version_2(run, task, config):
    run.mkdir()
    with sqlite3.connect(run / "results.sqlite") as db:
        db.executescript(VERSION_2)
        db.executemany(
            "INSERT INTO meta VALUES (?, ?)", [("version", "2"), ("config", json.dumps(config))]
        )
        db.execute(
            "INSERT INTO tasks (task, model_configs) VALUES (?, ?)",
            (task.name, json.dumps(task.model_configs)),
        )
        db.executemany(
            "INSERT INTO items (task, model, measure, error, seconds) "
            "VALUES ('small', ?, 'm_sharpness', ?, 0.5)",
            [("3", None), ("5", None), ("7", "it failed")],
        )
        db.executemany(
            "INSERT INTO results VALUES ('small', ?, 'm_sharpness', ?, ?, 0.25)",
            [(id_, f"m={m},rho=0.1", m + 0.5) for id_ in ("3", "5") for m in (1, 4)],
        )
        db.execute("PRAGMA journal_mode=WAL")
    db.close()


def test_a_run_of_version_2_is_read_as_it_is_and_not_continued(task, run):
    config = {
        "measures": {"m_sharpness": json.loads(json.dumps(score(task, None).config))["measures"]},
        "n": 10,
        "seed": 0,
        "device": "cpu",
        "tasks": {"small": str(task.path.resolve())},
    }
    config["measures"] = config["measures"]["m_sharpness"]
    write_version_2(run, task, config)
    before = (run / "results.sqlite").read_bytes()
    old = sk.Scores.open(run)
    assert old.frame()["value"].tolist() == [1.5, 4.5, 1.5, 4.5]
    assert old.failures["error"].tolist() == ["it failed"]
    assert old.config == config
    assert old.model_configs == {"small": task.model_configs}
    assert old.provenance()["weights_hash"].isna().all()
    old.close()
    assert (run / "results.sqlite").read_bytes() == before
    with pytest.raises(RunError, match="measured by rules 1, now rules 2 apply"):
        score(task, run)
    assert sk.Scores.open(run).frame()["value"].tolist() == [1.5, 4.5, 1.5, 4.5]


def test_a_store_of_a_later_version_is_left_alone(task, run):
    score(task, run, limit=1).close()
    with sqlite3.connect(run / "results.sqlite") as db:
        db.execute("UPDATE meta SET value = ? WHERE key = 'version'", (str(VERSION + 1),))
    db.close()
    for use in (lambda: sk.Scores.open(run), lambda: score(task, run)):
        with pytest.raises(RunError, match=f"store version {VERSION + 1}"):
            use()


def test_every_row_tells_where_it_comes_from(task, run):
    scores = score(task, run)
    rows = scores.provenance().set_index("model")
    assert len(rows) == 8
    assert rows["weights_hash"].nunique() == 8
    for column in ("data_hash", "settings_hash"):
        assert rows[column].str.fullmatch("[0-9a-f]{64}").all()
        assert rows[column].nunique() == 1
    assert (rows["dtype"] == "float32").all()
    assert (rows["precision"] == "full").all()
    assert (rows["torch"] == torch.__version__).all()
    assert (rows["seconds"] > 0).all()
    assert (rows["peak_memory"] > 2**20).all()
    assert (rows["device"] != "").all()
    other = score(task, None, seed=1).provenance().set_index("model")
    assert (other["weights_hash"] == rows["weights_hash"]).all()
    assert (other["settings_hash"] != rows["settings_hash"]).all()


@pytest.mark.parametrize("file", ["weights.hdf5", "config.json"])
def test_a_changed_model_is_scored_again_and_no_other(task, run, file):
    calls = []
    sk.score_zoo(task, counting(calls), out=run, progress=False)
    a, b = task["3"].path / file, task["5"].path / file
    old = a.read_bytes()
    times = a.stat()
    a.write_bytes(b.read_bytes() if file == "weights.hdf5" else old + b" ")
    os.utime(a, ns=(times.st_atime_ns, times.st_mtime_ns))  # even if the date is faked
    expected = {"weights.hdf5": "5", "config.json": "3"}[file]
    before = {row.model: row.value for row in sk.Scores.open(run).frame().itertuples()}
    frame = sk.score_zoo(task, counting(calls), out=run, progress=False).frame()
    assert len(calls) == 9
    after = {row.model: row.value for row in frame.itertuples()}
    assert after == {**before, "3": before[expected]}


def test_files_with_new_times_but_old_contents_are_not_scored_again(task, run):
    calls = []
    sk.score_zoo(task, counting(calls), out=run, progress=False)
    for path in [*task.path.rglob("*.hdf5"), *task.path.rglob("*.tfrecord")]:
        os.utime(path)
    for _ in range(2):
        sk.score_zoo(task, counting(calls), out=run, progress=False)
    assert len(calls) == 8


def test_changed_data_make_every_model_of_the_task_be_scored_again(tmp_path, run):
    calls = []
    zoo = sk.load_zoo(write_small_zoo(tmp_path / "zoo", tasks=("a", "b")))
    sk.score_zoo(zoo, counting(calls), out=run, progress=False)
    shards = [zoo[name].shards("train")[0] for name in ("a", "b")]
    shutil.copy(shards[1], shards[0])
    zoo = sk.load_zoo(zoo.path)
    sk.score_zoo(zoo, counting(calls), out=run, progress=False)
    assert len(calls) == 16 + 8
    sk.score_zoo(zoo, counting(calls), out=run, progress=False)
    assert len(calls) == 16 + 8


def test_results_outlive_their_files(task, run):
    calls = []
    before = sk.score_zoo(task, counting(calls), out=run, progress=False).frame()
    (task["3"].path / "weights.hdf5").unlink()
    shutil.rmtree(task.path / "dataset_1")
    after = sk.score_zoo(task, counting(calls), out=run, progress=False).frame()
    pd.testing.assert_frame_equal(before, after)
    assert len(calls) == 8


def test_a_file_removed_during_the_run_is_a_failure_of_its_model(task, run):
    def removing(model, data, *, seed):
        (task["9"].path / "weights.hdf5").unlink(missing_ok=True)
        return 1.0

    scores = sk.score_zoo(task, removing, out=run, progress=False)
    assert scores.failures["model"].tolist() == ["9"]
    assert "weight file is missing" in scores.failures["error"][0]
    assert len(scores.frame()) == 7


def test_a_configuration_without_results_can_be_corrected(task, run):
    scores = score(task, run, n=10**6)
    assert len(scores.failures) == 8
    scores = score(task, run)
    assert scores.failures.empty
    assert scores.config["n"] == 10
    with pytest.raises(RunError, match="n: 10 there, 11 now"):
        score(task, run, n=11)


def test_a_full_disk_is_told_and_leaves_the_store_intact(task, run, monkeypatch):
    score(task, run, limit=2).close()
    before = sk.Scores.open(run).frame()
    opened = Store._agree_on

    def then_full(self, config):
        opened(self, config)
        pages = self._db.execute("PRAGMA page_count").fetchone()[0]
        self._db.execute(f"PRAGMA max_page_count = {pages}")

    monkeypatch.setattr(Store, "_agree_on", then_full)
    monkeypatch.setattr("sharpkit.runs.items.evaluate_measure", lambda *a, **k: _many())
    with pytest.raises(RunError, match=r"cannot be written \(database or disk is full\)"):
        score(task, run)
    monkeypatch.undo()
    pd.testing.assert_frame_equal(sk.Scores.open(run).frame(), before)
    assert len(score(task, run).frame()) == 16


def _many():
    return {f"setting={'x' * 500}{k}": Estimate(1.0) for k in range(100)}


def test_a_disk_too_full_for_a_store_is_told_and_the_run_starts_later(task, run, monkeypatch):
    def full(db, path):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("sharpkit.runs.store_file.prepare", full)
        with pytest.raises(RunError, match=r"cannot be written \(database or disk is full\)"):
            score(task, run)
    pd.testing.assert_frame_equal(score(task, run).frame(), score(task, None).frame())


def test_a_directory_that_cannot_be_written_is_told(task, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write to the run directory"):
        score(task, tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_told(task, tmp_path):
    (tmp_path / "run").mkdir(mode=0o555)
    with pytest.raises(RunError, match="cannot write"):
        score(task, tmp_path / "run")


def test_a_clock_that_goes_backwards_changes_nothing(task, run, monkeypatch):
    expected = score(task, None).frame()
    clock = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(time, "time_ns", lambda: next(clock) * 10**9)
    for path in task.path.rglob("*"):
        os.utime(path, (2**33, 2**33))  # files of the future
    score(task, run, limit=4)
    pd.testing.assert_frame_equal(score(task, run).frame(), expected)


def test_values_of_a_continuous_hyperparameter_are_kept_once(tmp_path):
    settings = {str(k): {"lr": k / 7} for k in range(500)}
    configs = model_configs(settings, {key: {"test_acc": 0.5} for key in settings})
    configs["0"]["hparams"]["lr"] = dict(configs["0"]["hparams"]["lr"], possible_values=[0.0])
    path = tmp_path / "results.sqlite"
    with closing(Store(path, {})) as store:
        store.add_task("t", configs)
        assert store.model_configs() == {"t": configs}
    found = Store(path).model_configs()["t"]
    assert found == configs
    lists = {id(entry["hparams"]["lr"]["possible_values"]) for entry in found.values()}
    assert len(lists) == 2
    assert path.stat().st_size < 200_000  # 250,000 values with every model


def test_an_outcome_replaces_the_one_before(tmp_path):
    store = Store(tmp_path / "s.sqlite", {"n": 1})
    store.add("t", "1", "m", Outcome({"a=1": Estimate(1.0), "a=2": Estimate(2.0)}, seconds=1.0))
    store.add("t", "1", "m", Outcome(error="broken"))
    assert store.results().empty
    store.add("t", "1", "m", Outcome({"a=1": Estimate(3.0)}))
    assert store.results()["value"].tolist() == [3.0]
    assert store.failures().empty


def test_several_outcomes_are_written_together_or_not_at_all(tmp_path):
    store = Store(tmp_path / "s.sqlite", {"n": 1})
    good, bad = Outcome({"": Estimate(1.0)}), Outcome({"": Estimate("no number")})
    with pytest.raises(ValueError, match="no number"):
        store.add_all({("t", "1", "m"): good, ("t", "2", "m"): bad})
    assert store.results().empty
    store.add_all({("t", "1", "m"): good, ("t", "2", "m"): good})
    assert store.results()["model"].tolist() == ["1", "2"]


def test_a_run_can_be_exported(task, run, tmp_path):
    scores = score(task, run)
    table = pd.read_csv(scores.export(tmp_path / "all.csv"), dtype={"model": str})
    assert len(table) == 16
    pd.testing.assert_series_equal(table["value"], scores.frame()["value"], check_exact=True)
    assert {"weights_hash", "data_hash", "torch", "peak_memory"} <= set(table.columns)
    with pytest.raises(ArgumentError, match=r"\.csv or \.parquet"):
        scores.export(tmp_path / "all.xlsx")


def test_a_run_can_be_exported_to_parquet(task, tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    scores = score(task, None)
    table = pd.read_parquet(scores.export(tmp_path / "all.parquet"))
    assert table["value"].tolist() == scores.frame()["value"].tolist()


class Killed(BaseException):
    """Stands for the end of a process."""


def copied(folder, to):
    """The files of a store as the end of its process would leave them, without the shared index."""
    to.mkdir()
    for path in folder.iterdir():
        if not path.name.endswith("-shm"):
            shutil.copy(path, to / path.name)
    return to


def test_an_empty_file_is_a_new_store(task, run):
    run.mkdir()
    (run / "results.sqlite").touch()
    assert sk.Scores.open(run).frame().empty
    pd.testing.assert_frame_equal(score(task, run).frame(), score(task, None).frame())


def test_a_kill_between_any_statements_of_its_creation_leaves_a_usable_store(tmp_path, monkeypatch):
    statements = 0

    class Counting(sqlite3.Connection):
        def execute(self, *arguments):
            nonlocal statements
            statements += 1
            if statements == last:
                copied(live, tmp_path / f"killed {last}")
                raise Killed
            return super().execute(*arguments)

    connect = sqlite3.connect
    for last in range(1, 100):
        statements, live = 0, tmp_path / f"live {last}"
        live.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, factory=Counting, **k))
            try:
                Store(live / "results.sqlite", {"n": 1}).close()
                break
            except Killed:
                pass
        path = tmp_path / f"killed {last}" / "results.sqlite"
        if path.exists():
            assert Store(path).results().empty
        store = Store(path, {"n": 1})
        store.add("t", "1", "m", Outcome({"a=1": Estimate(1.0)}))
        assert store.results()["value"].tolist() == [1.0]
    assert last > 15  # statements that the creation takes


def unread_log(tmp_path):
    """A copy of a run with ten results, all of them still in the log."""
    (tmp_path / "live").mkdir()
    store = Store(tmp_path / "live" / "results.sqlite", {"n": 1})
    for k in range(10):
        store.add("t", str(k), "m", Outcome({"a=1": Estimate(float(k))}))
    return copied(tmp_path / "live", tmp_path / "copy")


def broken_transaction(tmp_path):
    """A copy of a run with ten results, in the middle of deleting them."""
    path = unread_log(tmp_path) / "results.sqlite"
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode=DELETE")
    db.execute("PRAGMA cache_size=5")
    db.execute("BEGIN")
    db.execute("DELETE FROM results")
    for k in range(200):  # more than the cache holds, so some of it is in the file
        db.execute("INSERT INTO results VALUES (?, '', 'm', 'a=1', -1, 0)", ("x" * 999 + str(k),))
    hot = copied(path.parent, tmp_path / "hot")
    db.close()
    return hot


def like_a_read_only_disk(monkeypatch):
    """SQLite finds no place for the files that it needs to read a log."""
    connect = sqlite3.connect

    def refusing(database, **options):
        if str(database).endswith("?mode=ro"):
            raise sqlite3.OperationalError("unable to open database file")
        return connect(database, **options)

    monkeypatch.setattr(sqlite3, "connect", refusing)


@pytest.mark.parametrize("left", [unread_log, broken_transaction])
@pytest.mark.parametrize("read_only", [True, False])
def test_a_copy_of_a_killed_run_shows_all_results(tmp_path, monkeypatch, left, read_only):
    folder = left(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(before) == 2 and all(before.values())  # the store and a log
    if read_only:
        like_a_read_only_disk(monkeypatch)
    scores = sk.Scores.open(folder)
    assert scores.frame()["value"].tolist() == [float(k) for k in range(10)]
    if read_only:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_log_that_cannot_be_applied_is_told(tmp_path, monkeypatch):
    folder = unread_log(tmp_path)
    like_a_read_only_disk(monkeypatch)

    def full(*_):
        raise OSError(28, "No space left on device")

    def as_it_grows(source, target):
        target.write_bytes(source.read_bytes())
        with (folder / "results.sqlite-wal").open("ab") as log:
            log.write(bytes(100))

    with monkeypatch.context() as patch:
        patch.setattr("sharpkit.runs.store_file.shutil.copyfile", full)
        with pytest.raises(RunError, match="has a log of a killed process, and cannot be copied"):
            sk.Scores.open(folder)
    monkeypatch.setattr("sharpkit.runs.store_file.shutil.copyfile", as_it_grows)
    with pytest.raises(RunError, match="a process writes to it"):
        sk.Scores.open(folder)


def test_an_export_that_fails_leaves_the_one_before(task, tmp_path, monkeypatch):
    scores = score(task, None, limit=1)
    before = scores.export(tmp_path / "all.csv").read_bytes()

    def half(self, path, **options):
        path.write_text("task,")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", half)
    with pytest.raises(OSError, match="No space left"):
        scores.export(tmp_path / "all.csv")
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.csv")} == {"all.csv": before}
    assert not list(tmp_path.glob(".*.tmp"))
