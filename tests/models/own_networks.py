"""Networks of one's own: complex weights, derivatives inside forward, packed, compiled."""

from __future__ import annotations

import shutil
from typing import Literal

import pytest
import torch
from case import CLASSES, Case, N, classes, images
from plain_loops import half_squared_error
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence


class FourierLayer(nn.Module):
    """Channels are mixed in frequency space by complex weights (a Fourier neural operator)."""

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        weight = torch.randn(channels, channels, modes, dtype=torch.cfloat)
        self.weight = nn.Parameter(weight / channels)
        self.skip = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        modes = self.weight.shape[-1]
        spectrum = torch.fft.rfft(x)[..., :modes]
        mixed = torch.einsum("bif,iof->bof", spectrum, self.weight)
        return F.gelu(torch.fft.irfft(mixed, n=x.shape[-1]) + self.skip(x))


class FourierNetwork(nn.Sequential):
    """Two Fourier layers between pointwise maps."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(1, 6, 1), FourierLayer(6, 5), FourierLayer(6, 5),
            nn.Flatten(), nn.Linear(96, CLASSES),
        )  # fmt: skip


class PhysicsInformed(nn.Module):
    """The residual u″ + u u′ of a network u at given points, with derivatives in the points."""

    def __init__(self, by: Literal["autograd", "func"]) -> None:
        super().__init__()
        self.by = by
        self.u = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(),
                               nn.Linear(12, 1))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self._by_autograd(x) if self.by == "autograd" else self._by_func(x)

    def _by_autograd(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            u = self.u(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
            return bend + u * slope

    def _by_func(self, x: Tensor) -> Tensor:
        def u(point: Tensor) -> Tensor:
            return self.u(point).squeeze()

        def residual(point: Tensor) -> Tensor:
            slope = torch.func.grad(u)
            bend = torch.func.grad(lambda p: slope(p).squeeze())
            return bend(point) + u(point) * slope(point)

        return torch.func.vmap(residual)(x)


class Recurrent(nn.Module):
    """A bidirectional recurrent network over padded sequences, packed inside forward."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8, padding_idx=0)
        self.layers = kind(8, 10, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(20, CLASSES)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.table(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        last = self.layers(packed)[1]
        hidden = last[0] if isinstance(last, tuple) else last
        return self.head(torch.cat([hidden[-2], hidden[-1]], 1))


def padded_sequences(g: Generator) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([5, 2, 7, 1, 4, 7])
    words = torch.randint(1, 20, (N, 7), generator=g)
    return words * (torch.arange(7) < lengths.unsqueeze(1)), lengths


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(54, CLASSES)
    )


def compiled(backend: str, *marks: pytest.MarkDecorator) -> Case:
    return Case(
        f"compiled_{backend}", lambda: torch.compile(small_network(), backend=backend), images(8),
        classes, small_network, smooth=True, marks=marks,
    )  # fmt: skip


def mean_half_squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    return 0.5 * F.mse_loss(outputs, labels, reduction="sum") / len(labels)


def points(g: Generator) -> Tensor:
    return torch.randn(N, 1, generator=g)


def signals(g: Generator) -> Tensor:
    return torch.randn(N, 1, 16, generator=g)


OWN = [
    Case("fourier", FourierNetwork, signals, classes, smooth=True),
    Case("physics_by_autograd", lambda: PhysicsInformed("autograd"), points, points,
         loss="mse", total=half_squared_error, smooth=True),
    Case("physics_by_func", lambda: PhysicsInformed("func"), points, points,
         loss=mean_half_squared_error, total=half_squared_error, smooth=True),
    Case("lstm", lambda: Recurrent(nn.LSTM), padded_sequences, classes, smooth=True),
    Case("gru", lambda: Recurrent(nn.GRU), padded_sequences, classes, smooth=True),
    compiled("eager"),
    compiled("aot_eager"),
    compiled("inductor", pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")),
]  # fmt: skip
