"""A small problem for `sharpkit.fit`, hard enough that every random choice shows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sharpkit as sk
from sharpkit.training import FitResult

EVERYTHING = {
    "epochs": 4,
    "batch_size": 16,
    "lr": 0.05,
    "augmentation": "flip-crop",
    "label_noise": 0.2,
    "progress": False,
}


def images(n: int = 70, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, 8, 8, generator=generator)
    return x, torch.randint(0, 3, (n,), generator=generator)


def network(seed: int = 0, *, noisy: bool = True) -> nn.Module:
    """A CNN with BatchNorm; dropout makes the global random state matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.3 if noisy else 0.0),
            nn.Flatten(),
            nn.Linear(4 * 36, 3),
        )


def fit(out=None, model: nn.Module | None = None, **settings) -> FitResult:
    return sk.fit(
        network() if model is None else model,
        images(),
        images(30, seed=1),
        out=out,
        **{**EVERYTHING, **settings},
    )


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Bit for bit, buffers included."""
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(s, t) for (a, s), (b, t) in pairs)
