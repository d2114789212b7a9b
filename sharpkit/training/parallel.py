"""The processes of one training, as `torchrun` starts them, or this process alone."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from sharpkit.contract.ranks import Team
from sharpkit.errors import ArgumentError

# Kept until the process ends: a model of DistributedDataParallel that is the last to hold its group
# waits for threads that wait for it (torch 2.13), and it lives until its cycles are collected.
_groups_of_models: set[Any] = set()


@dataclass(frozen=True)
class Ranks:
    """Which of the processes this is; every method is called by all of them."""

    rank: int = 0  # number of this process; 0 writes the files
    world: int = 1  # how many there are

    @classmethod
    def current(cls) -> Ranks:
        """Those of torch's process group, if one has been initialised."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    def share(self, total: int) -> slice:
        """This rank's part of `total` items in order; parts differ by one item at most.

        Example:
            >>> [Ranks(rank, 2).share(5) for rank in range(2)]
            [slice(0, 2, None), slice(2, 5, None)]
        """
        return Team(self.rank, self.world).share(total)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the ranks, starting from rank 0's weights."""
        if self.world == 1:
            return model
        # running statistics are averaged once an epoch, not copied from rank 0 in every pass
        known = inspect.signature(DistributedDataParallel).parameters
        new, old = "forward_sync_buffers", "broadcast_buffers"  # the name before torch 2.12
        options: dict[str, Any] = {new if new in known else old: False}
        _groups_of_models.add(distributed.group.WORLD)
        return DistributedDataParallel(model, **options)

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world > 1:
            distributed.all_reduce(values)
        return values

    def wait(self) -> None:
        """Go on when all ranks have come here."""
        if self.world > 1:
            distributed.barrier()

    @torch.no_grad()
    def average_buffers(self, model: nn.Module) -> None:
        """Running statistics become their mean over ranks.

        They move linearly, so this is where the mean of the ranks' batch statistics leads.
        """
        if self.world > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.total(buffer.clone()) / self.world)


def on_any_rank(model: DistributedDataParallel, flags: list[bool]) -> list[bool]:
    """Whether each flag is set on any rank; every rank must call it."""
    device = next(model.parameters()).device
    counts = torch.tensor(flags, dtype=torch.float32, device=device)
    distributed.all_reduce(counts, group=model.process_group)
    return [count > 0 for count in counts.tolist()]


def averaged_over_ranks(
    model: DistributedDataParallel, gradients: list[Tensor | None], like: list[Tensor]
) -> list[Tensor | None]:
    """The mean over ranks of every gradient; None where no rank has one.

    A gradient that is None here counts as zero if another rank has one.
    """
    used = on_any_rank(model, [gradient is not None for gradient in gradients])
    full: list[Tensor | None] = [
        (torch.zeros_like(p) if g is None else g) if u else None
        for g, p, u in zip(gradients, like, used, strict=True)
    ]
    world = distributed.get_world_size(model.process_group)
    for dtype in dict.fromkeys(p.dtype for p in like):  # the same order on every rank
        same = [g for g in full if g is not None and g.dtype == dtype]
        if not same:
            continue
        flat = torch.cat([g.flatten() for g in same]).div_(world)
        distributed.all_reduce(flat, group=model.process_group)
        parts = torch.split(flat, [g.numel() for g in same])
        for g, part in zip(same, parts, strict=True):
            g.copy_(part.view_as(g))
    return full


@contextmanager
def process_group(device: str = "cpu") -> Iterator[str]:
    """Join the processes that `torchrun` started, if it did; leave them at the end.

    On a "cpu" they talk through gloo, with "cuda" through nccl, a GPU for each. Gives this
    process's own device, such as "cuda:1".

    Raises:
        ArgumentError: If there are more local processes than GPUs.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield device
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        local, count = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        if count > torch.cuda.device_count():
            raise ArgumentError(
                f"torchrun started {count} processes, but there are {torch.cuda.device_count()} "
                "GPUs: give it --nproc-per-node with that number, or --device cpu"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()
