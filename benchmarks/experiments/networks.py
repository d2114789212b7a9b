"""The networks of the recorded experiments: strided convolutions, so that a CPU trains many."""

from __future__ import annotations

from torch import nn


def fashion_cnn() -> nn.Module:
    """106,122 parameters, for images of 1x28x28."""
    return _cnn(channels=1, positions=7 * 7)


def cifar_cnn() -> nn.Module:
    """137,642 parameters, for images of 3x32x32."""
    return _cnn(channels=3, positions=8 * 8)


def _cnn(channels: int, positions: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * positions, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
