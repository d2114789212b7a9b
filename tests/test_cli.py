"""The command line, as a user types it."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from zoos import write_small_zoo

import sharpkit.cli
from sharpkit.cli import main


@pytest.fixture(scope="module")
def zoo_path(tmp_path_factory):
    return str(write_small_zoo(tmp_path_factory.mktemp("zoo"), tasks=("first", "second")))


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def commands(group=main, prefix=()):
    for name, command in group.commands.items():
        yield (*prefix, name)
        if hasattr(command, "commands"):
            yield from commands(command, (*prefix, name))


@pytest.mark.parametrize("command", [(), *commands()], ids=" ".join)
def test_every_command_explains_itself_with_an_example(command):
    text = run(*command, "--help")
    assert "Usage:" in text
    if command != ("zoo",):
        assert "Example:" in text


def test_from_zoo_to_figure(zoo_path, tmp_path):
    out = tmp_path / "run"
    text = run("score", zoo_path, "--out", out, "--m", "1,4,24", "--rho", "0.1")
    assert "8 models scored" in text
    scores = pd.read_csv(out / "scores.csv")
    assert len(scores) == 2 * 8 * 3
    text = run("evaluate", out, "--resamples", 20)
    assert "cmi_pgdl" in text
    table = pd.read_csv(out / "evaluation.csv")
    assert table["m"].tolist() == [1, 4, 24] * 2
    (out / "evaluation.csv").unlink()
    run("plot", out, "--resamples", 20, "--out", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    plotted = pd.read_csv(tmp_path / "figure.csv")
    assert sorted(plotted["cmi_pgdl"]) == sorted(table["cmi_pgdl"])
    assert not (out / "evaluation.csv").exists()  # that table is of `evaluate` alone


@pytest.mark.slow
def test_plot_weights_pairs_by_the_test_size_as_evaluate_does(zoo_path, tmp_path):
    out = tmp_path / "run"
    run("score", zoo_path, "--task", "first", "--out", out, "--m", "1,4", "--rho", "0.1")
    size = ("--resamples", 9, "--test-size", 1000)
    run("evaluate", out, *size)
    run("plot", out, *size, "--statistic", "sign_error", "--out", tmp_path / "figure.png")
    run("plot", out, "--resamples", 9, "--out", tmp_path / "unweighted.png")
    names = (out / "evaluation.csv", tmp_path / "figure.csv", tmp_path / "unweighted.csv")
    table, plotted, unweighted = (pd.read_csv(path)["sign_error"].tolist() for path in names)
    assert plotted == table
    assert unweighted != table


@pytest.mark.slow
def test_score_takes_tasks_limits_and_subsets(zoo_path, tmp_path):
    out = tmp_path / "run"
    arguments = ("score", zoo_path, "--out", out, "--m", "2", "--task", "second", "--n", 10)
    run(*arguments, "--limit", 2)
    scores = pd.read_csv(out / "scores.csv")
    assert scores["task"].tolist() == ["second"] * 2
    run(*arguments)
    assert len(pd.read_csv(out / "scores.csv")) == 8
    text = run("score", zoo_path, "--out", out, "--m", "2", code=1)
    assert "another configuration" in text


def test_score_takes_stacks_which_the_run_keeps(zoo_path, tmp_path):
    arguments = ("score", zoo_path, "--task", "first", "--m", "1,4", "--backend", "inline")
    run(*arguments, "--out", tmp_path / "run", "--stack", 2, "--limit", 4)
    run(*arguments, "--out", tmp_path / "run")
    run(*arguments, "--out", tmp_path / "alone")
    found, expected = (pd.read_csv(tmp_path / name / "scores.csv") for name in ("run", "alone"))
    pd.testing.assert_frame_equal(found, expected, rtol=1e-3, atol=1e-6)
    text = run(*arguments, "--out", tmp_path / "run", "--stack", 3, code=1)
    assert "stack: 2 there, 3 now" in text


def test_score_takes_measures_by_name(zoo_path, tmp_path):
    names = "m_sharpness,path_norm,max_eigenvalue"
    arguments = ("score", zoo_path, "--task", "first", "--m", "1", "--limit", 2)
    run(*arguments, "--out", tmp_path / "run", "--measures", names)
    scores = pd.read_csv(tmp_path / "run" / "scores.csv")
    assert set(scores["measure"]) == set(names.split(","))
    text = run(*arguments, "--out", tmp_path / "run", "--measures", "luck", code=1)
    assert "no measure 'luck'" in text
    assert "path_norm" in text


def test_a_run_is_exported_with_its_provenance(zoo_path, tmp_path):
    arguments = ("score", zoo_path, "--task", "first", "--m", "1", "--limit", 2)
    run(*arguments, "--out", tmp_path / "run", "--backend", "inline")
    run("export", tmp_path / "run", "--out", tmp_path / "all.csv")
    table = pd.read_csv(tmp_path / "all.csv")
    assert len(table) == 2
    assert table["weights_hash"].str.len().eq(64).all()
    text = run("export", tmp_path / "run", "--out", tmp_path / "all.txt", code=1)
    assert "ends in .csv or .parquet" in text


def test_info_lists_models_and_finds_what_is_broken(zoo_path, tmp_path):
    text = run("zoo", "info", zoo_path, "--deep", "--csv", tmp_path / "models.csv")
    assert "16 rows, 0 with problems" in text
    table = pd.read_csv(tmp_path / "models.csv")
    assert table["generalization_gap"].notna().all()
    broken = write_small_zoo(tmp_path / "broken")
    (broken / "input_data/small/model_3/weights.hdf5").write_bytes(b"")
    text = run("zoo", "info", broken, code=1)
    assert "1 with problems" in text
    assert "weights.hdf5" in text


def test_a_failing_model_shows_in_the_exit_code(tmp_path):
    broken = write_small_zoo(tmp_path / "broken")
    path = broken / "input_data/small/model_3/config.json"
    config = json.loads(path.read_text())
    config["model_config"][0]["unknown_keyword"] = 1
    path.write_text(json.dumps(config))
    text = run("score", broken, "--out", tmp_path / "run", "--m", "1", code=1)
    assert "failed: small model 3" in text
    assert "unknown_keyword" in text
    assert len(pd.read_csv(tmp_path / "run" / "scores.csv")) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zoo", "info", "/nowhere"), "/nowhere"),
        (("score", "/nowhere", "--out", "x"), "/nowhere"),
        (("evaluate", "/nowhere"), "not a run directory"),
        (("plot", "/nowhere"), "not a run directory"),
    ],
)
def test_errors_are_one_line_that_tells_what_to_do(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = run(*arguments, code=1)
    assert text.startswith("error: ")
    assert message in text
    assert text.count("\n") == 1
    assert "Traceback" not in text
    with pytest.raises(sharpkit.errors.SharpkitError):
        CliRunner().invoke(main, ["--debug", *arguments], catch_exceptions=False)


@pytest.mark.parametrize(
    "option", [("--m", "1,x"), ("--m", "0"), ("--rho", "-1"), ("--device", "abacus"), ("--n", "0")]
)
def test_bad_options_are_refused(zoo_path, tmp_path, option):
    result = CliRunner().invoke(main, ["score", zoo_path, "--out", str(tmp_path / "r"), *option])
    assert result.exit_code != 0
    assert "Traceback" not in result.output


def test_an_unknown_task_names_those_there_are(zoo_path, tmp_path):
    text = run("score", zoo_path, "--out", tmp_path / "r", "--task", "third", code=1)
    assert "first, second" in text


def test_names_of_a_zoo_do_nothing_to_a_terminal_or_a_spreadsheet(tmp_path):
    task = "=1+1\x1b[2J"
    zoo = write_small_zoo(tmp_path / "zoo", tasks=(task, "other"))
    (zoo / "input_data" / task / "model_3" / "weights.hdf5").write_bytes(b"damaged")
    out = tmp_path / "run"
    texts = [
        run("zoo", "info", zoo, "--csv", tmp_path / "info.csv", code=1),
        run("score", zoo, "--out", out, "--m", "1,4", "--backend", "inline", code=1),
        run("evaluate", out, "--resamples", 20),
        run("evaluate", out, "--resamples", 20, "--target", "test_acc"),
        run("score", zoo, "--out", out, "--task", "third", code=1),
        run("spectrum", zoo, "--out", tmp_path / "s", code=1),
        run("spectrum", zoo, "--out", tmp_path / "s", "--task", task, code=1),
    ]
    run("export", out, "--out", tmp_path / "all.csv")
    for text in texts:
        assert "\x1b" not in text
        assert "=1+1\\x1b[2J" in text
    for path in [*out.glob("*.csv"), tmp_path / "info.csv", tmp_path / "all.csv"]:
        assert "\x1b" not in path.read_text()
        cells = pd.read_csv(path, dtype=str).fillna("").to_numpy().ravel()
        assert not [cell for cell in cells if cell.startswith("=")]
    assert "'=1+1\\x1b[2J" in (out / "scores.csv").read_text()


def test_an_interrupt_tells_how_to_go_on(zoo_path, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sharpkit.runs.choosing.score_zoo", interrupted)
    text = run("score", zoo_path, "--out", tmp_path / "r", code=130)
    assert "the same command goes on" in text


def test_spectrum_of_models_of_a_zoo(zoo_path, tmp_path):
    out = tmp_path / "spectra"
    arguments = ("spectrum", zoo_path, "--task", "first", "--out", out, "--steps", 10)
    text = run(*arguments, "--model", 3, "--model", 5)
    assert "model 3" in text
    for name in ("spectrum.png", "density.csv", "nodes.csv", "summary.json"):
        assert (out / name).stat().st_size > 0
    assert set(json.loads((out / "summary.json").read_text())["models"]) == {"model 3", "model 5"}
    assert "no model '4' in first" in run(*arguments, "--model", 4, code=1)
    assert "name one or more models of first: 3, 5" in run(*arguments, code=1)
    assert "name one: first, second" in run(
        "spectrum", zoo_path, "--model", 3, "--out", out, code=1
    )
    assert "either a zoo" in run("spectrum", "--out", out, code=2)


def test_spectrum_of_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "builders.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Linear(4, 3)\n"
    )
    for k in range(2):
        torch.manual_seed(k)
        torch.save(torch.nn.Linear(4, 3).state_dict(), tmp_path / f"epoch{k}.pt")
    x, y = np.random.default_rng(0).normal(size=(9, 4)), np.arange(9) % 3
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y)
    files = ("--checkpoint", "epoch0.pt", "--checkpoint", "epoch1.pt")
    arguments = ("spectrum", *files, "--out", "spectra", "--steps", 8)
    text = run(*arguments, "--build", "builders:build", "--data", "data.npz")
    assert "epoch0" in text
    assert "epoch1" in text
    assert "needs --build" in run(*arguments, code=1)


def test_all_measures_leave_out_what_no_model_has(zoo_path):
    from sharpkit.measures import MSharpness
    from sharpkit.measures.catalog import chosen_measures
    from sharpkit.runs.choosing import traits_of_tasks
    from sharpkit.zoo import load_zoo

    suits = traits_of_tasks(load_zoo(zoo_path))
    assert not suits["attention"]  # in a zoo of CNNs
    names = {m.name for m in chosen_measures("all", MSharpness(m=1, rho=0.1), **suits)}
    assert "geodesic_sharpness" not in names and "perturbation_response" in names
    # asked for by name, it is there
    assert chosen_measures("geodesic_sharpness", MSharpness(m=1, rho=0.1), **suits)
