"""The training that every trainer does here: few examples, few steps, all of it seeded."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 3


def examples(n: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8, generator=generator)
    return x, (x[:, :CLASSES]).argmax(1)


def loader(batch: int = 8) -> DataLoader:
    return DataLoader(TensorDataset(*examples()), batch_size=batch)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, CLASSES))


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def close(a: list[Tensor], b: list[Tensor], rtol: float = 1e-5) -> bool:
    """To rounding: the same sums in another order."""
    return all(torch.allclose(s, t, rtol=rtol, atol=1e-6) for s, t in zip(a, b, strict=True))


def sam_by_hand(
    model: nn.Module,
    steps: list[list[tuple[Tensor, Tensor]]],
    *,
    rho: float = 0.1,
    lr: float = 0.1,
    clip: float | None = None,
    interval: int = 1,
    ranks: int = 1,
    loss=lambda model, x, y: nn.functional.cross_entropy(model(x), y),
) -> nn.Module:
    """SAM with SGD as Algorithm 1 is written; a step is the mean over its micro-batches.

    Of several ranks, each has every so many of the micro-batches and an ε of its own for them; the
    gradients at w + ε are averaged, clipped, and stepped along. With an interval, steps in
    between have ε = 0.
    """

    def gradient(micro):
        found = [torch.zeros_like(p) for p in model.parameters()]
        for x, y in micro:
            parts = torch.autograd.grad(loss(model, x, y) / len(micro), list(model.parameters()))
            found = [a + b for a, b in zip(found, parts, strict=True)]
        return found

    def length(g):
        return torch.sqrt(sum(part.square().sum() for part in g))

    for number, micro in enumerate(steps):
        before, total = weights(model), [torch.zeros_like(p) for p in model.parameters()]
        for rank in range(ranks):
            own = micro[rank::ranks]
            g = gradient(own)
            for p, part in zip(model.parameters(), g, strict=True):
                p.data += (0.0 if number % interval else rho) * part / length(g)
            total = [s + part / ranks for s, part in zip(total, gradient(own), strict=True)]
            for p, w in zip(model.parameters(), before, strict=True):
                p.data = w.clone()
        scale = 1.0 if clip is None else min(1.0, clip / float(length(total)))
        for p, part in zip(model.parameters(), total, strict=True):
            p.data -= lr * scale * part
    return model


def micro_batches(of: int, batch: int = 8) -> list[list[tuple[Tensor, Tensor]]]:
    """The loader's batches, so many to a step."""
    every = [(x, y) for x, y in loader(batch)]
    return [every[i : i + of] for i in range(0, len(every), of)]
