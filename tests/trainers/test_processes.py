"""Two processes: each has an ε of its own, both have the same weights, one of them tracks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import sentences
import torch
from problems import close, examples, micro_batches, network, sam_by_hand, same, weights
from torch import multiprocessing, nn
from torch.utils.data import DistributedSampler

import sharpkit as sk

RANKS, STEPS = 2, 3
HERE = Path(__file__).parent


def trained(accelerator, rank: int) -> dict:
    """Weights after each loop, and how many rows the tracker has."""
    from recipes import accelerate_loop, plain_loop

    model = network()
    optimizer = sk.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    track = sk.Tracker(examples(), every=1, measures=["loss", "lambda_max"])
    for step, micro in enumerate(micro_batches(RANKS, batch=4)[:STEPS], start=1):
        accelerate_loop.train_step(accelerator, model, optimizer, [micro[rank]], clip=0.5)
        if accelerator.is_main_process:
            track(model, optimizer, step=step)
    own = nn.parallel.DistributedDataParallel(network())
    optimizer = sk.SAM(own.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    for micro in micro_batches(2 * RANKS, batch=4):
        plain_loop.train_step(own, optimizer, micro[rank::RANKS], clip=0.5)
    ends = {"accelerate": weights(accelerator.unwrap_model(model)), "own loop": weights(own)}
    return {"ends": ends, "rows": len(track.rows)}


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == RANKS
    torch.save(trained(accelerator, rank), f"{folder}/{rank}.pt")
    accelerator.free_memory()  # a model that outlives its process group may wait for it for ever
    accelerator.end_training()


def test_accelerate_and_a_loop_of_ones_own_in_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, str(tmp_path)), nprocs=RANKS)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    steps = micro_batches(RANKS, batch=4)[:STEPS], micro_batches(2 * RANKS, batch=4)
    for name, made in zip(("accelerate", "own loop"), steps, strict=True):
        expected = weights(sam_by_hand(network(), made, clip=0.5, ranks=RANKS))
        assert same(found[0]["ends"][name], found[1]["ends"][name]), name
        assert close(found[0]["ends"][name], expected), name
    assert [f["rows"] for f in found] == [STEPS, 0]


def started(folder: Path, *command: str) -> list[dict]:
    """What each process left, after a command that starts them all."""
    path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command, str(folder)], env=environment, check=True)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def assert_one_process_tracked(found: list[dict], folder: Path, expected: dict) -> None:
    """The first has the rows, of its own examples; a resumed training has those of a whole one."""
    drop = {"columns": "seconds"}
    whole, again = (pd.DataFrame(found[0][name]).drop(**drop) for name in ("rows", "again"))
    pd.testing.assert_frame_equal(again, whole)
    files = [pd.read_csv(folder / f"{name}.csv").drop(**drop) for name in ("whole", "again")]
    for file in files:
        pd.testing.assert_frame_equal(file, whole, check_dtype=False)
    assert not found[1]["rows"] and not found[1]["again"]
    last = whole.iloc[-1]
    assert {name: last[name] for name in expected} == pytest.approx(expected, rel=1e-3)


def test_lightning_in_two_processes(tmp_path):
    """It deals out the examples itself, in another order each epoch."""
    found = started(tmp_path, str(HERE / "lightning_in_processes.py"))
    x, y = examples()
    shards = []
    for epoch in range(2):
        dealt = [DistributedSampler(range(32), RANKS, rank, seed=0) for rank in range(RANKS)]
        for sampler in dealt:
            sampler.set_epoch(epoch)
        mine = [torch.tensor(list(sampler)).split(4) for sampler in dealt]
        shards += [(x[i], y[i]) for batches in zip(*mine, strict=True) for i in batches]
    one, two = ([shards[i : i + of] for i in range(0, len(shards), of)] for of in (2, 4))
    by_hand = {
        "automatic": sam_by_hand(network(), one, ranks=RANKS),
        "resumed": sam_by_hand(network(), one, ranks=RANKS),
        "clipped": sam_by_hand(network(), one, clip=0.3, ranks=RANKS),
        "manual": sam_by_hand(network(), two, clip=0.3, ranks=RANKS),
    }
    for name, expected in by_hand.items():
        assert same(found[0]["ends"][name], found[1]["ends"][name]), name
        assert close(found[0]["ends"][name], weights(expected)), name
    assert same(found[0]["ends"]["automatic"], found[0]["ends"]["resumed"])
    loss = nn.functional.cross_entropy(by_hand["automatic"](x), y)
    assert_one_process_tracked(found, tmp_path, {"step": 8, "loss": float(loss)})


def test_the_trainer_of_hugging_face_in_two_processes(tmp_path):
    """It deals out batches in turn."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}")
    found = started(tmp_path, *launcher, str(HERE / "hugging_face_in_processes.py"))
    one = sentences.by_hand(1, 0.3, ranks=RANKS)
    by_hand = {"automatic": one, "resumed": one, "accumulated": sentences.by_hand(3, 0.3, ranks=2)}
    for name, expected in by_hand.items():
        assert same(found[0]["ends"][name], found[1]["ends"][name]), name
        assert close(found[0]["ends"][name], weights(expected)), name
    assert same(found[0]["ends"]["automatic"], found[0]["ends"]["resumed"])
    inputs, labels = sentences.sentences()
    loss = nn.functional.cross_entropy(one.eval()(**inputs).logits, labels)
    assert_one_process_tracked(found, tmp_path, {"step": 3, "loss": float(loss)})
