"""Speed of m-sharpness, in units of (gradient pass + forward pass) over the same examples.

    python benchmarks/bench_m_sharpness.py [--quick] [--device cuda] [--system-allocator]

Every ratio comes from this one process: each measurement stands between two units, and the median
of the ratios is reported. The unit is taken at the best of several batch sizes. Beside it stands
the plain loop, with one gradient and one forward pass per group.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable, Iterator

import torch
from timing import Case, Record, main_on_device, ratios, timed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sharpkit

MS = [1, 4, 16, 64, 256]
RHOS = [0.01, 0.02, 0.05, 0.1]
UNIT = "gradient + forward passes"


def small_cnn(width: int = 32, dense: int = 128) -> nn.Module:
    """0.47 M parameters, 28x28 grey images."""
    w = width
    return nn.Sequential(
        nn.Conv2d(1, w, 3, padding=1), nn.ReLU(), nn.Conv2d(w, w, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(w, 2 * w, 3, padding=1), nn.ReLU(),
        nn.Conv2d(2 * w, 2 * w, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(98 * w, dense), nn.ReLU(), nn.Linear(dense, 10),
    )  # fmt: skip


def task1_vgg(width: int = 512) -> nn.Module:
    """A VGG of PGDL task 1: one block at 32x32, a 16 M-parameter dense layer; 19.2 M in all."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(width * 256, 128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip


class Unit:
    """One gradient pass and one no-grad forward pass over all examples, at the best batch size."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, batches: list[int]) -> None:
        self.model, self.x, self.y = model, x, y
        self.batch = min(batches, key=lambda b: min(timed(lambda: self.run(b)) for _ in range(2)))

    def run(self, batch: int) -> None:
        parameters = list(self.model.parameters())
        for i in range(0, len(self.x), batch):
            loss = cross_entropy(self.model(self.x[i : i + batch]), self.y[i : i + batch])
            torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for i in range(0, len(self.x), batch):
                cross_entropy(self.model(self.x[i : i + batch]), self.y[i : i + batch])

    def __call__(self) -> None:
        self.run(self.batch)


def plain_loop(model: nn.Module, x: Tensor, y: Tensor, m: int, rho: float) -> float:
    """What a careful script does: per group a gradient, a step in place, a forward pass, undo."""
    parameters = list(model.parameters())
    total = 0.0
    for i in range(0, len(x), m):
        xs, ys = x[i : i + m], y[i : i + m]
        loss = cross_entropy(model(xs), ys)
        grads = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            scale = rho / torch.nn.utils.get_total_norm(grads)
            torch._foreach_add_(parameters, grads, alpha=float(scale))
            total += float(cross_entropy(model(xs), ys) - loss)
            torch._foreach_sub_(parameters, grads, alpha=float(scale))
    return total


Data = tuple[Tensor, Tensor]


def measurement(
    model: nn.Module, data: Data, m: int | list[int], rho: float | list[float]
) -> Callable[[], object]:
    return lambda: sharpkit.m_sharpness(model, data, m=m, rho=rho, seed=None, progress=False)


def cnn_case(arguments: argparse.Namespace) -> tuple[nn.Module, Data]:
    n, device = 512 if arguments.quick else 1024, arguments.device
    data = torch.randn(n, 1, 28, 28, device=device), torch.randint(0, 10, (n,), device=device)
    return small_cnn().to(device).eval(), data


def cnn(arguments: argparse.Namespace) -> Iterator[Record]:
    """One m at a time, beside the plain loop."""
    model, data = cnn_case(arguments)
    unit = Unit(model, *data, [32, 64, 128, 256] if arguments.device == "cpu" else [512, 2048])
    repeats = 3 if arguments.quick else 5
    for m in MS:
        case = f"m-sharpness, CNN 0.47 M, m = {m}"
        ours = ratios(measurement(model, data, m, 0.05), unit, repeats)
        yield Record(case, "sharpkit", UNIT, ours, "<= 1.5" if m == 1 else "<= 1.2")
        loop = ratios(lambda m=m: plain_loop(model, *data, m, 0.05), unit, max(1, repeats // 2))
        yield Record(case, "plain loop", UNIT, loop)


def sweep(arguments: argparse.Namespace) -> Iterator[Record]:
    """The whole grid of m and rho at once."""
    model, data = cnn_case(arguments)

    def separate() -> None:
        for m in MS:
            for rho in RHOS:
                measurement(model, data, m, rho)()

    values = ratios(separate, measurement(model, data, MS, RHOS), 1 if arguments.quick else 5)
    yield Record(
        "m-sharpness, 20 separate calls (5 m x 4 rho)", "sharpkit", "one call", values, ">= 2.5"
    )


def vgg(arguments: argparse.Namespace) -> Iterator[Record]:
    """A model whose weights do not fit the memory once per example."""
    n, device = 32 if arguments.quick else 64, arguments.device
    model = task1_vgg().to(device).eval()
    data = torch.randn(n, 3, 32, 32, device=device), torch.randint(0, 10, (n,), device=device)
    unit = Unit(model, *data, [16, 32] if device == "cpu" else [128])
    case = "m-sharpness, VGG 19.2 M, m = 1"
    yield Record(case, "sharpkit", UNIT, ratios(measurement(model, data, 1, 0.05), unit, 3), "<= 2")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    loop = ratios(lambda: plain_loop(model, *data, 1, 0.05), unit, 1 if arguments.quick else 3)
    yield Record(case, "plain loop", UNIT, loop)
    yield Record(f"{case}, peak memory of the process", "sharpkit", "GiB", [peak], "<= 4")


CASES: dict[str, Case] = {"cnn": cnn, "sweep": sweep, "vgg": vgg}

if __name__ == "__main__":
    main_on_device(__doc__, CASES)
