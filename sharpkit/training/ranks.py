"""Averaging over the ranks of a DistributedDataParallel what was computed outside of it."""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel


def anywhere(model: DistributedDataParallel, flags: list[bool]) -> list[bool]:
    """Whether each flag is set on any rank; every rank must call it."""
    device = next(model.parameters()).device
    counts = torch.tensor(flags, dtype=torch.float32, device=device)
    distributed.all_reduce(counts, group=model.process_group)
    return [count > 0 for count in counts.tolist()]


def averaged(
    model: DistributedDataParallel, gradients: list[Tensor | None], like: list[Tensor]
) -> list[Tensor | None]:
    """The mean over ranks of every gradient; None where no rank has one.

    Args:
        model: Gives the process group.
        gradients: Of this rank; None counts as zero if another rank has one.
        like: The parameters, the same on every rank.
    """
    used = anywhere(model, [gradient is not None for gradient in gradients])
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
