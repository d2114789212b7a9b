"""Scoring a zoo: complete, resumable, and one broken model never loses the others."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from zoos import finished_models, write_small_zoo

import sharpkit as sk
from sharpkit.errors import ArgumentError, RunError, ScoreError
from sharpkit.run_directory import sole_driver

MEASURE = sk.MSharpness(m=[1, 4], rho=[0.05, 0.1])


@pytest.fixture
def zoo_path(tmp_path):
    return write_small_zoo(tmp_path / "zoo", tasks=("first", "second"))


def test_scores_equal_m_sharpness_of_each_model(zoo_path):
    zoo = sk.load_zoo(zoo_path)
    frame = sk.score_zoo(zoo, MEASURE, progress=False).frame()
    assert len(frame) == 2 * 8 * 4
    assert list(frame.columns) == ["task", "model", "measure", "m", "rho", "value", "std_error"]
    assert list(frame["model"].unique()) == [str(2 * i + 3) for i in range(8)]
    task = zoo["second"]
    # n = None measures all training examples; the order is drawn once more inside the measure
    expected = sk.m_sharpness(task["5"].load(), task.dataset("train"), m=1, rho=0.1)
    row = frame.query("task == 'second' and model == '5' and m == 1 and rho == 0.1").iloc[0]
    assert row["value"] == pytest.approx(expected.value, rel=1e-5)
    assert row["std_error"] == pytest.approx(expected.std_error, rel=1e-4)


def test_a_stopped_run_goes_on_where_it_was(zoo_path, tmp_path):
    task = sk.load_zoo(zoo_path)["first"]
    calls = []

    def counting(model, data, *, seed):
        calls.append(len(data))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return sum(p.square().sum().item() for p in model.parameters())

    with pytest.raises(KeyboardInterrupt):
        sk.score_zoo(task, counting, out=tmp_path / "run", n=10, progress=False)
    assert len(sk.Scores.open(tmp_path / "run").frame()) == 3
    sk.score_zoo(task, counting, out=tmp_path / "run", n=10, progress=False)
    assert len(calls) == 4 + 5
    sk.score_zoo(task, counting, out=tmp_path / "run", n=10, progress=False)
    assert len(calls) == 9
    assert set(calls) == {10}


def test_a_limit_can_be_lifted_later(zoo_path, tmp_path):
    task = sk.load_zoo(zoo_path)["first"]
    few = sk.score_zoo(task, MEASURE, out=tmp_path / "run", limit=3, progress=False)
    assert few.frame()["model"].nunique() == 3
    rest = sk.score_zoo(task, MEASURE, out=tmp_path / "run", progress=False)
    whole = sk.score_zoo(task, MEASURE, progress=False)
    pd.testing.assert_frame_equal(rest.frame(), whole.frame())


@pytest.mark.parametrize(
    "change", [{"n": 12}, {"seed": 1}, {"measures": sk.MSharpness(m=1, rho=1)}]
)
def test_another_configuration_is_refused_and_nothing_is_lost(zoo_path, tmp_path, change):
    task = sk.load_zoo(zoo_path)["first"]
    arguments = {"measures": MEASURE, "n": 20, "seed": 0}
    before = sk.score_zoo(task, out=tmp_path / "run", progress=False, **arguments).frame()
    with pytest.raises(RunError, match="another configuration"):
        sk.score_zoo(task, out=tmp_path / "run", progress=False, **{**arguments, **change})
    pd.testing.assert_frame_equal(sk.Scores.open(tmp_path / "run").frame(), before)


def test_broken_models_are_recorded_and_the_others_scored(zoo_path):
    models = zoo_path / "input_data" / "first"
    (models / "model_5" / "weights.hdf5").write_bytes(b"not HDF5")
    config = json.loads((models / "model_7" / "config.json").read_text())
    config["model_config"][0]["layer_name"] = "Mystery"
    (models / "model_7" / "config.json").write_text(json.dumps(config))
    (models / "model_9" / "weights.hdf5").unlink()
    scores = sk.score_zoo(sk.load_zoo(zoo_path), MEASURE, progress=False)
    failures = scores.failures.set_index("model")["error"]
    assert sorted(failures.index) == ["5", "7", "9"]
    assert "weights.hdf5" in failures["5"]
    assert "Mystery" in failures["7"]
    assert "weights.hdf5" in failures["9"]
    frame = scores.frame()
    assert frame.query("task == 'first'")["model"].nunique() == 5
    assert frame.query("task == 'second'")["model"].nunique() == 8


def test_a_repaired_model_is_scored_at_the_next_start(zoo_path, tmp_path):
    weights = zoo_path / "input_data" / "first" / "model_5" / "weights.hdf5"
    good = weights.read_bytes()
    weights.write_bytes(good[: len(good) // 2])
    task = sk.load_zoo(zoo_path)["first"]
    assert len(sk.score_zoo(task, MEASURE, out=tmp_path / "run", progress=False).failures) == 1
    weights.write_bytes(good)
    scores = sk.score_zoo(task, MEASURE, out=tmp_path / "run", progress=False)
    assert scores.failures.empty
    assert scores.frame()["model"].nunique() == 8


def test_broken_data_fail_their_task_only(zoo_path):
    shard = next((zoo_path / "input_data" / "first" / "dataset_1" / "train").glob("shard_0*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(bytes(data))
    scores = sk.score_zoo(sk.load_zoo(zoo_path), MEASURE, progress=False)
    assert set(scores.frame()["task"]) == {"second"}
    assert scores.failures["task"].tolist() == ["first"] * 8
    assert scores.failures["error"].str.contains("shard_0").all()


def test_nan_values_and_crashing_measures_are_failures(zoo_path):
    task = sk.load_zoo(zoo_path)["first"]

    @dataclass(frozen=True)
    class Sometimes:
        name: str = "sometimes"

        def __call__(self, model, data, *, seed):
            width = model[0].out_features if hasattr(model[0], "out_features") else 0
            total = sum(p.sum().item() for p in model.parameters())
            if total > 1:
                raise RuntimeError("kernel exploded")
            return {"a": 1.0, "b": float("nan") if total < -1 else width}

    scores = sk.score_zoo(task, Sometimes(), progress=False)
    errors = scores.failures["error"]
    assert 0 < len(errors) < 8
    assert errors.str.contains("RuntimeError: kernel exploded|is nan: expected a finite").all()
    assert scores.frame()["value"].notna().all()


def test_refuses_bad_arguments(zoo_path, tmp_path):
    task = sk.load_zoo(zoo_path)["first"]
    with pytest.raises(ArgumentError, match="limit"):
        sk.score_zoo(task, MEASURE, limit=0)
    with pytest.raises(ArgumentError, match="same name"):
        sk.score_zoo(task, [MEASURE, MEASURE])
    with pytest.raises(ArgumentError, match="no measure"):
        sk.score_zoo(task, [])
    with pytest.raises(RunError, match="not a run directory"):
        sk.Scores.open(tmp_path)
    with pytest.raises(ArgumentError, match="m = 4 is larger than n = 3"):
        sk.score_zoo(task, MEASURE, out=tmp_path / "unborn", n=3)
    assert not (tmp_path / "unborn").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        sk.score_zoo(task, MEASURE, out=tmp_path / "file")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.sqlite").write_text("this is no database, whatever it is called")
    with pytest.raises(RunError, match="expected a sharpkit results store"):
        sk.Scores.open(tmp_path / "run")
    too_many = sk.score_zoo(task, MEASURE, n=10**6, progress=False)
    assert too_many.failures["error"].str.contains("n = 1000000").all()


def test_close_values_of_rho_are_told_apart(zoo_path):
    rho = [0.12345678, 0.12345679]
    measure = sk.MSharpness(m=1, rho=rho)
    frame = sk.score_zoo(sk.load_zoo(zoo_path)["first"], measure, limit=2, progress=False).frame()
    assert frame["rho"].tolist() == rho * 2


def test_impossible_settings_are_refused_before_a_run_begins():
    for change in ({"m": 0}, {"rho": -1.0}, {"m": [4, 4]}, {"norm": 0.5}):
        with pytest.raises(ArgumentError):
            sk.MSharpness(**{"m": 1, "rho": 0.1, **change})


def test_settings_may_not_hide_columns(zoo_path):
    def shadowing(model, data, *, seed):
        return {"model=3": 1.0}

    scores = sk.score_zoo(sk.load_zoo(zoo_path)["first"], shadowing, limit=1, progress=False)
    assert "'model' is a column" in scores.failures["error"][0]


def test_a_name_without_a_number_is_a_form(zoo_path, tmp_path):
    def two(model, data, *, seed):
        return {"alpha": 1.0, "beta, scaled": 2.0}

    task = sk.load_zoo(zoo_path)["first"]
    scores = sk.score_zoo(task, two, out=tmp_path / "run", limit=1, progress=False)
    frame = scores.frame()
    assert list(frame.columns) == ["task", "model", "measure", "form", "value", "std_error"]
    assert frame["form"].tolist() == ["alpha", "beta, scaled"]
    assert frame["value"].tolist() == [1.0, 2.0]


def test_metrics_are_a_table(zoo_path, tmp_path):
    zoo = sk.load_zoo(zoo_path)
    del zoo["second"].model_configs["3"]["metrics"]["test_acc"]
    scores = sk.score_zoo(zoo, MEASURE, out=tmp_path / "run", limit=1, progress=False)
    table = scores.metrics()
    assert table.columns[0:2].tolist() == ["task", "model"]
    assert table.columns[-1] == "generalization_gap"
    assert len(table) == 2 * 8
    pd.testing.assert_frame_equal(sk.Scores.open(tmp_path / "run").metrics(), table)
    rows = table.set_index(["task", "model"])
    for name, task in zoo.items():
        for entry in task.values():
            row, metrics = rows.loc[name, entry.id], task.model_configs[entry.id]["metrics"]
            assert row["train_acc"] == metrics["train_acc"]
            if (name, entry.id) != ("second", "3"):
                assert row["test_acc"] == metrics["test_acc"]
                assert row["generalization_gap"] == entry.generalization_gap
    assert rows.loc["second", "3"][["test_acc", "generalization_gap"]].isna().all()


def test_a_run_without_models_has_an_empty_table_of_metrics():
    table = sk.score_zoo({}, MEASURE, progress=False).metrics()
    assert list(table.columns) == ["task", "model", "generalization_gap"]
    assert table.empty


def test_a_run_may_be_configured_with_numpys_numbers(zoo_path, tmp_path):
    task = sk.load_zoo(zoo_path)["first"]
    ours = sk.MSharpness(m=4 ** np.arange(2), rho=np.array([0.05, 0.1]))
    first = sk.score_zoo(task, ours, out=tmp_path / "run", limit=1, progress=False).frame()
    again = sk.score_zoo(task, MEASURE, out=tmp_path / "run", limit=1, progress=False)
    pd.testing.assert_frame_equal(again.frame(), first)
    assert again.provenance()["settings_hash"].nunique() == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_device_that_is_not_there_is_refused_at_once(zoo_path, tmp_path, workers):
    task = sk.load_zoo(zoo_path)["first"]
    with pytest.raises(ArgumentError, match="device 'abacus' cannot be used: Expected one of cpu"):
        sk.score_zoo(task, MEASURE, out=tmp_path / "run", device="abacus", workers=workers)
    assert not (tmp_path / "run").exists()


def test_a_database_of_something_else_is_left_alone(zoo_path, tmp_path):
    path = tmp_path / "results.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE precious (a)")
    before = path.read_bytes()
    for use in (
        lambda: sk.Scores.open(tmp_path),
        lambda: sk.score_zoo(sk.load_zoo(zoo_path), MEASURE, out=tmp_path, progress=False),
    ):
        with pytest.raises(RunError):
            use()
    assert path.read_bytes() == before


def test_a_finished_run_can_be_read_where_nothing_can_be_written(zoo_path, tmp_path):
    task = sk.load_zoo(zoo_path)["first"]
    scores = sk.score_zoo(task, MEASURE, out=tmp_path / "run", limit=3, progress=False)
    expected = scores.frame()
    scores.close()
    (tmp_path / "run" / "results.sqlite").chmod(0o444)
    (tmp_path / "run").chmod(0o555)
    pd.testing.assert_frame_equal(sk.Scores.open(tmp_path / "run").frame(), expected)
    (tmp_path / "run").chmod(0o755)


@pytest.mark.slow
def test_of_processes_that_start_the_same_run_one_computes_and_the_others_are_told(tmp_path):
    zoo_path = write_small_zoo(tmp_path / "zoo")
    processes = [
        subprocess.Popen(
            _score_command(zoo_path, tmp_path / "run"),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    messages = [process.communicate()[1] for process in processes]
    codes = [process.returncode for process in processes]
    # one that starts late may find the run finished, which is no conflict
    assert codes.count(0) >= 1
    assert set(codes) <= {0, 1}
    for code, message in zip(codes, messages, strict=True):
        assert code == 0 or "another process is working on this run" in message
    assert len(sk.Scores.open(tmp_path / "run").frame()) == 8 * 12


def test_a_run_that_another_process_holds_is_refused(zoo_path, tmp_path):
    task = sk.load_zoo(zoo_path)["first"]
    with sole_driver(tmp_path / "run"), pytest.raises(RunError, match="another process"):
        sk.score_zoo(task, MEASURE, out=tmp_path / "run", limit=1, progress=False)
    sk.score_zoo(task, MEASURE, out=tmp_path / "run", limit=1, progress=False)


def test_m_larger_than_n_is_a_failure_of_every_model(zoo_path):
    scores = sk.score_zoo(
        sk.load_zoo(zoo_path)["first"], sk.MSharpness(m=64, rho=0.1), progress=False
    )
    assert scores.frame().empty
    assert scores.failures["error"].str.contains("m = 64 is larger than n = 24").all()


def test_evaluate_gives_the_scores_of_the_scoring_function(zoo_path):
    zoo = sk.load_zoo(zoo_path)
    scores = sk.score_zoo(zoo, MEASURE, progress=False)
    table = sk.evaluate(scores, resamples=20)
    assert len(table) == 2 * 4
    row = table.query("task == 'second' and m == 4 and rho == 0.1").iloc[0]
    values = scores.frame().query("task == 'second' and m == 4 and rho == 0.1")
    measure = values.set_index("model")["value"]
    expected = sk.conditional_mutual_information(measure, zoo["second"])
    assert row["cmi_pgdl"] == pytest.approx(expected.score, abs=1e-14)
    assert row["models"] == 8
    again = sk.evaluate(scores, resamples=20)
    pd.testing.assert_frame_equal(table, again)


def test_evaluate_names_models_without_a_value(zoo_path):
    scores = sk.score_zoo(sk.load_zoo(zoo_path)["first"], MEASURE, limit=6, progress=False)
    with pytest.warns(UserWarning, match="m_sharpness has no value for 2 of 8 models.*: 15, 17"):
        table = sk.evaluate(scores, resamples=5)
    assert (table["models"] == 6).all()


def test_evaluate_says_which_measure_has_too_few_values(zoo_path):
    def rarely(model, data, *, seed):
        if sum(p.numel() for p in model.parameters()) > 40:
            raise ValueError("too large")
        return 1.0 + float(next(model.parameters()).detach().sum())

    scores = sk.score_zoo(sk.load_zoo(zoo_path)["first"], [MEASURE, rarely], progress=False)
    with pytest.warns(UserWarning, match="rarely has no value for 6 of 8.*leave too few"):
        table = sk.evaluate(scores, resamples=5)
    rows = table.set_index("measure")
    assert set(rows.index) == {"m_sharpness", "rarely"}
    assert rows.loc["rarely", "interval_note"] == "all: fewer than 3 models"
    assert np.isnan(rows.loc["rarely", "kendall_tau"])
    assert rows.loc["m_sharpness", "kendall_tau"].notna().all()
    lonely = sk.score_zoo(sk.load_zoo(zoo_path)["first"], rarely, progress=False)
    with (
        pytest.warns(UserWarning, match="leave too few"),
        pytest.raises(ScoreError, match="no measure has values for 3 models"),
    ):
        sk.evaluate(lonely, resamples=5)


def test_measures_may_ask_for_the_initial_weights(zoo_path):
    task = sk.load_zoo(zoo_path)["first"]
    distance = sk.measures.make_measure("distance_from_initial")
    frame = sk.score_zoo(task, distance, progress=False).frame()
    final, initial = (task["3"].load(w).state_dict() for w in ("final", "initial"))
    expected = sum(float((final[k] - initial[k]).square().sum()) for k in final) ** 0.5
    row = frame.query("model == '3' and form == 'euclidean'").iloc[0]
    assert row["value"] == pytest.approx(expected, rel=1e-5)


def test_evaluate_refuses_a_run_without_results(zoo_path):
    scores = sk.score_zoo(
        sk.load_zoo(zoo_path)["first"], sk.MSharpness(m=64, rho=0.1), progress=False
    )
    with pytest.raises(ScoreError, match="all 8 measurements failed"):
        sk.evaluate(scores)


def _score_command(zoo_path, run):
    return [
        *(sys.executable, "-m", "sharpkit", "score", str(zoo_path), "--out", str(run)),
        *("--m", "1,2,4,8", "--rho", "0.05,0.1,0.2", "--workers", "1"),
    ]


@pytest.mark.slow
def test_a_killed_process_leaves_a_run_that_goes_on_to_the_same_table(tmp_path):
    zoo_path = write_small_zoo(tmp_path / "zoo", tasks=("a", "b"), examples=400)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(_score_command(zoo_path, tmp_path / "whole"), check=True, env=environment)
    for enough in sorted(random.Random(0).sample(range(1, 13), 2)):
        process = subprocess.Popen(
            _score_command(zoo_path, tmp_path / "killed"),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while finished_models(tmp_path / "killed") < enough and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # it had not finished
    subprocess.run(_score_command(zoo_path, tmp_path / "killed"), check=True, env=environment)
    tables = [pd.read_csv(tmp_path / name / "scores.csv") for name in ("whole", "killed")]
    assert len(tables[0]) == 2 * 8 * 12
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_results_do_not_depend_on_the_order_of_the_models(zoo_path):
    task = sk.load_zoo(zoo_path)["first"]
    frame = sk.score_zoo(task, MEASURE, progress=False).frame()
    reversed_task = copy.copy(task)
    reversed_task._models = dict(reversed(task._models.items()))
    assert list(reversed_task) == list(task)[::-1]
    again = sk.score_zoo(reversed_task, MEASURE, progress=False).frame()
    pd.testing.assert_frame_equal(frame, again)


def test_a_subset_is_the_same_for_every_model_and_depends_on_the_seed(zoo_path):
    task = sk.load_zoo(zoo_path)["first"]
    seen = []

    def spy(model, data, *, seed):
        seen.append(data.tensors[0])
        return 1.0

    sk.score_zoo(task, spy, n=7, progress=False)
    assert all(torch.equal(seen[0], x) for x in seen)
    sk.score_zoo(task, spy, n=7, seed=5, limit=1, progress=False)
    assert not torch.equal(seen[0], seen[-1])
    assert np.isin(seen[-1].numpy(), task.dataset("train").tensors[0].numpy()).all()


def test_a_closed_run_still_prints(tmp_path):
    scores = sk.score_zoo(
        sk.embedded_zoo(), sk.MSharpness(m=1, rho=0.1), n=8, limit=1, out=tmp_path
    )
    assert repr(scores).startswith("Scores: 1 models, 1 measures, 1 values, 0 failures")
    scores.close()
    assert repr(scores) == f"Scores: {tmp_path / 'results.sqlite'}, closed"
    assert "closed" in scores._repr_html_()


def test_a_run_directory_has_its_values_as_a_table_with_a_legend(tmp_path):
    measures = [sk.MSharpness(m=[1, 2], rho=0.1), sk.measures.make_measure("training_loss")]
    scores = sk.score_zoo(sk.embedded_zoo(), measures, n=8, limit=2, out=tmp_path)
    table = pd.read_csv(tmp_path / "scores.csv", dtype={"model": str})
    pd.testing.assert_series_equal(table["value"], scores.frame()["value"])  # every digit
    assert "1,0.1," in (tmp_path / "scores.csv").read_text()  # m is a whole number
    legend = pd.read_csv(tmp_path / "scores_columns.csv")
    assert legend["column"].tolist() == list(table.columns)
    assert legend["meaning"].notna().all()
