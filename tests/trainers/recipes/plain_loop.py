"""SAM in a loop of one's own: accumulated gradients, clipping, bfloat16, several processes."""

from contextlib import nullcontext

import torch
from torch import nn


def train_step(model, optimizer, batches, clip=None, bfloat16=False):
    """One step over some batches: the gradient at w, then at w + ε, each the mean over them."""
    no_sync = getattr(model, "no_sync", nullcontext)  # of DistributedDataParallel

    def backward(synchronised):
        for number, (x, y) in enumerate(batches):
            last = synchronised and number + 1 == len(batches)
            with nullcontext() if last else no_sync():
                with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
                    loss = nn.functional.cross_entropy(model(x), y) / len(batches)
                loss.backward()

    optimizer.zero_grad()
    backward(synchronised=False)  # each process has its own ε, as in the paper
    with optimizer.perturbed():
        backward(synchronised=True)
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
