"""The table of a run: what it says where values, hyperparameters or whole measures are missing."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import sharpkit as sk
from sharpkit.cli import main
from sharpkit.errors import ArgumentError, ScoreError
from sharpkit.evaluation import STATISTICS, cmi_null, rate_measures
from sharpkit.evaluation.legend import legend
from sharpkit.measures import make_measure
from sharpkit.runs.measure_values import column_direction, stated_directions
from sharpkit.runs.scores import Scores
from sharpkit.runs.store import Estimate, Outcome, Store
from sharpkit.runs.summary import summary

CONFIG = {"measures": {"up": {}}, "n": 8, "seed": 5}


def configs(models=16, hyperparameters=2):
    rng = np.random.default_rng(0)
    names = ("width", "depth")[:hyperparameters]
    return {
        f"{k}": {
            "hparams": {
                name: {"possible_values": [0, 1], "current_value": k // 2**j % 2}
                for j, name in enumerate(names)
            },
            "metrics": {"train_acc": 1.0, "test_acc": 0.9 - 0.01 * k + 0.02 * rng.random()},
        }
        for k in range(models)
    }


def scores(values, *, hyperparameters=2, failures=(), directions=None):
    """A run with these values: (measure, form) -> one per model; None is a failure."""
    store = Store(None, CONFIG)
    store.add_task("t", configs(hyperparameters=hyperparameters))
    store.set_directions(directions or {})
    for measure in dict.fromkeys(name for name, _ in values):
        for k in range(16):
            found = {
                "" if form is None else f"form={form}": Estimate(float(column[k]), 0.0)
                for (name, form), column in values.items()
                if name == measure and column[k] is not None
            }
            store.add("t", f"{k}", measure, Outcome(values=found) if found else Outcome(error="no"))
    for measure in failures:
        for k in range(16):
            store.add("t", f"{k}", measure, Outcome(error="RuntimeError: exploded"))
    return Scores(store)


RISING = [float(k) for k in range(16)]


def test_every_score_stands_beside_its_null():
    noisy = [k + 6 * np.sin(9.0 * k) for k in RISING]
    row = sk.evaluate(scores({("up", None): noisy}), resamples=200).iloc[0]
    null = cmi_null(dict(enumerate(noisy)), configs(), shuffles=200)
    assert row["cmi_pgdl"] == pytest.approx(null.value)
    assert row["cmi_pgdl_null_mean"] == pytest.approx(null.mean)
    assert row["cmi_pgdl_null_95"] == pytest.approx(null.percentile_95)
    assert row["cmi_pgdl_p_value"] == pytest.approx(null.p_value)
    assert row["cmi_pgdl_adjusted"] == pytest.approx((null.value - null.mean) / (1 - null.mean))
    assert (row["n"], row["seed"]) == (8, 5)


def test_a_measure_is_judged_in_its_own_direction():
    down = [-v for v in RISING]
    values = {
        ("up", None): RISING,
        ("margin", None): down,
        ("two", "a"): RISING,
        ("two", "b"): down,
    }
    noted = {"up": 1, "margin": -1, "two": {"a": 1, "b": -1}}
    table = sk.evaluate(scores(values, directions=noted), resamples=20)
    assert table["p_value"].max() < 0.01
    assert table["sign_error"].max() < 0.2
    assert dict(zip(table["form"].fillna(table["measure"]), table["direction"], strict=True)) == {
        "up": 1,
        "margin": -1,
        "a": 1,
        "b": -1,
    }
    blind = sk.evaluate(scores(values, directions=noted | {"margin": 1}), resamples=20)
    assert blind.loc[blind["measure"] == "margin", "p_value"].item() > 0.99


def test_directions_are_those_of_the_measures():
    def plain(model, data, *, seed):
        return 0.0

    class Own:
        name = "own"
        direction = -1

    measures = [sk.MSharpness(m=1, rho=0.1), make_measure("output_margin"), plain, Own()]
    measures.append(make_measure("effective_rank"))
    measures.append(make_measure("weight_spectrum"))
    found = stated_directions(dict(enumerate(measures)))
    assert [found[k] for k in range(5)] == [1, -1, 1, -1, None]
    assert found[5]["rand_distance"] == -1
    Own.direction = 0
    with pytest.raises(ArgumentError, match="expected 1, -1 or None"):
        stated_directions({"own": Own()})


def test_a_run_that_noted_no_directions_has_those_of_the_names():
    assert column_direction({}, "output_margin") == -1
    assert column_direction({}, "weight_spectrum", "rand_distance") == -1
    assert column_direction({}, "somebody's") is None


def test_score_models_and_score_zoo_note_the_directions():
    torch.manual_seed(0)
    data = torch.randn(8, 3), torch.tensor([0, 1] * 4)
    models = {f"{k}": nn.Linear(3, 2) for k in range(3)}
    margin = make_measure("output_margin")
    found = sk.score_models(models, margin, data, data, progress=False)
    assert found.directions == {"output_margin": -1}
    zoo = sk.score_zoo(sk.embedded_zoo(), margin, n=8, limit=1, progress=False)
    assert zoo.directions == {"output_margin": -1}


def test_columns_with_too_few_values_are_rows_of_nan_with_the_reason():
    poor = [1.0, 2.0, *[None] * 14]
    with pytest.warns(UserWarning, match="leave too few"):
        table = sk.evaluate(scores({("up", None): RISING, ("poor", None): poor}), resamples=20)
    row = table.set_index("measure").loc["poor"]
    assert (row["models"], row["interval_note"]) == (2, "all: fewer than 3 models")
    assert row[list(STATISTICS)].isna().all()
    assert table.set_index("measure").loc["up", "kendall_tau"] > 0.9


def test_a_measure_that_failed_on_every_model_is_a_row_with_its_error():
    run = scores({("up", None): RISING}, failures=["broken"])
    table = sk.evaluate(run, resamples=20).set_index("measure")
    note = table.loc["broken", "interval_note"]
    assert note == "all: failed on all 16 models: RuntimeError: exploded"
    assert table.loc["broken", "models"] == 0
    assert table["models"].dtype.kind == "i"


def test_a_run_in_which_everything_failed_says_so():
    with pytest.raises(ScoreError, match=r"^all 16 measurements failed.*RuntimeError: exploded"):
        sk.evaluate(scores({}, failures=["broken"]))
    with pytest.raises(ScoreError, match="no results yet"):
        sk.evaluate(scores({}))
    with pytest.warns(UserWarning), pytest.raises(ScoreError, match="for 3 models or more"):
        sk.evaluate(scores({("poor", None): [1.0, *[None] * 15]}))


@pytest.mark.parametrize("hyperparameters", [0, 1])
def test_without_two_hyperparameters_there_is_no_infinite_score(hyperparameters):
    run = scores({("up", None): RISING}, hyperparameters=hyperparameters)
    with pytest.warns(UserWarning, match="not defined with fewer than two.*kendall_tau") as told:
        table = sk.evaluate(run, resamples=20)
    assert len(told) == 1
    assert np.isnan(table["cmi_pgdl"].item())
    assert not np.isinf(table.select_dtypes("number").to_numpy(float, na_value=np.nan)).any()
    assert "fewer than two hyperparameters" in table["interval_note"].item()
    text = summary(table)
    assert "inf" not in text.replace("information", "")
    assert "kendall_tau" in text
    assert "cmi_pgdl: fewer than two hyperparameters" in text


def test_the_summary_shows_each_score_beside_its_null():
    text = summary(sk.evaluate(scores({("up", None): RISING}), resamples=20))
    head = text.splitlines()[1].split()
    assert head[:3] == ["measure", "models", "cmi_pgdl"]
    for name in ("interval", "noise", "p", "adjusted"):
        assert name in head
    assert head.index("noise") > head.index("cmi_pgdl")


def test_the_legend_knows_every_column():
    table = sk.evaluate(scores({("up", None): RISING}), resamples=20)
    assert set(legend(table)["meaning"]) & {"", "setting of the measure"} == set()
    assert set(rate_measures(pd.DataFrame({"x": RISING}), configs(), resamples=9)) <= set(
        legend(table)["column"]
    )


@pytest.fixture(scope="module")
def run_on_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    measure = sk.MSharpness(m=[1, 4], rho=0.1)
    sk.score_zoo(sk.embedded_zoo(), measure, n=8, out=folder, limit=12, progress=False).close()
    return folder


def test_evaluation_on_the_command_line(run_on_disk):
    result = CliRunner().invoke(main, ["evaluate", str(run_on_disk), "--resamples", "20"])
    assert result.exit_code == 0, result.output
    table = pd.read_csv(run_on_disk / "evaluation.csv")
    columns = pd.read_csv(run_on_disk / "evaluation_columns.csv")
    assert columns["column"].tolist() == list(table.columns)
    text = (run_on_disk / "evaluation.csv").read_text()
    assert ",1,0.1," in text  # m is a whole number
    numbers = [cell.replace(".", "") for cell in text.split(",")]
    assert max(len(digits.lstrip("0")) for digits in numbers if digits.isdigit()) == 6


def test_an_unknown_statistic_or_ending_is_told_before_anything_is_computed(run_on_disk):
    result = CliRunner().invoke(main, ["plot", str(run_on_disk), "--statistic", "tau"])
    assert result.exit_code == 2
    for name in STATISTICS:
        assert name in result.output
    result = CliRunner().invoke(main, ["plot", str(run_on_disk), "--out", "p.xyz"])
    assert result.exit_code == 1
    (line,) = result.output.strip().splitlines()
    assert ".png" in line


@pytest.mark.skipif(os.name != "posix", reason="pipes of a shell")
def test_a_reader_that_has_seen_enough_ends_the_command_quietly(run_on_disk):
    command = f"{sys.executable} -m sharpkit evaluate {run_on_disk} --resamples 9"
    piped = f"set -o pipefail; {command} | (exec 0<&-; true)"
    found = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, check=False)
    assert "roken pipe" not in found.stderr
    assert found.returncode == 0, found.stderr
