"""The plain loops that sharpkit is measured against: the best that a careful person writes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from timing import timed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def in_layout(model: nn.Module, x: Tensor, layout: torch.memory_format) -> Tensor:
    """The inputs in a layout, and the model's convolutions too."""
    model.to(memory_format=layout)
    return x.contiguous(memory_format=layout) if x.ndim == 4 else x


def sharpness_loop(
    model: nn.Module, x: Tensor, y: Tensor, m: int, rho: float, batch: int
) -> Tensor:
    """m-sharpness: per group a gradient in batches, a step in place, a forward pass, undo."""
    parameters = list(model.parameters())
    total = torch.zeros((), device=x.device)
    for i in range(0, len(x), m):
        xs, ys = x[i : i + m].split(batch), y[i : i + m].split(batch)
        count = min(m, len(x) - i)
        before = torch.zeros((), device=x.device)
        grads: Sequence[Tensor] = ()
        for xb, yb in zip(xs, ys, strict=True):
            loss = cross_entropy(model(xb), yb) * (len(xb) / count)
            found = torch.autograd.grad(loss, parameters)
            before += loss.detach()
            if grads:
                torch._foreach_add_(grads, found)
            else:
                grads = found
        with torch.no_grad():
            scale = rho / torch.nn.utils.get_total_norm(grads)
            steps = torch._foreach_mul(grads, scale)
            torch._foreach_add_(parameters, steps)
            for xb, yb in zip(xs, ys, strict=True):
                total += cross_entropy(model(xb), yb) * (len(xb) / len(x))
            total -= before * (count / len(x))
            torch._foreach_sub_(parameters, steps)
    return total


def sgd_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """A plain step of SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def m_sam_loop_step(model: nn.Module, x: Tensor, y: Tensor, m: int) -> Callable[[], object]:
    """A step of m-SAM: per group two passes, the weights moved in place and put back."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]

    def step() -> None:
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(before, parameters)
        for i in range(0, len(x), m):
            xs, ys = x[i : i + m], y[i : i + m]
            grads = torch.autograd.grad(cross_entropy(model(xs), ys), parameters)
            with torch.no_grad():
                scale = 0.05 / torch.nn.utils.get_total_norm(grads)
                torch._foreach_add_(parameters, torch._foreach_mul(grads, scale))
            (cross_entropy(model(xs), ys) * (len(xs) / len(x))).backward()
            with torch.no_grad():
                torch._foreach_copy_(parameters, before)
        optimizer.step()

    return step


def fastest(runs: dict[str, Callable[[], object]], rounds: int = 2) -> str:
    """The name of the run that takes least, the best of several rounds."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            best[name] = min(best[name], timed(run))
    return min(best, key=lambda name: best[name])


def best_sharpness_loop(
    model: nn.Module, x: Tensor, y: Tensor, m: int, rho: float, batches: Sequence[int]
) -> Callable[[], Tensor]:
    """The m-sharpness loop at its fastest batch size and layout, on a copy of the model."""
    import copy

    few = slice(0, min(len(x), max(m, 64)))
    runs: dict[str, Callable[[], Tensor]] = {}
    tries: dict[str, Callable[[], object]] = {}
    layouts = LAYOUTS if x.ndim == 4 else LAYOUTS[:1]
    for layout, batch in itertools.product(layouts, sorted({min(b, m) for b in batches})):
        own = copy.deepcopy(model)
        xs = in_layout(own, x, layout)
        name = f"{batch}, {layout}"
        runs[name] = lambda o=own, v=xs, b=batch: sharpness_loop(o, v, y, m, rho, b)
        tries[name] = lambda o=own, v=xs, b=batch: sharpness_loop(o, v[few], y[few], m, rho, b)
    chosen = fastest(tries)
    print(f"    loop at m = {m}: batch {chosen}", flush=True)
    return runs[chosen]
