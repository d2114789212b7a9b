"""A loss landscape beside the plain loop over its points.

    python benchmarks/bench_landscape.py [--quick]

51 x 51 points of a CNN of 0.1 million parameters on 1,000 images. The loop runs at the batch size
and memory layout that is fastest for it; its time is in proportion to the points, so it runs over a
part of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from loops import Layouts, forward_pass, landscape_loop
from networks import small_cnn
from timing import Case, Record, in_turn, keep_freed_memory, parser, run_cases
from torch import Tensor, nn

import sharpkit

BATCHES = (16, 32, 64, 128, 256)
SIDE, SHARE = 51, 1 / 9  # points along each axis; of them, for the loop
DIRECTIONS = 2


def network() -> nn.Module:
    """0.11 M parameters."""
    torch.manual_seed(0)
    return small_cnn(width=12, dense=72).eval()


def steps(model: nn.Module) -> list[list[Tensor]]:
    """Two directions; which ones does not matter for the time."""
    return [[0.1 * torch.randn_like(p) for p in model.parameters()] for _ in range(DIRECTIONS)]


def plane(arguments: argparse.Namespace) -> Iterator[Record]:
    """Seconds a point of sharpkit, over those of the loop."""
    side, n, repeats = (9, 500, 3) if arguments.quick else (SIDE, 1000, 3)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = network().to(device)
    x = torch.randn(n, 1, 28, 28, device=device)
    y = torch.randint(0, 10, (n,), device=device)
    best = Layouts(model, x, y, forward_pass).best((*BATCHES, n))
    looped = max(2, round(side * SHARE**0.5))
    runs: dict[str, Callable[[], object]] = {
        "sharpkit": partial(
            sharpkit.landscape, model, (x, y), points=side, extent=0.5, progress=False
        ),
        "loop": partial(
            landscape_loop, best.model, best.x, best.y, best.batch,
            steps(best.model), grid(looped),
        ),
    }  # fmt: skip
    runs["loop"]()
    sharpkit.landscape(model, (x, y), points=2, progress=False)
    times = in_turn(runs, repeats)
    points = {"sharpkit": side**2, "loop": looped**2}
    each = {name: [t / points[name] for t in found] for name, found in times.items()}
    ratios = [a / b for a, b in zip(each["sharpkit"], each["loop"], strict=True)]
    case = f"landscape, CNN 0.1 M, {side} x {side} points, {n:,} images"
    yield Record(case, "sharpkit", "time of the plain loop", ratios, "<= 1.05")
    yield Record(case, f"loop, batch {best.batch}, {best.layout}", "time of the plain loop", [1.0])


def grid(side: int) -> Sequence[tuple[float, float]]:
    """Points of a square."""
    values = torch.linspace(-0.5, 0.5, side).tolist()
    return [(a, b) for a in values for b in values]


CASES: dict[str, Case] = {"plane": plane}

if __name__ == "__main__":
    keep_freed_memory()
    run_cases(parser(__doc__, CASES).parse_args(), CASES)
