"""Speed of SAM and m-SAM steps, in units of a plain SGD step on the same batch.

    python benchmarks/bench_sam.py [--quick] [--device cuda] [--system-allocator]
        [--out FILE.json]

Every ratio comes from this one process: each measured step runs between two plain ones and is
divided by their mean; the median of the ratios is reported. Beside the vectorised step
stands the plain loop: per group two ordinary passes, weights moved in place and put back.

On Linux the C allocator is told to keep freed memory. Otherwise it hands activations back to the
system now and then, and the page faults that follow (up to 40 % of a plain step, from one run to
the next) drown the differences. `--system-allocator` leaves it alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from timing import parse_arguments, ratio
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sharpkit.training as training

MS = [1, 4, 16, 64, 128]
BATCH = 128


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


def main() -> None:
    args = parse_arguments(__doc__)
    repeats = 7 if args.quick else 25
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []

    def report(name: str, values: dict[str, float], bound: str = "") -> None:
        rows.append({"case": name, **values, "bound": bound})
        print(
            f"| {name} | {values['median']:.2f} | {values['low']:.2f}-{values['high']:.2f} "
            f"| {bound} |",
            flush=True,
        )

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}")
    print("| case | median | range | bound |\n|---|---|---|---|")
    x = torch.randn(BATCH, 1, 28, 28, device=args.device)
    y = torch.randint(0, 10, (BATCH,), device=args.device)
    model = small_cnn().to(args.device)
    size = sum(p.numel() for p in model.parameters())
    name = f"CNN {size / 1e6:.2f} M, batch {BATCH}"
    unit = sgd_step(model, x, y)
    report(f"{name}, SAM.step(closure)", ratio(closure_step(model, x, y), unit, repeats), "2.15")
    for m in MS:
        bound = {1: "3.5", BATCH: "2.15"}.get(m, "")
        report(f"{name}, m = {m}", ratio(m_sam_step(model, x, y, m), unit, repeats), bound)
    for m in MS:
        few = max(3, repeats // 5)
        report(f"{name}, plain loop, m = {m}", ratio(loop_step(model, x, y, m), unit, few))
    model = small_cnn(norm=True).to(args.device)
    unit = sgd_step(model, x, y)
    for m in MS:
        run = m_sam_step(model, x, y, m)
        report(f"{name}, BatchNorm, m = {m}", ratio(run, unit, repeats))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
