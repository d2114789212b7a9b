"""sharpkit's curvature against curvlinops, pytorch-hessian-eigenthings and PyHessian.

    python -m venv /tmp/peers
    /tmp/peers/bin/pip install -r benchmarks/requirements-peers.txt -e .
    /tmp/peers/bin/python benchmarks/bench_curvature.py [--quick] [--clock cpu]

One run measures everything in interleaved rounds, so that a slow moment of the machine hits all
contenders, and prints medians and ratios: one Hessian-vector product in units of a gradient pass;
an 80-step density with one and four probes; agreement of the top five eigenvalues; how the cost
grows with data, steps and parameters (a log-log figure); and peak memory, each contender in a
process of its own. Every contender runs at the batch size that is fastest for it. `--clock cpu`
counts processor time instead of wall time: steadier on a busy machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import sharpkit.curvature as sk

BATCHES = (50, 100, 200, 500)
PEERS = {
    "curvlinops": "curvlinops",
    "hessian-eigenthings": "hessian_eigenthings",
    "PyHessian": "pyhessian",
}


def cnn(size: int = 28, channels: int = 16, hidden: int = 64) -> nn.Module:
    """Two convolutions with ReLU and pooling, and two dense layers."""
    torch.manual_seed(0)
    flat = (size // 4) ** 2 * 2 * channels
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(flat, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    ).eval()


def mlp(size: int, width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(size * size, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, 10),
    ).eval()


def images(n: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten classes of noisy blobs: enough structure for outliers in the spectrum."""
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(n) % 10
    means = torch.randn(10, 1, size, size, generator=g)
    return means[labels] + torch.randn(n, 1, size, size, generator=g), labels


def batches(data: tuple[torch.Tensor, torch.Tensor], size: int) -> list[tuple[torch.Tensor, ...]]:
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


def gradient_pass(model, data, batch) -> Callable[[], None]:
    weights, chunks = list(model.parameters()), batches(data, batch)

    def run() -> None:
        total = [torch.zeros_like(w) for w in weights]
        for x, y in chunks:
            g = torch.autograd.grad(F.cross_entropy(model(x), y), weights)
            torch._foreach_add_(total, g, alpha=len(x) / len(data[0]))

    return run


def product(name: str, model, data, batch) -> Callable[[torch.Tensor], torch.Tensor]:
    """The Hessian-vector product of a contender."""
    loader = batches(data, batch or 100)
    if name.startswith("sharpkit"):
        chunk = batch or "auto"
        budget = 0 if "recomputed" in name else None
        return sk.HessianOperator(model, data, chunk=chunk, memory_budget=budget).matvec
    if name == "curvlinops":
        from curvlinops import HessianLinearOperator

        operator = HessianLinearOperator(
            model,
            nn.CrossEntropyLoss(),
            list(model.parameters()),
            loader,
            check_deterministic=False,
        )
        return lambda v: operator @ v
    if name == "hessian-eigenthings":
        return eigenthings(model, loader).matvec
    if name == "PyHessian":
        from pyhessian import hessian

        peer = hessian(model, nn.CrossEntropyLoss(), dataloader=loader, cuda=False)

        def run(v: torch.Tensor) -> torch.Tensor:
            parts = torch.split(v, [p.numel() for p in peer.params])
            shaped = [a.view_as(p) for a, p in zip(parts, peer.params, strict=True)]
            return torch.cat([t.reshape(-1) for t in peer.dataloader_hv_product(shaped)[1]])

        return run
    raise ValueError(name)


def eigenthings(model, loader):
    from hessian_eigenthings.loss_fns.standard import supervised_loss
    from hessian_eigenthings.operators.hessian import HessianOperator

    return HessianOperator(model, loader, supervised_loss(nn.CrossEntropyLoss()))


def density(name: str, model, data, batch, steps: int, probes: int = 1) -> Callable[[], object]:
    """A spectral density of a contender, its operator's construction included."""
    loader = batches(data, batch or 100)

    def run() -> object:
        if name.startswith("sharpkit"):
            budget = 0 if "recomputed" in name else None
            with sk.HessianOperator(
                model, data, chunk=batch or "auto", memory_budget=budget
            ) as operator:
                return sk.spectral_density(operator, steps=steps, probes=probes)
        if name == "curvlinops":
            from curvlinops import HessianLinearOperator
            from curvlinops.papyan2020traces.spectrum import fast_lanczos

            operator = HessianLinearOperator(
                model,
                nn.CrossEntropyLoss(),
                list(model.parameters()),
                loader,
                check_deterministic=False,
            )
            return [fast_lanczos(operator, steps) for _ in range(probes)]
        from hessian_eigenthings.algorithms.spectral_density import spectral_density

        return spectral_density(
            eigenthings(model, loader), num_runs=probes, lanczos_steps=steps, seed=0
        )

    return run


def rounds(functions: dict[str, Callable[[], object]], count: int, clock) -> dict[str, list[float]]:
    """Times of each function in interleaved rounds, after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(count):
        for name, function in functions.items():
            began = clock()
            function()
            times[name].append(clock() - began)
    return times


def best_batch(make: Callable[[int], Callable[[], object]], clock) -> int:
    """The fastest of the batch sizes, in two trials each."""
    costs = {}
    for batch in BATCHES:
        function = make(batch)
        costs[batch] = min(rounds({"f": function}, 2, clock)["f"])
    return min(costs, key=costs.__getitem__)


def installed() -> list[str]:
    return [name for name, module in PEERS.items() if importlib.util.find_spec(module)]


def bench_products(model, data, clock, count: int, quick: bool) -> dict[str, int]:
    names = ["sharpkit kept", "sharpkit recomputed", *installed()]
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    chosen = {}
    for name in ["gradient", *names]:
        if name.startswith("sharpkit"):
            chosen[name] = 0  # its own choice
        elif quick:
            chosen[name] = 100
        elif name == "gradient":
            chosen[name] = best_batch(lambda b: gradient_pass(model, data, b), clock)
        else:
            chosen[name] = best_batch(
                lambda b, name=name: partial(product(name, model, data, b), v), clock
            )
    functions: dict[str, Callable[[], object]] = {
        "gradient": gradient_pass(model, data, chosen["gradient"])
    }
    results = {}
    for name in names:
        f = product(name, model, data, chosen[name])
        functions[name] = lambda f=f: f(v)
        results[name] = f(v)
    times = {k: statistics.median(t) for k, t in rounds(functions, count, clock).items()}
    exact = results["sharpkit kept"]
    print("\nOne Hessian-vector product (medians)")
    for name, seconds in times.items():
        error = (
            f", {float((results[name] - exact).norm() / exact.norm()):.0e} from sharpkit"
            if name in results
            else ""
        )
        batch = f"batch {chosen[name]}" if chosen[name] else "own chunks"
        print(
            f"  {name:22s} {seconds:8.4f} s  {seconds / times['gradient']:5.2f} gradient passes"
            f"  ({batch}{error})"
        )
    peers = [times[name] for name in installed()]
    if peers:
        print(
            f"  kept: {min(peers) / times['sharpkit kept']:.2f} times as fast as the fastest peer;"
            f" recomputed: {times['sharpkit recomputed'] / min(peers):.2f} of its time"
        )
    return chosen


def bench_density(model, data, clock, count: int, chosen: dict[str, int], steps: int) -> None:
    names = ["sharpkit", "sharpkit recomputed"]
    names += [name for name in installed() if name != "PyHessian"]  # its density() does not run
    functions = {name: density(name, model, data, chosen.get(name, 0), steps) for name in names}
    functions["sharpkit, 4 probes"] = density("sharpkit", model, data, 0, steps, 4)
    times = {k: statistics.median(t) for k, t in rounds(functions, count, clock).items()}
    print(f"\n{steps}-step spectral density, operator included (medians)")
    for name, seconds in times.items():
        print(f"  {name:22s} {seconds:8.2f} s")
    peers = [times[name] for name in names if name in PEERS]
    if peers:
        print(
            f"  {min(peers) / times['sharpkit']:.2f} times as fast as the fastest peer, "
            f"recomputed {min(peers) / times['sharpkit recomputed']:.2f}"
        )
    print(f"  four probes: {times['sharpkit, 4 probes'] / times['sharpkit']:.2f} times one")
    report_accuracy(functions, model, data, steps)


def report_accuracy(functions, model, data, steps: int) -> None:
    """Copies of the largest eigenvalue, and the error of the fifth."""
    exact = sk.top_eigenvalues(sk.HessianOperator(model.double(), (data[0].double(), data[1])), 5)
    model.float()
    nodes = {"sharpkit": functions["sharpkit"]().nodes[0]}
    if "curvlinops" in functions:
        nodes["curvlinops"] = functions["curvlinops"]()[0][0].numpy()
    if "hessian-eigenthings" in functions:
        nodes["hessian-eigenthings"] = functions["hessian-eigenthings"]().raw_eigenvalues[0].numpy()
    print(f"  exact λmax {exact.values[0]:.6g}, λ5 {exact.values[4]:.6g}")
    for name, theta in nodes.items():
        copies = int((np.abs(theta / exact.values[0] - 1) < 1e-3).sum())
        fifth = np.sort(theta)[::-1][4]
        print(
            f"  {name:22s} {copies} Ritz value(s) at λmax; fifth {fifth:.6g} "
            f"({abs(fifth / exact.values[4] - 1):.1e} off)"
        )


def bench_agreement(model, data) -> None:
    """The top five eigenvalues of every contender, with settings that let it converge."""
    loader = batches(data, 100)
    mine = sk.top_eigenvalues(sk.HessianOperator(model, data), 5)
    found = {"sharpkit": (mine.values, mine.products)}
    size = sum(p.numel() for p in model.parameters())
    if "curvlinops" in installed():
        from scipy.sparse.linalg import LinearOperator, eigsh

        f, calls = product("curvlinops", model, data, 100), []

        def count(a):
            calls.append(1)
            return f(torch.from_numpy(a.astype(np.float32).ravel())).numpy()

        linear = LinearOperator((size, size), matvec=count, dtype=np.float32)
        found["curvlinops"] = eigsh(linear, 5, which="LA", tol=1e-5)[0][::-1], len(calls)
    if "hessian-eigenthings" in installed():
        from hessian_eigenthings.algorithms.lanczos import lanczos

        result = lanczos(
            eigenthings(model, loader), k=5, max_iter=60, reorthogonalize=True, which="LA", seed=0
        )
        found["hessian-eigenthings"] = np.sort(np.asarray(result.eigenvalues))[::-1], 60
    if "PyHessian" in installed():
        from pyhessian import hessian

        peer = hessian(model, nn.CrossEntropyLoss(), dataloader=loader, cuda=False)
        values, _ = peer.eigenvalues(maxIter=100, tol=1e-7, top_n=5)
        found["PyHessian"] = np.sort(values)[::-1], 500
    print("\nTop five eigenvalues")
    for name, (values, products) in found.items():
        off = np.abs(np.asarray(values) / mine.values - 1)
        flag = "agrees to 1e-4" if off.max() < 1e-4 else "DIFFERS"
        listed = " ".join(f"{v:.6g}" for v in values)
        print(f"  {name:22s} {listed}  ({products} products; off by {off.max():.1e}: {flag})")


def bench_memory(size: int, n: int) -> None:
    print("\nPeak memory of a process above its start, two products")
    for name in ["sharpkit kept", "sharpkit recomputed", *installed()]:
        done = subprocess.run(
            [sys.executable, __file__, "--worker", name, "--size", str(size), "--n", str(n)],
            capture_output=True,
            text=True,
            check=True,
        )
        report = json.loads(done.stdout.splitlines()[-1])
        stated = f"  (stated: {report['stated'] / 1e6:.0f} MB)" if report["stated"] else ""
        print(f"  {name:22s} {report['peak'] / 1e6:8.0f} MB{stated}")


def worker(name: str, size: int, n: int) -> None:
    model, data = cnn(size), images(n, size)
    model(data[0][:2]).sum().backward()
    before = peak_memory()
    f = product(name, model, data, 0 if name.startswith("sharpkit") else 100)
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    f(v), f(v)
    owner = getattr(f, "__self__", None)
    print(json.dumps({"peak": peak_memory() - before, "stated": getattr(owner, "kept_bytes", 0)}))


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def bench_scaling(clock, out: Path, quick: bool) -> None:
    """Cost against data, steps and parameters, with fitted exponents."""
    from matplotlib.figure import Figure

    top = 3 if quick else 4
    grids = {
        "examples": [250 * 2**i for i in range(top)],
        "steps": [10 * 2**i for i in range(top)],
        "parameters": [256 * 2**i for i in range(top)],  # width of a dense network
    }
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    print("\nScaling of a spectral density (exponent of a fitted power law)")
    for axis, (what, values) in zip(axes, grids.items(), strict=True):
        x, seconds = [], []
        for value in values:
            # in a convolutional network the cost follows the images, not the parameters
            model = mlp(14, value) if what == "parameters" else cnn(14, 16, 64)
            data = images(value if what == "examples" else 500, 14)
            steps = value if what == "steps" else 20
            with sk.HessianOperator(model, data) as operator:
                f = lambda o=operator, s=steps: sk.spectral_density(o, steps=s, probes=1)  # noqa: E731
                seconds.append(min(rounds({"f": f}, 3, clock)["f"]))
                x.append(operator.shape[0] if what == "parameters" else value)
        slope = np.polyfit(np.log(x), np.log(seconds), 1)[0]
        print(
            f"  {what:12s} {slope:.2f}   "
            + ", ".join(f"{a}: {b:.3f} s" for a, b in zip(x, seconds, strict=True))
        )
        axis.loglog(x, seconds, "o-")
        axis.set_xlabel(what)
        axis.set_title(f"exponent {slope:.2f}", fontsize=9)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("seconds")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    print(f"  figure: {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images, steps and rounds")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--size", type=int, default=28, help="side of the images")
    parser.add_argument("--n", type=int, default=None, help="images")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path("/tmp/bench_curvature.png"))
    parser.add_argument("--only", choices=["products", "density", "agreement", "memory", "scaling"])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    n = arguments.n or (400 if arguments.quick else 2000)
    if arguments.worker:
        worker(arguments.worker, arguments.size, n)
        return
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    model, data = cnn(arguments.size), images(n, arguments.size)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.clock} time; "
        f"{sum(p.numel() for p in model.parameters())} parameters, {n} images of "
        f"{arguments.size} x {arguments.size}; peers: {', '.join(installed()) or 'none'}"
    )
    wanted = arguments.only
    chosen: dict[str, int] = {}
    if wanted in (None, "products"):
        chosen = bench_products(model, data, clock, 5 if arguments.quick else 15, arguments.quick)
    if wanted in (None, "density"):
        steps = 10 if arguments.quick else 80
        bench_density(model, data, clock, 1 if arguments.quick else 3, chosen, steps)
    if wanted in (None, "agreement"):
        bench_agreement(model, data)
    if wanted in (None, "memory"):
        bench_memory(arguments.size, n)
    if wanted in (None, "scaling"):
        bench_scaling(clock, arguments.out, arguments.quick)


if __name__ == "__main__":
    main()
