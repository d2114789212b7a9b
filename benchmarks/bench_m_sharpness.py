"""Speed of m-sharpness, in units of (gradient pass + forward pass) over the same examples.

    python benchmarks/bench_m_sharpness.py [--quick] [--device cuda] [--system-allocator]
        [--out FILE.json]

Every ratio comes from this one process: each measurement stands between two units, and the median
of the ratios is reported. The unit is taken at the best of several batch sizes. Beside it stands
the plain loop, with one gradient and one forward pass per group.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable

import torch
from timing import parse_arguments, ratio, timed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sharpkit

MS = [1, 4, 16, 64, 256]
RHOS = [0.01, 0.02, 0.05, 0.1]


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


def main() -> None:
    args = parse_arguments(__doc__)
    device = torch.device(args.device)
    repeats = 3 if args.quick else 5
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []

    def report(name: str, values: dict[str, float], bound: str = "") -> None:
        row = {"case": name, **values, "bound": bound}
        rows.append(row)
        print(
            f"| {name} | {values['median']:.2f} | {values['low']:.2f}-{values['high']:.2f} "
            f"| {bound} |",
            flush=True,
        )

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}")
    print("| case | median | range | bound |\n|---|---|---|---|")

    n = 512 if args.quick else 1024
    model = small_cnn().to(device).eval()
    x, y = torch.randn(n, 1, 28, 28, device=device), torch.randint(0, 10, (n,), device=device)
    unit = Unit(model, x, y, [32, 64, 128, 256] if device.type == "cpu" else [512, 2048])

    def ours(m: int | list[int], rho: float | list[float]) -> Callable[[], object]:
        return lambda: sharpkit.m_sharpness(model, (x, y), m=m, rho=rho, seed=None, progress=False)

    for m in MS:
        report(f"CNN 0.47 M, m = {m}", ratio(ours(m, 0.05), unit, repeats),
               "1.5" if m == 1 else "1.2")  # fmt: skip
    for m in MS:
        loop = ratio(lambda m=m: plain_loop(model, x, y, m, 0.05), unit, max(1, repeats // 2))
        report(f"CNN 0.47 M, plain loop, m = {m}", loop)

    def separate() -> None:
        for m in MS:
            for rho in RHOS:
                ours(m, rho)()

    report(
        "20 separate calls / one sweep of m x rho",
        ratio(separate, ours(MS, RHOS), 1 if args.quick else 5),
        ">= 2.5",
    )

    n = 32 if args.quick else 64
    model = task1_vgg().to(device).eval()
    x, y = torch.randn(n, 3, 32, 32, device=device), torch.randint(0, 10, (n,), device=device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = Unit(model, x, y, [16, 32] if device.type == "cpu" else [128])
    report("VGG 19.2 M, m = 1", ratio(ours(1, 0.05), unit, max(3, repeats // 2)), "2.0")
    report(
        "VGG 19.2 M, plain loop, m = 1",
        ratio(lambda: plain_loop(model, x, y, 1, 0.05), unit, 1 if args.quick else 3),
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory {peak / 2**20:.2f} GiB, before the VGG {before / 2**20:.2f} GiB")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
