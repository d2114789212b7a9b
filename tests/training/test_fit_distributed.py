"""Two processes share every batch: the same weights as one process with their shares as groups."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from fits import fit, images, network, same_weights
from torch import distributed, multiprocessing, nn

import sharpkit as sk
from sharpkit.errors import ArgumentError
from sharpkit.training.parallel import Ranks

pytestmark = pytest.mark.slow
RANKS = 2
SHARED = {"epochs": 3}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # two processes; one
    "sam": ({"optimizer": "sam"}, {"optimizer": "sam", "m": 8}),
    "sam, m=4": ({"optimizer": "sam", "m": 4}, {"optimizer": "sam", "m": 4}),
    "sam in some steps": (
        {"optimizer": "sam", "sam_interval": 2, "m": 4},
        {"optimizer": "sam", "sam_interval": 2, "m": 4},
    ),
    # a BatchNorm of the share, a step of SGD: SAM without a radius
    "sgd": ({}, {"optimizer": "sam", "m": 8, "rho": 0.0}),
}


def quiet_network():
    """Without dropout, whose masks differ between processes; in float64."""
    return network(noisy=False).double()


class Stopping(sk.Tracker):
    """Ends the training in its second epoch."""

    def __call__(self, *args: Any, step: int, **given: Any) -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return super().__call__(*args, step=step, **given)


def tracked(out: Path, *, together: bool) -> list[dict[str, float]]:
    """The rows of a training that is stopped and goes on."""
    data = sk.DistributedData(images()) if together else images()
    for kind in (Stopping, sk.Tracker) if together else (sk.Tracker,):
        tracker = kind(data, measures=["loss", "lambda_max"], every=3, n=20)
        with suppress(KeyboardInterrupt):
            fit(out, quiet_network(), epochs=2, track=tracker)
    return [{k: v for k, v in row.items() if k != "seconds"} for row in tracker.rows]


def network_of(name: str) -> nn.Module:
    """A plain step has a BatchNorm of the share, which one process has no step for."""
    model = quiet_network()
    if name == "sam in some steps":
        model[1] = nn.GroupNorm(2, 4).double()
    return model


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    weights = {}
    for name, (settings, _) in CASES.items():
        out = Path(folder) / "runs" / name
        model = fit(out, network_of(name), **SHARED, **settings).model
        weights[name] = model.state_dict()
    # a training that stops and goes on, with dropout
    again = Path(folder) / "runs" / "again"
    whole = fit(None, network(), epochs=2).model
    for _ in range(2):
        result = fit(again, network(), epochs=2)
    weights["resumed"] = same_weights(whole, result.model)
    try:
        fit(None, network(), batch_size=15)
    except ArgumentError as error:
        weights["odd"] = str(error)
    weights["rows"] = tracked(Path(folder) / "tracked", together=True)
    weights["rows of one"] = tracked(Path(folder) / "plain", together=False)
    torch.save(weights, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (str(path),), nprocs=RANKS)
    return path


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one_whose_groups_are_their_shares(folder, name):
    expected = fit(None, network_of(name), **SHARED, **CASES[name][1]).model.state_dict()
    for rank in range(RANKS):
        found = torch.load(folder / f"{rank}.pt")[name]
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_their_history_is_that_of_the_whole_sets(folder, name):
    expected = fit(None, network_of(name), **SHARED, **CASES[name][1]).history
    found = pd.read_csv(folder / "runs" / name / "log.csv")
    assert ("perturbed" in found) == (name != "sgd")
    columns = [column for column in expected if column != "seconds" and column in found]
    pd.testing.assert_frame_equal(found[columns], expected[columns], rtol=1e-9)


def test_a_finished_run_and_an_uneven_batch(folder):
    for rank in range(RANKS):
        found = torch.load(folder / f"{rank}.pt")
        assert found["resumed"]
        assert "batch_size is 15: 2 processes" in found["odd"]


def test_a_tracker_on_every_rank_has_the_rows_of_one_on_rank_0(folder):
    found = [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
    assert found[0]["rows"] == found[1]["rows"]
    assert len(found[0]["rows"]) == 3
    frames = [pd.DataFrame(found[0][name]) for name in ("rows", "rows of one")]
    pd.testing.assert_frame_equal(*frames, rtol=1e-9)
    written = pd.read_csv(folder / "tracked" / "tracking.csv")
    pd.testing.assert_frame_equal(written[list(frames[0])], frames[0])


def test_shares_cover_everything_once():
    for total in (1, 5, 12):
        shares = [Ranks(rank, 5).share(total) for rank in range(5)]
        items = [i for share in shares for i in range(total)[share]]
        assert items == list(range(total))


def test_torchrun_starts_the_command(tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "sharpkit", "train", "embedded", "--arch", "vgg-4x1", "--epochs", "1"]
    command += ["--batch-size", "500", "--optimizer", "sam", "--lr", "0.05"]
    command += ["--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model.safetensors: accuracy") == 1
    train, test = sk.load_dataset("embedded")
    model = sk.build_architecture("vgg-4x1", (1, 14, 14), 10, seed=0)
    alone = sk.fit(
        model, train, test, epochs=1, batch_size=500, optimizer="sam", m=250, lr=0.05,
        progress=False,
    )  # fmt: skip
    found = pd.read_csv(tmp_path / "run" / "log.csv")
    assert found["test_loss"].iloc[-1] == pytest.approx(alone.history["test_loss"].iloc[-1], 1e-5)
