"""SAM in a loop with Accelerate, with accumulated gradients, clipping and mixed precision."""

from contextlib import nullcontext

from torch import nn


def train_step(accelerator, model, optimizer, batches, clip=None):
    """One step over some batches: the gradient at w, then at w + ε, each the mean over them."""

    def backward(synchronised):
        for number, (x, y) in enumerate(batches):
            last = synchronised and number + 1 == len(batches)
            with nullcontext() if last else accelerator.no_sync(model):
                loss = nn.functional.cross_entropy(model(x), y) / len(batches)
                accelerator.backward(loss)

    optimizer.zero_grad()
    sam = optimizer.optimizer  # inside Accelerate's wrapper
    backward(synchronised=not sam.perturbs)  # each process has its own ε, as in the paper
    if sam.perturbs:
        with sam.perturbed():
            backward(synchronised=True)
    if clip is not None:
        accelerator.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
