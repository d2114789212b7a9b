"""Small trainings to follow: a network with BatchNorm and dropout, and a plain one."""

from __future__ import annotations

import torch
from torch import nn

import sharpkit as sk


def images():
    train, _ = sk.load_dataset("embedded")
    inputs, labels = train.tensors
    return inputs[:128], labels[:128]


def plain_network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(196, 16), nn.Tanh(), nn.Linear(16, 10))


def noisy_network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.3),
        nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.2, "momentum": 0.5, **options})


def train(model, optimizer, tracker, steps, start=0, batch=32):
    """Steps on random batches of the embedded images, seeded by the step alone."""
    x, y = images()
    for step in range(start, steps):
        if tracker is not None:
            tracker(model, optimizer, step=step)
        model.train()
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:batch]
        torch.rand(1)  # the global stream moves on, as data loaders let it
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    if tracker is not None:
        tracker(model, optimizer, step=steps)
