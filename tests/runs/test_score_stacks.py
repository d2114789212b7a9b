"""Scoring networks in stacks: the numbers of one by one, resumable, and failures by model."""

from __future__ import annotations

import threading

import numpy as np
import pandas as pd
import pytest
from zoos import write_small_zoo

import sharpkit as sk
from sharpkit.errors import ArgumentError, RunError
from sharpkit.measures.measure import Estimate
from sharpkit.runs import stacks

MEASURE = sk.MSharpness(m=[1, 4], rho=[0.05, 0.1])
ADAPTIVE = sk.MSharpness(m=4, rho=0.5, adaptive=True)
NORMS = sk.measures.make_measure("frobenius_norms")


@pytest.fixture
def zoo_path(tmp_path):
    return write_small_zoo(tmp_path / "zoo", tasks=("first", "second"))


def sizes_seen(monkeypatch) -> list[list[str]]:
    """The models of every stack, from now on."""
    seen: list[list[str]] = []
    evaluate = stacks.evaluate_stack

    def noted(measure, models, data, *, seed):
        seen.append([str(len(model)) for model in models])
        return evaluate(measure, models, data, seed=seed)

    monkeypatch.setattr(stacks, "evaluate_stack", noted)
    return seen


def assert_close(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    numbers = ["value", "std_error"]
    pd.testing.assert_frame_equal(found.drop(columns=numbers), expected.drop(columns=numbers))
    np.testing.assert_allclose(found[numbers], expected[numbers], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("layout", ["pgdl", "stacked"])
@pytest.mark.parametrize("stack", [1, 2, 100])
def test_scores_are_those_of_one_by_one(zoo_path, monkeypatch, stack, layout):
    zoo = sk.load_zoo(zoo_path)
    if layout == "stacked":
        sk.write_zoo(zoo, zoo_path / "there", layout="stacked")
        zoo = sk.load_zoo(zoo_path / "there")
    measures = [MEASURE, NORMS, ADAPTIVE]
    expected = sk.score_zoo(zoo, measures, n=20, progress=False)
    seen = sizes_seen(monkeypatch)
    found = sk.score_zoo(zoo, measures, n=20, stack=stack, progress=False)
    assert found.failures.empty
    assert_close(found.frame(), expected.frame())
    # four shapes of two networks, in two tasks; both measures that can
    assert [len(models) for models in seen] == [min(stack, 2)] * (32 // min(stack, 2))
    facts = ["weights_hash", "data_hash", "dtype", "device"]
    rows = [s.provenance().sort_values(["task", "model", "measure"]) for s in (found, expected)]
    assert rows[0][facts].to_numpy().tolist() == rows[1][facts].to_numpy().tolist()
    assert (rows[0]["seconds"] > 0).all()


def test_broken_models_are_recorded_and_the_others_scored(zoo_path):
    task = sk.load_zoo(zoo_path)["first"]
    expected = sk.score_zoo(task, MEASURE, progress=False).frame()
    task["5"].weights_path().write_bytes(b"damaged")
    scores = sk.score_zoo(task, MEASURE, stack=8, progress=False)
    assert scores.failures["model"].tolist() == ["5"]
    assert "weights" in scores.failures["error"].item()
    assert_close(scores.frame(), expected[expected["model"] != "5"].reset_index(drop=True))


class Failing:
    """A measure of stacks that raises for those with a certain network, as a whole or for it."""

    name, stacks = "failing", True

    def __init__(self, wrong: float, *, whole: bool) -> None:
        self.wrong, self.whole = wrong, whole

    def __call__(self, model, data, *, seed):
        found = self.of_one(model)
        if isinstance(found, Exception):
            raise found
        return found

    def of_one(self, model):
        value = sum(p.square().sum().item() for p in model.parameters())
        return ValueError("not this one") if value == self.wrong else Estimate(value)

    def of_stack(self, models, data, *, seed):
        found = [self.of_one(model) for model in models]
        if self.whole and any(isinstance(f, Exception) for f in found):
            raise RuntimeError("all of them")
        return found


@pytest.mark.parametrize("whole", [False, True])
def test_a_stack_that_fails_is_measured_one_by_one(zoo_path, whole):
    task = sk.load_zoo(zoo_path)["first"]
    wrong = Failing(0.0, whole=False)(task["7"].load(), None, seed=0).value
    scores = sk.score_zoo(task, Failing(wrong, whole=whole), stack=8, progress=False)
    assert scores.failures["model"].tolist() == ["7"]
    assert scores.failures["error"].item() == "ValueError: not this one"
    assert scores.frame()["model"].nunique() == 7


def test_an_interrupted_run_keeps_the_stacks_that_are_done(zoo_path, tmp_path, monkeypatch):
    task, run = sk.load_zoo(zoo_path)["first"], tmp_path / "run"
    seen = sizes_seen(monkeypatch)
    evaluate = stacks.evaluate_stack

    def interrupted(*arguments, **options):
        if len(seen) == 2:
            raise KeyboardInterrupt
        return evaluate(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stacks, "evaluate_stack", interrupted)
        sk.score_zoo(task, MEASURE, out=run, stack=2, progress=False)
    assert sk.Scores.open(run).frame()["model"].nunique() == 4
    scores = sk.score_zoo(task, MEASURE, out=run, progress=False)  # in stacks, as it was started
    assert len(seen) == 4
    assert_close(scores.frame(), sk.score_zoo(task, MEASURE, progress=False).frame())


def test_the_next_stack_is_loaded_while_one_is_measured(zoo_path, monkeypatch):
    evaluate, load = stacks.evaluate_stack, stacks.StackScorer.load
    loaded = [threading.Event() for _ in range(8)]
    ids = [str(2 * i + 3) for i in range(8)]

    def noted(scorer, task, model, measures):
        found = load(scorer, task, model, measures)
        loaded[ids.index(model)].set()
        return found

    def waiting(*arguments, **options):
        if not loaded[-1].is_set():  # four stacks of two: while the first two are measured
            assert loaded[2].wait(60.0)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(stacks.StackScorer, "load", noted)
    monkeypatch.setattr(stacks, "evaluate_stack", waiting)
    task = sk.load_zoo(zoo_path)["first"]
    assert sk.score_zoo(task, MEASURE, stack=2, progress=False).failures.empty


def test_the_stack_is_fixed_for_the_run(zoo_path, tmp_path):
    task, run = sk.load_zoo(zoo_path)["first"], tmp_path / "run"
    sk.score_zoo(task, MEASURE, out=run, stack=2, limit=4, progress=False)
    with pytest.raises(RunError, match="stack: 2 there, 3 now"):
        sk.score_zoo(task, MEASURE, out=run, stack=3, progress=False)
    sk.score_zoo(task, MEASURE, out=tmp_path / "other", limit=4, progress=False)
    with pytest.raises(RunError, match="stack: null there, 3 now"):
        sk.score_zoo(task, MEASURE, out=tmp_path / "other", stack=3, progress=False)


@pytest.mark.parametrize("stack", [0, -1, 1.5, "auto", True])
def test_what_is_no_number_of_networks_is_refused(zoo_path, stack):
    with pytest.raises(ArgumentError, match="stack"):
        sk.score_zoo(sk.load_zoo(zoo_path), MEASURE, stack=stack, progress=False)


@pytest.mark.slow
def test_worker_processes_take_a_stack_at_a_time(zoo_path):
    zoo = sk.load_zoo(zoo_path)
    found = sk.score_zoo(zoo, [MEASURE, NORMS], n=20, stack=2, workers=2, progress=False)
    expected = sk.score_zoo(zoo, [MEASURE, NORMS], n=20, stack=2, progress=False)
    pd.testing.assert_frame_equal(found.frame(), expected.frame())


def test_measures_that_cannot_be_stacked_say_so():
    for options in (
        {"ascent": "pgd"}, {"norm": 1.0}, {"average": True}, {"tolerance": 0.1}, {"engine": "loop"},
    ):  # fmt: skip
        assert not sk.MSharpness(m=1, rho=0.1, **options).stacks
    assert MEASURE.stacks
    assert ADAPTIVE.stacks
