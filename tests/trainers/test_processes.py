"""Two processes: each has an ε of its own, and the weights stay the same on both."""

from __future__ import annotations

import os
import socket

import torch
from problems import close, examples, micro_batches, network, weights
from torch import multiprocessing, nn

RANKS, STEPS = 2, 3


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    from accelerate import Accelerator
    from recipes.accelerate_loop import train_step

    import sharpkit as sk

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == RANKS
    model = network()
    optimizer = sk.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    track = sk.Tracker(examples(), every=1, measures=["loss", "lambda_max"])
    for step, micro in enumerate(micro_batches(RANKS, batch=4)[:STEPS], start=1):
        train_step(accelerator, model, optimizer, [micro[rank]], clip=0.5)
        if accelerator.is_main_process:
            track(model, optimizer, step=step)
    found = {"weights": weights(accelerator.unwrap_model(model)), "rows": len(track.rows)}
    torch.save(found, f"{folder}/{rank}.pt")
    accelerator.end_training()


def by_hand():
    """Every shard has its own ε; the gradients there are averaged, clipped, and stepped along."""
    model = network()
    parameters = list(model.parameters())
    for shards in micro_batches(RANKS, batch=4)[:STEPS]:
        total = [torch.zeros_like(p) for p in parameters]
        before = weights(model)
        for x, y in shards:
            g = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)
            length = torch.sqrt(sum(part.square().sum() for part in g))
            for p, part in zip(parameters, g, strict=True):
                p.data += 0.1 * part / length
            g = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)
            for p, w, s, part in zip(parameters, before, total, g, strict=True):
                p.data = w.clone()
                s += part / RANKS
        length = float(torch.sqrt(sum(part.square().sum() for part in total)))
        for p, part in zip(parameters, total, strict=True):
            p.data -= 0.1 * min(1.0, 0.5 / length) * part
    return model


def test_sam_with_accelerate_in_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, str(tmp_path)), nprocs=RANKS)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    assert all(map(torch.equal, found[0]["weights"], found[1]["weights"]))
    assert close(found[0]["weights"], weights(by_hand()))
    assert [f["rows"] for f in found] == [STEPS, 0]
