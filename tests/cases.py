"""Networks, data and losses that every estimator must handle. All seeded, all small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """A small residual network with BatchNorm, a strided skip and global pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1, stride=2, bias=False)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(4, 8, 1, stride=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.stem(x)))
        y = self.conv2(F.relu(self.norm2(self.conv1(x))))
        return self.head(F.relu(y + self.skip(x)).mean((2, 3)))


class Transformer(nn.Module):
    """Patches, one standard encoder layer (multi-head attention, dropout) and a mean head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


class Tied(nn.Module):
    """One weight used three times: as two layers, and transposed; and an embedding used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(40, 40)
        self.second = nn.Linear(40, 40)
        self.second.weight = self.first.weight
        self.table = nn.Embedding(6, 40)
        self.head = nn.Linear(40, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head((x + x @ self.table.weight.T @ self.table.weight).mean(1))


class TwiceLinear(nn.Module):
    """A large linear layer applied twice: its gradient is a sum of two outer products."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(48, 48)
        self.head = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(torch.tanh(self.mix(x))))


class LookedUp(nn.Module):
    """A table that is looked up twice, whose rows are then written over."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(300, 24), nn.Linear(24, 40), nn.Linear(40, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x.mul_(0.7)
        x = torch.tanh(self.mix(x.sum(1) + self.table(tokens[:, 0])))
        return self.head(x)


@dataclass(frozen=True)
class Case:
    """A model with random non-trivial statistics, and 24 examples."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Tensor]

    def make(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(0)
        model = self.build().to(dtype)
        generator = torch.Generator().manual_seed(1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(generator=generator).mul_(0.3)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
        x = self.inputs(generator)
        x = x.to(dtype) if x.is_floating_point() else x
        return model, x, torch.randint(0, 3, (len(x),), generator=generator)


def _randn(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(24, *shape, generator=g, dtype=torch.float64)


CASES = [
    Case(
        "mlp",
        lambda: nn.Sequential(
            nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 20), nn.Tanh(), nn.Linear(20, 3)
        ),
        _randn(40),
    ),
    Case(
        "cnn_batchnorm",
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(96, 40),
            nn.ReLU(),
            nn.Linear(40, 3),
        ),
        _randn(2, 8, 8),
    ),
    Case("residual", Residual, _randn(2, 8, 8)),
    Case("transformer", Transformer, _randn(5, 4)),
    Case("shared_weights", Tied, lambda g: torch.randint(0, 6, (24, 7), generator=g)),
    Case("layer_used_twice", TwiceLinear, _randn(48)),
    Case("looked_up", LookedUp, lambda g: torch.randint(0, 4, (24, 5), generator=g)),
]
