"""Speed of SAM and m-SAM steps, in units of a plain SGD step on the same batch.

    python benchmarks/bench_sam.py [--quick] [--device cuda] [--system-allocator]

Every ratio comes from this one process: each measured step runs between two plain ones and is
divided by their mean; the median of the ratios is reported. Beside `SAM.step(closure)` stands the
usual two-pass optimizer, parameter by parameter; beside the vectorised step of m-SAM the plain
loop: per group two ordinary passes, weights moved in place and put back.

On Linux the C allocator is told to keep freed memory. Otherwise it hands activations back to the
system now and then, and the page faults that follow (up to 40 % of a plain step, from one run to
the next) drown the differences. `--system-allocator` leaves it alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from timing import Case, Record, main_on_device, ratios
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sharpkit.training as training

MS = [1, 4, 16, 64, 128]
BATCH = 128
UNIT = "plain SGD steps"


def small_cnn(width: int = 16, dense: int = 128, *, norm: bool = False) -> nn.Module:
    """0.22 M parameters, 28x28 grey images."""
    w = width

    def convolution(inputs: int, outputs: int) -> list[nn.Module]:
        normalise = [nn.BatchNorm2d(outputs)] if norm else []
        return [nn.Conv2d(inputs, outputs, 3, padding=1), *normalise, nn.ReLU()]

    return nn.Sequential(
        *convolution(1, w), *convolution(w, w), nn.MaxPool2d(2),
        *convolution(w, 2 * w), *convolution(2 * w, 2 * w), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(98 * w, dense), nn.ReLU(), nn.Linear(dense, 10),
    )  # fmt: skip


def sgd_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def m_sam_step(model: nn.Module, x: Tensor, y: Tensor, m: int) -> Callable[[], object]:
    optimizer = training.SAM(model.parameters(), torch.optim.SGD, lr=1e-3, momentum=0.9)
    return lambda: optimizer.step_batch(model, x, y, m=m)


def closure_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    optimizer = training.SAM(model.parameters(), torch.optim.SGD, lr=1e-3, momentum=0.9)

    def closure() -> Tensor:
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)


def two_pass_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """SAM as most implementations write it: one parameter at a time, and two backward passes."""
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in parameters]).norm()
            before = [p.clone() for p in parameters]
            for p in parameters:
                p.add_(p.grad * (0.05 / (norm + 1e-12)))
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p, weights in zip(parameters, before, strict=True):
                p.copy_(weights)
        optimizer.step()

    return step


def loop_step(model: nn.Module, x: Tensor, y: Tensor, m: int) -> Callable[[], object]:
    """What a careful script does, group by group."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    parameters = list(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        for i in range(0, len(x), m):
            xs, ys = x[i : i + m], y[i : i + m]
            grads = torch.autograd.grad(cross_entropy(model(xs), ys), parameters)
            with torch.no_grad():
                before = [p.clone() for p in parameters]
                scale = 0.05 / torch.nn.utils.get_total_norm(grads)
                torch._foreach_add_(parameters, grads, alpha=float(scale))
            (cross_entropy(model(xs), ys) * (len(xs) / len(x))).backward()
            with torch.no_grad():
                torch._foreach_copy_(parameters, before)
        optimizer.step()

    return step


def batch(device: str) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(BATCH, 1, 28, 28, device=device),
        torch.randint(0, 10, (BATCH,), device=device),
    )


def plain(arguments: argparse.Namespace) -> Iterator[Record]:
    """A network without BatchNorm."""
    repeats = 7 if arguments.quick else 25
    x, y = batch(arguments.device)
    model = small_cnn().to(arguments.device)
    unit = sgd_step(model, x, y)
    case = f"SAM.step(closure), CNN 0.22 M, batch {BATCH}"
    ours = ratios(closure_step(model, x, y), unit, repeats)
    yield Record(case, "sharpkit", UNIT, ours, "<= 2.15")
    yield Record(case, "two-pass SAM", UNIT, ratios(two_pass_step(model, x, y), unit, repeats))
    for m in MS:
        case = f"m-SAM step, CNN 0.22 M, batch {BATCH}, m = {m}"
        ours = ratios(m_sam_step(model, x, y, m), unit, repeats)
        yield Record(case, "sharpkit", UNIT, ours, {1: "<= 3.5", BATCH: "<= 2.15"}.get(m, ""))
        loop = ratios(loop_step(model, x, y, m), unit, max(3, repeats // 5))
        yield Record(case, "plain loop", UNIT, loop)


def batchnorm(arguments: argparse.Namespace) -> Iterator[Record]:
    """A network with BatchNorm."""
    repeats = 7 if arguments.quick else 25
    x, y = batch(arguments.device)
    model = small_cnn(norm=True).to(arguments.device)
    unit = sgd_step(model, x, y)
    for m in MS:
        case = f"m-SAM step, CNN 0.22 M with BatchNorm, batch {BATCH}, m = {m}"
        yield Record(case, "sharpkit", UNIT, ratios(m_sam_step(model, x, y, m), unit, repeats))


CASES: dict[str, Case] = {"plain": plain, "batchnorm": batchnorm}

if __name__ == "__main__":
    main_on_device(__doc__, CASES)
