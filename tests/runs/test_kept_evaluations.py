"""An evaluation is kept beside its run, and taken only while it is still the answer."""

import importlib
import json
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

import sharpkit as sk
from sharpkit.runs import kept_evaluations
from sharpkit.runs.kept_evaluations import FOLDER, kept_table

evaluate_module = importlib.import_module("sharpkit.runs.evaluate")


def a_table(*_):
    warnings.warn("left out: 3", stacklevel=1)
    return pd.DataFrame(
        {
            "value": [0.1 + 0.2, np.nan, -np.inf],
            "models": [3, 2, 1],
            "left_out": pd.array([1, None, 2**60], dtype="Int64"),
            "note": ["", "ä\u2028", "x"],
        }
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    measure = sk.MSharpness(m=[1, 16], rho=0.1)
    sk.score_zoo(sk.embedded_zoo(), measure, out=folder, n=16, limit=6, workers=1)
    return folder


def files(folder):
    return sorted((folder / FOLDER).glob("*.json"))


@pytest.fixture
def counted(monkeypatch):
    """How often the statistics were computed."""
    calls = []
    own = evaluate_module.rate_measures

    def counting(*arguments, **options):
        calls.append(options["resamples"])
        return own(*arguments, **options)

    monkeypatch.setattr(evaluate_module, "rate_measures", counting)
    return calls


def test_a_table_comes_back_bit_by_bit_with_its_warnings(tmp_path):
    with pytest.warns(UserWarning, match="left out: 3"):
        table = kept_table(tmp_path, a_table, 1)
    with pytest.warns(UserWarning, match="left out: 3"):
        again = kept_table(tmp_path, a_table, 1)
    assert again is not table
    assert_frame_equal(again, table, check_exact=True)
    assert len(files(tmp_path)) == 1


def test_the_same_evaluation_is_not_computed_twice(run, counted):
    first = sk.evaluate(sk.Scores.open(run), resamples=20)
    second = sk.evaluate(sk.Scores.open(run), resamples=20)
    assert counted == [20]
    assert_frame_equal(first, second, check_exact=True)


@pytest.mark.parametrize(
    "options", [{"resamples": 21}, {"seed": 1}, {"test_size": 100}, {"target": "test_acc"}], ids=str
)
def test_other_options_are_another_evaluation(run, counted, options):
    sk.evaluate(sk.Scores.open(run), resamples=20)
    before = len(counted)
    sk.evaluate(sk.Scores.open(run), **{"resamples": 20, **options})
    assert len(counted) == before + 1


def test_further_results_are_another_evaluation(tmp_path, counted):
    measure = sk.MSharpness(m=1, rho=0.1)
    for limit in (4, 6):
        sk.score_zoo(sk.embedded_zoo(), measure, out=tmp_path, n=16, limit=limit, workers=1)
        table = sk.evaluate(sk.Scores.open(tmp_path), resamples=20)
        assert table["models"].tolist() == [limit]
    assert counted == [20, 20]


def test_other_code_or_libraries_are_another_evaluation(tmp_path, monkeypatch):
    with pytest.warns(UserWarning):
        kept_table(tmp_path, a_table, 1)
    monkeypatch.setattr(kept_evaluations, "_code", lambda: b"another version")
    with pytest.warns(UserWarning):
        kept_table(tmp_path, a_table, 1)
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("0.30000000000000004", "0.9"),
        lambda text: "[]",
        lambda text: "{}",
        lambda text: json.dumps({**json.loads(text), "warnings": ["forged"]}),
    ],
    ids=["cut", "number", "list", "empty", "warning"],
)
def test_a_damaged_file_is_made_again(tmp_path, damage):
    with pytest.warns(UserWarning):
        table = kept_table(tmp_path, a_table, 1)
    (file,) = files(tmp_path)
    content = file.read_text()
    file.write_text(damage(content))
    with pytest.warns(UserWarning, match="left out"):
        again = kept_table(tmp_path, a_table, 1)
    assert_frame_equal(again, table, check_exact=True)
    assert file.read_text() == content


@pytest.mark.parametrize(
    "change",
    [
        {"columns": [["value", "float64", ["a word"]]]},
        {"columns": [["value", "no dtype", [1.0]]]},
        {"columns": 3},
        {"warnings": None},
        {"question": None},
    ],
    ids=str,
)
def test_a_file_of_another_form_is_made_again_whatever_its_checksum(tmp_path, change):
    with pytest.warns(UserWarning):
        table = kept_table(tmp_path, a_table, 1)
    (file,) = files(tmp_path)
    content = {**json.loads(file.read_text()), **change}
    del content["checksum"]
    content["checksum"] = kept_evaluations._checksum(content)
    file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="left out"):
        assert_frame_equal(kept_table(tmp_path, a_table, 1), table, check_exact=True)


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path):
    (tmp_path / FOLDER).write_text("a file where the folder would be")
    with pytest.warns(UserWarning):
        assert len(kept_table(tmp_path, a_table, 1)) == 3


def test_the_oldest_make_place(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_evaluations, "_KEPT", 3)
    with pytest.warns(UserWarning):
        for k in range(6):
            kept_table(tmp_path, a_table, k)
    assert len(files(tmp_path)) == 3


def test_what_a_killed_process_has_left_is_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = tmp_path / FOLDER / f".table.json.{gone.pid}-{32 * '0'}.tmp"
    left.parent.mkdir()
    left.write_text("half of a table")
    with pytest.warns(UserWarning):
        kept_table(tmp_path, a_table, 1)
    assert not left.exists()


def test_results_in_memory_keep_nothing():
    with pytest.warns(UserWarning):
        assert len(kept_table(None, a_table, object())) == 3
