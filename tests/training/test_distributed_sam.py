"""SAM under DistributedDataParallel: every rank's shard is a group with its own perturbation."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from cases import CASES
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sharpkit.errors import ModelError
from sharpkit.training import SAM, m_sam_gradient

RANKS = 2
CASE = CASES[0]
SETTINGS = {"rho": 0.2, "lr": 0.1, "momentum": 0.9}


def closure_step(opt: SAM, model: DistributedDataParallel, x: Tensor, y: Tensor) -> None:
    def closure() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    opt.step(closure, no_sync=model.no_sync)


def two_steps(opt: SAM, model: DistributedDataParallel, x: Tensor, y: Tensor) -> None:
    with model.no_sync():
        F.cross_entropy(model(x), y).backward()
    opt.first_step()
    F.cross_entropy(model(x), y).backward()
    opt.second_step(zero_grad=True)


def batch_step(opt: SAM, model: DistributedDataParallel, x: Tensor, y: Tensor) -> None:
    opt.step_batch(model, x, y, m=len(x))


def small_groups(opt: SAM, model: DistributedDataParallel, x: Tensor, y: Tensor) -> None:
    opt.step_batch(model, x, y, m=3)


STEPS = {"closure": closure_step, "two_steps": two_steps, "batch": batch_step, "m=3": small_groups}


def found_by(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, step in STEPS.items():
        module, x, y = CASE.make()
        size = len(x) // RANKS
        mine = slice(rank * size, (rank + 1) * size)
        model = DistributedDataParallel(module)
        opt = SAM(model.parameters(), torch.optim.SGD, **SETTINGS)
        for _ in range(3):
            step(opt, model, x[mine], y[mine])
        results[name] = [p.detach() for p in module.parameters()]
    x = x + (float("nan") if rank == 1 else 0.0)
    try:
        m_sam_gradient(model, x, y, m=4)
    except ModelError as error:
        results["diverged"] = str(error)
    return results


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    torch.save(found_by(rank), f"{folder}/{rank}.pt")
    gc.collect()  # a model that outlives its process group may wait for it for ever
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def one_process(m: int) -> nn.Module:
    model, x, y = CASE.make()
    rho = SETTINGS["rho"]
    opt = torch.optim.SGD(model.parameters(), lr=SETTINGS["lr"], momentum=SETTINGS["momentum"])
    for _ in range(3):
        opt.zero_grad()
        m_sam_gradient(model, x, y, m=m, rho=rho)
        opt.step()
    return model


@pytest.mark.parametrize("name", STEPS)
def test_two_ranks_equal_one_with_their_groups(results, name):
    expected = one_process(3 if name == "m=3" else 12)
    for rank in range(RANKS):
        for p, t in zip(results[rank][name], expected.parameters(), strict=True):
            torch.testing.assert_close(p, t.detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", STEPS)
def test_ranks_hold_the_same_weights(results, name):
    for p, t in zip(results[0][name], results[1][name], strict=True):
        assert torch.equal(p, t)


def test_a_loss_that_diverges_on_one_rank_stops_them_all(results):
    assert all("diverged" in results[rank]["diverged"] for rank in range(RANKS))
