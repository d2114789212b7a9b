"""Stores that a disk or a copy has damaged: told or computed again, never another number."""

from __future__ import annotations

import random
import sqlite3
import warnings
from pathlib import Path

import pandas as pd
import pytest
from zoos import write_small_zoo

import sharpkit as sk
from sharpkit.errors import RunError
from sharpkit.measures.measure import Estimate
from sharpkit.runs.store import Outcome, Store

CONFIG = {"n": 10, "measures": {"m": {"rho": 0.1}}}


def filled(path: Path, models: int = 30) -> Path:
    """A store of two measures on some models, all of it in one file."""
    store = Store(path, CONFIG)
    store.add_task("task", {str(k): {"hparams": {"width": k}} for k in range(models)})
    for k in range(models):
        values = {f"m={m},rho=0.1": Estimate(k + m / 3, m / 7) for m in (1, 4)}
        store.add("task", str(k), "m", Outcome(values, seconds=0.5, environment="{}"))
        store.add("task", str(k), "other", Outcome({"": Estimate(k / 11)}))
    store.add("task", "0", "failed", Outcome(error="no"))
    store._db.execute("PRAGMA journal_mode=DELETE")
    store.close()
    return path


def content(path: Path) -> tuple[pd.DataFrame, pd.DataFrame, dict, dict]:
    store = Store(path)
    try:
        return store.results(), store.failures(), store.model_configs(), store.config
    finally:
        store.close()


def test_no_flipped_bit_changes_a_number_silently(tmp_path):
    good = filled(tmp_path / "good.sqlite")
    results, failures, configs, config = content(good)
    expected = {tuple(map(str, row)) for row in results.itertuples(index=False)}
    data, refused, told = good.read_bytes(), 0, 0
    choose = random.Random(0)
    for case in range(400):
        flipped = bytearray(data)
        flipped[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        path = tmp_path / f"{case}.sqlite"
        path.write_bytes(flipped)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                found = content(path)
            except RunError as error:
                assert str(path) in str(error)
                refused += 1
                continue
        rows = {tuple(map(str, row)) for row in found[0].itertuples(index=False)}
        assert rows <= expected
        assert len(rows) == len(expected) or len(found[1]) > len(failures)
        assert found[2] == configs or (found[2] == {} and warned)
        assert found[3] == config
        told += len(rows) < len(expected) or found[2] == {}
    assert refused > 10 and told > 10  # the damage does reach what is read


def test_a_damaged_value_is_a_failure_until_the_run_computes_it_again(tmp_path):
    task = sk.load_zoo(write_small_zoo(tmp_path / "zoo"))["small"]
    measure = sk.MSharpness(m=[1, 4], rho=0.1)
    whole = sk.score_zoo(task, measure, out=tmp_path / "run", n=10, progress=False)
    expected = whole.frame()
    whole.close()
    with sqlite3.connect(tmp_path / "run" / "results.sqlite") as db:
        db.execute(
            "UPDATE results SET value = value + 1e-9 WHERE model = '3' AND setting LIKE '%m=1,%'"
        )
        db.execute("DELETE FROM results WHERE model = '5' AND setting LIKE '%m=4,%'")
        assert db.total_changes == 2
    db.close()
    damaged = sk.Scores.open(tmp_path / "run")
    assert damaged.failures["model"].tolist() == ["3", "5"]
    assert damaged.failures["error"].str.contains("damaged").all()
    assert set(damaged.frame()["model"]) == set(expected["model"]) - {"3", "5"}
    damaged.close()
    mended = sk.score_zoo(task, measure, out=tmp_path / "run", n=10, progress=False)
    pd.testing.assert_frame_equal(mended.frame(), expected, check_exact=True)
    assert mended.failures.empty


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE meta SET value = '{\"n\": 11}' WHERE key = 'config'", "stored config is damaged"),
        ("UPDATE meta SET value = '7' WHERE key = 'version'", "store version 7"),
        ("UPDATE meta SET value = '{' WHERE key = 'version'", "store version {"),
        ("UPDATE items SET task = CAST(X'FF' AS TEXT)", "not damaged .*UTF-8"),
        ("UPDATE environments SET content = '{'", ""),
        ("DROP TABLE results", "not damaged .*no such table"),
    ],
)
def test_damage_is_told_with_the_file(tmp_path, statement, message):
    path = filled(tmp_path / "run.sqlite", models=2)
    with sqlite3.connect(path) as db:
        db.execute(statement)
    db.close()
    if not message:
        assert len(content(path)[1]) == 1 + 2  # those that were computed there
        return
    with pytest.raises(RunError, match=message) as caught:
        content(path)
    assert str(path) in str(caught.value)


def test_rows_of_earlier_versions_have_no_checksum_and_are_read(tmp_path):
    path = filled(tmp_path / "run.sqlite", models=2)
    before = content(path)[0]
    with sqlite3.connect(path) as db:
        for table in ("items", "tasks", "meta"):
            db.execute(f"ALTER TABLE {table} DROP COLUMN checksum")
        db.execute("UPDATE meta SET value = '3' WHERE key = 'version'")
    db.close()
    pd.testing.assert_frame_equal(content(path)[0], before)
    store = Store(path, CONFIG)
    store.add("task", "2", "m", Outcome({"m=1": Estimate(2.0)}))
    assert len(store.results()) == len(before) + 1
    store.close()
