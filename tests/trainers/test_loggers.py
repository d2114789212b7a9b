"""Rows go to TensorBoard, wandb and MLflow, and are read back with them."""

from __future__ import annotations

import pytest
import torch
from problems import examples, network

import sharpkit as sk


def tracked(logger):
    """Rows of three measurements; wandb's own count of steps is another."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = sk.Tracker(examples(), every=5, loggers=[logger])
    for step in range(0, 15, 5):
        tracker(model, optimizer, step=step)
        model[0].weight.data *= 1.1
    return tracker.frame()


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        frame = tracked(writer)
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    for name in ("loss", "lambda_max", "threshold"):
        events = read.Scalars(f"sharpness/{name}")
        assert [event.step for event in events] == [0, 5, 10]
        assert [event.value for event in events] == pytest.approx(frame[name].tolist(), rel=1e-6)


def test_wandb(tmp_path):
    import wandb

    with wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True)) as run:
        run.define_metric("sharpness/*", step_metric="sharpness/step")
        run.log({"of training": 1.0})
        frame = tracked(run)
        assert run.step == 4  # one of its own for each row
        summary = dict(run.summary)
    last = frame.iloc[-1]
    for name in ("step", "loss", "lambda_max", "threshold"):
        assert summary[f"sharpness/{name}"] == last[name]
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    with mlflow.start_run() as run:
        frame = tracked(mlflow)
    for name in ("loss", "lambda_max", "threshold"):
        read = mlflow.MlflowClient().get_metric_history(run.info.run_id, f"sharpness/{name}")
        assert [metric.step for metric in read] == [0, 5, 10]
        assert [metric.value for metric in read] == frame[name].tolist()
