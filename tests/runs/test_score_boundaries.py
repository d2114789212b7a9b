"""Whatever is wrong with one task, the models of the others are scored."""

from __future__ import annotations

import pandas as pd
import pytest
from zoos import write_small_zoo

import sharpkit as sk
from sharpkit.errors import RunError
from sharpkit.zoo import PgdlTask

MEASURE = sk.MSharpness(m=[1, 4], rho=0.1)


@pytest.fixture
def zoo(tmp_path):
    return sk.load_zoo(write_small_zoo(tmp_path / "zoo", tasks=("a", "b")))


def raising(monkeypatch, member, error):
    """Something of task "a" raises."""
    original = vars(PgdlTask)[member]
    get = getattr(original, "func", None)  # of a property that is kept

    def replaced(task, *arguments):
        if task.name == "a":
            raise error
        return original(task, *arguments) if get is None else get(task)

    monkeypatch.setattr(PgdlTask, member, replaced if get is None else property(replaced))


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("no\nreason"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        OSError(5),
    ],
)
@pytest.mark.parametrize("member", ["dataset", "shards", "model_configs"])
def test_a_task_that_cannot_be_opened_costs_its_own_models_only(
    zoo, tmp_path, monkeypatch, member, error
):
    expected = sk.score_zoo(zoo["b"], MEASURE, n=10, progress=False).frame()
    with monkeypatch.context() as patch:
        raising(patch, member, error)
        scores = sk.score_zoo(zoo, MEASURE, n=10, out=tmp_path / "run", progress=False)
    pd.testing.assert_frame_equal(scores.frame(), expected, check_exact=True)
    assert scores.failures["task"].tolist() == ["a"] * 8
    assert scores.failures["error"].str.startswith(type(error).__name__).all()
    scores.close()
    again = sk.score_zoo(zoo, MEASURE, n=10, out=tmp_path / "run", progress=False)
    assert again.failures.empty and len(again.frame()) == 2 * len(expected)


def test_results_are_kept_where_their_files_cannot_be_compared(zoo, tmp_path, monkeypatch):
    arguments = {"n": 10, "out": tmp_path / "run", "progress": False}
    first = sk.score_zoo(zoo, MEASURE, **arguments)
    expected = first.frame()
    first.close()
    raising(monkeypatch, "shards", IndexError("list index out of range"))
    again = sk.score_zoo(zoo, MEASURE, **arguments)
    pd.testing.assert_frame_equal(again.frame(), expected, check_exact=True)
    assert again.failures.empty


@pytest.mark.parametrize(
    "error", [MemoryError(), KeyboardInterrupt(), RunError("the disk is full")]
)
def test_what_concerns_the_whole_run_ends_it(zoo, monkeypatch, error):
    raising(monkeypatch, "dataset", error)
    with pytest.raises(type(error)):
        sk.score_zoo(zoo, MEASURE, n=10, progress=False)


def test_a_model_without_metrics_is_no_hindrance(zoo, tmp_path):
    scores = sk.score_zoo(zoo["a"], MEASURE, n=10, out=tmp_path / "run", progress=False)
    configs = scores.model_configs["a"]
    configs["3"]["metrics"] = None
    del configs["5"]["metrics"]
    configs["7"]["metrics"] = 5
    configs["9"] = None
    scores._store.add_task("a", configs)
    table = scores.metrics().set_index("model")
    assert table.loc[["3", "5", "7", "9"], "train_acc"].isna().all()
    assert table["train_acc"].notna().sum() == 4


def test_a_task_that_cannot_be_evaluated_is_told_and_the_others_are(zoo):
    scores = sk.score_zoo(zoo, MEASURE, n=10, progress=False)
    expected = sk.evaluate(scores, resamples=5)
    configs = scores.model_configs["a"]
    for entry in configs.values():
        entry["metrics"] = {"train_acc": "high", "test_acc": None}
    scores._store.add_task("a", configs)
    with pytest.warns(UserWarning, match="task a: .*train_acc"):
        table = sk.evaluate(scores, resamples=5)
    notes = table.loc[table["task"] == "a", "interval_note"]
    assert len(notes) == 2 and notes.str.startswith("all: ").all()
    columns = ["task", "m", "kendall_tau", "p_value"]
    pd.testing.assert_frame_equal(
        table.loc[table["task"] == "b", columns], expected.loc[expected["task"] == "b", columns]
    )
