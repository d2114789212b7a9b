"""The commands for a user's own models: `sharpness` and `score --checkpoint`."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

import sharpkit as sk
from sharpkit.cli import main

X = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
Y = np.arange(12) % 3


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def network(k):
    torch.manual_seed(k)
    return torch.nn.Linear(4, 3)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with two checkpoints, the code that builds them, and data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Linear(4, 3)\n\n"
        "def loss(outputs, labels):\n    return outputs.logsumexp(1).mean()\n"
    )
    for k in range(2):
        torch.save(network(k).state_dict(), tmp_path / f"net{k}.pt")
    np.savez(tmp_path / "data.npz", x_train=X, y_train=Y, x_test=X[::-1].copy(), y_test=Y)
    return tmp_path


FILES = ("--build", "my_nets:build", "--data", "data.npz")


def direct(k, **options):
    data = torch.from_numpy(X), torch.from_numpy(Y)
    return sk.m_sharpness(network(k), data, progress=False, **options)


def test_the_sharpness_of_one_model(here):
    text = run("sharpness", "net0.pt", *FILES, "--m", "1,4", "--rho", 0.1, "--out", "t.csv")
    table = pd.read_csv(here / "t.csv")
    expected = direct(0, m=[1, 4], rho=[0.1]).frame()
    assert table["model"].tolist() == ["net0", "net0"]
    assert table["value"].tolist() == pytest.approx(expected["value"].tolist(), rel=1e-12)
    assert "ModelComparison" not in text


def test_two_models_are_compared(here):
    text = run("sharpness", "net0.pt", "net1.pt", *FILES, "--m", 1, "--rho", 0.1)
    both = [direct(k, m=1, rho=0.1).value for k in (0, 1)]
    assert "ModelComparison: net0 − net1" in text
    for value in [*both, both[0] - both[1]]:
        assert f"{value:.4g}" in text


def test_a_loss_from_the_users_own_module(here):
    text = run(
        "sharpness", "net0.pt", *FILES, "--m", 2, "--rho", 0.1, "--loss", "my_nets:loss"
    )  # fmt: skip
    found = direct(0, m=2, rho=0.1, loss=lambda outputs, labels: outputs.logsumexp(1).mean())
    assert f"{found.value:.4g}" in text


def test_a_run_of_sharpkit_train_needs_no_more(here):
    run("train", "embedded", "--arch", "nin-4x1", "--epochs", 1, "--lr", 0.05, "--out", "run")
    text = run("sharpness", "run", "--m", 4, "--rho", 0.1, "--n", 8)
    assert "run" in text and " 4 " in text


def test_own_checkpoints_are_scored_and_evaluated(here):
    files = ("--checkpoint", "net0.pt", "--checkpoint", "net1.pt")
    options = ("--m", "1,4", "--rho", 0.1, "--measures", "m_sharpness,training_loss")
    text = run("score", *files, *FILES, "--out", "run", *options)
    assert "2 models scored" in text
    table = pd.read_csv(here / "run" / "scores.csv")
    for k in (0, 1):
        rows = table[(table["model"] == f"net{k}") & (table["m"] == 4)]
        assert rows["value"].item() == pytest.approx(
            direct(k, m=[1, 4], rho=[0.1]).value[1, 0], rel=1e-12
        )
    metrics = sk.Scores.open(here / "run").metrics()
    assert {"train_acc", "test_acc"} <= set(metrics)


def test_a_regression_is_scored_from_the_shell(here):
    np.savez("r.npz", x_train=X, y_train=X[:, :3], x_test=X, y_test=X[:, :3])
    run(
        "score", "--checkpoint", "net0.pt", "--build", "my_nets:build", "--data", "r.npz",
        "--loss", "mse", "--m", 2, "--rho", 0.1, "--out", "run",
    )  # fmt: skip
    metrics = sk.Scores.open(here / "run").metrics()
    expected = (network(0)(torch.from_numpy(X)) - torch.from_numpy(X[:, :3])).square().sum(1)
    assert metrics["train_loss"].item() == pytest.approx(0.5 * expected.mean().item(), rel=1e-6)
    assert "loss_gap" in metrics


def test_what_cannot_be_is_said(here):
    score = ("score", "--out", "run", "--m", 1)
    assert "either the PATH of a zoo, or --checkpoint" in run(*score, code=2)
    assert "either the PATH" in run(*score, "embedded", "--checkpoint", "net0.pt", code=2)
    workers = (*score, "--checkpoint", "net0.pt", *FILES, "--workers", 2)
    assert "--workers is for zoos" in run(*workers, code=2)
    assert "net0.pt is not from `sharpkit train`" in run("sharpness", "net0.pt", code=1)
    assert "no such checkpoint" in run("sharpness", "gone.pt", *FILES, code=1)


def test_a_run_in_which_all_fails_says_so_first(here):
    arguments = ("score", "--checkpoint", "net0.pt", *FILES, "--out", "run", "--loss", "mse")
    text = run(*arguments, "--m", 1, code=1)
    assert text.startswith("warning: nothing could be scored")


def test_another_target_is_evaluated_with_its_regret(tmp_path):
    from zoos import write_small_zoo

    zoo, out = write_small_zoo(tmp_path / "zoo"), tmp_path / "run"
    run("score", zoo, "--out", out, "--m", "1,4", "--rho", 0.1, "--backend", "inline")
    text = run("evaluate", out, "--target", "test_acc", "--resamples", 20)
    assert "test_acc lost by picking" in text
    table = pd.read_csv(out / "evaluation_test_acc.csv")
    assert (table["direction"] == -1).all() and (table["target"] == "test_acc").all()
    regret = pd.read_csv(out / "regret_test_acc.csv")
    assert regret["regret"].between(0, 1).all() and len(regret) == 2
    assert "expected one of train_acc" in run("evaluate", out, "--target", "f1", code=1)


class Attention(torch.nn.Module):
    """A classifier of sequences (n, 4, 4)."""

    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_all_measures_know_attention_where_a_model_has_it(here, monkeypatch):
    given = {}
    monkeypatch.setattr(
        "sharpkit.runs.choosing.score_models",
        lambda models, measures, *a, **k: given.update({"m": measures}),
    )
    monkeypatch.setattr(sys.modules["sharpkit.cli.score"], "_finish", lambda *a: None)
    torch.save(Attention().state_dict(), "attention.pt")
    (here / "their_nets.py").write_text("from test_cli_own_models import Attention as build\n")
    common = ("--data", "data.npz", "--out", "run", "--measures", "all", "--m", "1")
    for name, build, there in (("attention", "their_nets", True), ("net0", "my_nets", False)):
        run("score", "--checkpoint", f"{name}.pt", "--build", f"{build}:build", *common)
        names = {m.name for m in given["m"]}
        assert ("geodesic_sharpness" in names) == there
        assert not names & {"augmented_margin", "augmentation_inconsistency", "training_steps"}


def test_a_pattern_with_a_table_is_a_zoo(here):
    rows = []
    for k in range(4):
        torch.save(network(k).state_dict(), here / f"net{k}.pt")
        rows.append(
            {"file": f"net{k}.pt", "lr": 0.1 * k, "train_acc": 1.0, "accuracy": 0.9 - k / 9}
        )
    pd.DataFrame(rows).to_csv("runs.csv", index=False)
    table = ("*.pt", "--table", "runs.csv", "--build", "my_nets:build")
    text = run("zoo", "info", *table, "--column", "test_acc=accuracy")
    assert "4 rows, 0 with problems" in text and "taken as path 'file'" in text
    score = ("score", *table, "--data", "data.npz", "--m", 1, "--rho", 0.1, "--out", "run")
    assert "no column is test_acc" in run(*score, code=1)
    run(
        *score,
        "--column",
        "test_acc=accuracy",
        "--hyperparameters",
        "lr",
        "--workers",
        2,
        "--test-metrics",
    )
    values = sk.Scores.open(here / "run").frame().set_index("model")["value"]
    for k in range(4):
        assert values[f"net{k}"] == pytest.approx(direct(k, m=1, rho=0.1).value, rel=1e-12)
    assert sk.Scores.open(here / "run").metrics()["test_ece"].notna().all()
    assert "kendall_tau" in run("evaluate", "run", "--resamples", 20)
    (here / "net2.pt").write_bytes(b"broken")
    assert "1 with problems" in run("zoo", "info", *table, "--column", "test_acc=accuracy", code=1)


def test_options_of_a_table_without_one_are_refused(here):
    score = ("score", "--out", "run", "--m", 1)
    assert "give --table" in run(*score, "*.pt", *FILES, code=2)
    assert "expected ROLE=NAME" in run(*score, "*.pt", "--column", "accuracy", code=2)
    both = (*score, "--checkpoint", "net0.pt", *FILES, "--table", "runs.csv")
    assert "--checkpoint computes accuracies" in run(*both, code=2)
    assert "needs table= (--table) as well" in run(*score, "*.pt", code=1)


def test_test_metrics_of_own_checkpoints_are_targets(here):
    files = [p for k in (0, 1) for p in ("--checkpoint", f"net{k}.pt")]
    run("score", *files, *FILES, "--out", "run", "--m", 1, "--test-metrics")
    metrics = sk.Scores.open(here / "run").metrics()
    assert metrics[["test_ece", "test_nll", "test_brier"]].notna().all(axis=None)
