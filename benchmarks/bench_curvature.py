"""sharpkit's curvature against curvlinops, pytorch-hessian-eigenthings and PyHessian.

    make bench                                      # or, once that has made .venv-bench:
    .venv-bench/bin/python benchmarks/bench_curvature.py [--quick] [--clock cpu]

Everything is measured in interleaved rounds, so that a slow moment of the machine hits all
contenders: one Hessian-vector product in units of a gradient pass, of a CNN and of a ResNet-20, as
it is and compiled (where there is a C++ compiler), and of a smooth network by finite differences;
an 80-step density with one and four probes; agreement of the top five eigenvalues; peak memory,
each contender in a process of its own; and how the cost grows with data, steps and parameters
(`--figure` draws it). Every contender runs at the batch size that is fastest for it. `--clock cpu`
counts processor time instead of wall time: steadier on a busy machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timing import Case, Record, parser, run_cases
from torch import nn
from torch.nn import functional as F

import sharpkit.curvature as sk
from sharpkit.training.architectures import build_architecture

BATCHES = (50, 100, 200, 500)
OURS: dict[str, dict[str, object]] = {
    "sharpkit": {},
    "sharpkit past its budget": {"memory_budget": 0},
}  # name -> options
PEERS = {
    "curvlinops": "curvlinops",
    "hessian-eigenthings": "hessian_eigenthings",
    "PyHessian": "pyhessian",
}


COMPILED = {"sharpkit compiled": "sharpkit", "curvlinops compiled": "curvlinops"}


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


def resnet20(n: int) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """He et al.'s network for 32x32 images with BatchNorm statistics of its data, and the data."""
    model = build_architecture("resnet20", (3, 32, 32), 10, seed=0)
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 3, 32, 32, generator=g), torch.arange(n) % 10
    with torch.no_grad():
        model.train()(x)
    return model.eval(), (x, y)


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
    if name in OURS:
        return sk.HessianOperator(model, data, **OURS[name]).matvec
    if name == "sharpkit compiled":
        return sk.HessianOperator(model, data, compile=True).matvec
    if name.startswith("curvlinops"):
        operator = curvlinops_operator(model, loader)
        if name in COMPILED:
            operator._mp = traced_and_compiled(operator._mp)
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


def curvlinops_operator(model, loader):
    from curvlinops import HessianLinearOperator

    return HessianLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        loader,
        check_deterministic=False,
    )


def traced_and_compiled(function: Callable[..., object]) -> Callable[..., object]:
    """A peer's function of one batch, as one graph per shape.

    `torch.compile` of the function itself breaks at its first `vmap`, and compiles nothing.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    known: dict[object, Callable[..., object]] = {}

    @torch.no_grad()
    def run(*args: torch.Tensor) -> object:
        key = tuple(t.shape for t in args)
        if key not in known:
            known[key] = torch.compile(make_fx(function)(*args), fullgraph=True)
        return known[key](*args)

    return run


def eigenthings(model, loader):
    from hessian_eigenthings.loss_fns.standard import supervised_loss
    from hessian_eigenthings.operators.hessian import HessianOperator

    return HessianOperator(model, loader, supervised_loss(nn.CrossEntropyLoss()))


def density(name: str, model, data, batch, steps: int, probes: int = 1) -> Callable[[], object]:
    """A spectral density of a contender, its operator's construction included."""
    loader = batches(data, batch or 100)

    def run() -> object:
        if name in OURS:
            with sk.HessianOperator(model, data, **OURS[name]) as operator:
                return sk.spectral_density(operator, steps=steps, probes=probes)
        if name == "curvlinops":
            from curvlinops.papyan2020traces.spectrum import fast_lanczos

            operator = curvlinops_operator(model, loader)
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


def compiled() -> list[str]:
    """Contenders whose products are compiled, where that is possible."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        return []
    here = {"sharpkit", *installed()}
    return [name for name, eager in COMPILED.items() if eager in here]


def in_units(times: dict[str, list[float]], name: str, unit: str) -> list[float]:
    """Times of one contender in those of another of the same round."""
    return [a / b for a, b in zip(times[name], times[unit], strict=True)]


def against_peers(case: str, times: dict[str, list[float]], bounds: tuple[str, str]):
    """How sharpkit compares with the fastest peer, within and past its memory budget."""
    peers = [name for name in times if name in PEERS]
    if not peers:
        return
    fastest = min(peers, key=lambda name: statistics.median(times[name]))
    for name, bound in zip(OURS, bounds, strict=True):
        values = in_units(times, name, fastest)
        yield Record(f"{case}, against the fastest peer", name, f"time of {fastest}", values, bound)


def best_batches(model, data, arguments) -> dict[str, int]:
    """Of the gradient pass and of each peer; sharpkit chooses its own."""
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    make = {"gradient": lambda b: gradient_pass(model, data, b)}
    for name in installed():
        make[name] = lambda b, name=name: partial(product(name, model, data, b), v)
    return {k: 100 if arguments.quick else best_batch(f, arguments.clock) for k, f in make.items()}


def products(arguments: argparse.Namespace) -> Iterator[Record]:
    """One Hessian-vector product of every contender, in gradient passes."""
    model, data = problem(arguments)
    yield from products_of(described(model, data), model, data, "<= 1.0", arguments)
    n = 64 if arguments.quick else 512
    model, data = resnet20(n)
    yield from products_of(f"ResNet-20, {n} images", model, data, "<= 1.9", arguments)


def products_of(network: str, model, data, target: str, arguments) -> Iterator[Record]:
    batch = best_batches(model, data, arguments)
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    functions: dict[str, Callable[[], object]] = {
        "gradient": gradient_pass(model, data, batch["gradient"])
    }
    results = {}
    for name in [*OURS, *installed(), *compiled()]:
        f = product(name, model, data, batch.get(COMPILED.get(name, name), 0))
        functions[name] = partial(f, v)
        results[name] = f(v)
    times = rounds(functions, 5 if arguments.quick else 15, arguments.clock)
    case = f"Hessian-vector product, {network}"
    for name in results:
        bound = target if name == "sharpkit" else ""
        yield Record(case, name, "gradient passes", in_units(times, name, "gradient"), bound)
    yield from against_peers(case, times, ("", "<= 1.1"))
    exact = results.pop("sharpkit")
    for name, found in results.items():
        off = float((found - exact).norm() / exact.norm())
        # a ReLU that switches by rounding is 3e-4 of the ResNet's product in float32
        yield Record(f"{case}, difference", name, "of sharpkit's norm", [off], "<= 1e-3")


def differences(arguments: argparse.Namespace) -> Iterator[Record]:
    """Products by finite differences beside exact ones, of a smooth network, in gradient passes."""
    _, data = problem(arguments)
    model = mlp(arguments.size, 256)
    functions: dict[str, Callable[[], object]] = {"gradient": gradient_pass(model, data, 100)}
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    operators = {
        f"{kind.__name__}, {method}": kind(model, data, method=method)
        for kind in (sk.HessianOperator, sk.GaussNewtonOperator)
        for method in ("exact", "finite_difference")
    }
    functions |= {name: partial(operator.matvec, v) for name, operator in operators.items()}
    times = rounds(functions, 5 if arguments.quick else 15, arguments.clock)
    case = f"product by finite differences, tanh network, {len(data[0]):,} images"
    for name in operators:
        yield Record(case, name, "gradient passes", in_units(times, name, "gradient"))
    for kind in ("HessianOperator", "GaussNewtonOperator"):
        by, exact = operators[f"{kind}, finite_difference"], operators[f"{kind}, exact"] @ v
        off, size = float((by @ v - exact).norm()), float(exact.norm())
        yield Record(f"{case}, error", kind, "of the exact norm", [off / size], "<= 1e-2")
        yield Record(f"{case}, error", kind, "of its estimate", [off / by.errors[0]], "<= 1")


def density_of_all(arguments: argparse.Namespace) -> Iterator[Record]:
    """A spectral density of every contender that has one, and four probes."""
    model, data = problem(arguments)
    batch = best_batches(model, data, arguments)
    steps = 10 if arguments.quick else 80
    names = [*OURS, *(name for name in installed() if name != "PyHessian")]  # its does not run
    functions = {name: density(name, model, data, batch.get(name, 0), steps) for name in names}
    functions["four probes"] = density("sharpkit", model, data, 0, steps, 4)
    times = rounds(functions, 1 if arguments.quick else 3, arguments.clock)
    case = f"{steps}-step spectral density, {described(model, data)}"
    for name in names:
        yield Record(case, name, "s", times[name])
    yield from against_peers("spectral density", times, ("<= 0.625", "<= 1.1"))  # 1.6 times as fast
    four = in_units(times, "four probes", "sharpkit")
    yield Record("spectral density, four probes", "sharpkit", "one probe", four, "<= 4")
    yield from accuracy(functions, model, data)


def accuracy(functions, model, data) -> Iterator[Record]:
    """Copies of the largest eigenvalue among the Ritz values, and the error of the fifth."""
    operator = sk.HessianOperator(model.double(), (data[0].double(), data[1]))
    exact = sk.top_eigenvalues(operator, 5).values
    model.float()
    nodes = {"sharpkit": functions["sharpkit"]().nodes[0]}
    if "curvlinops" in functions:
        nodes["curvlinops"] = functions["curvlinops"]()[0][0].numpy()
    if "hessian-eigenthings" in functions:
        nodes["hessian-eigenthings"] = functions["hessian-eigenthings"]().raw_eigenvalues[0].numpy()
    for name, theta in nodes.items():
        copies = int((np.abs(theta / exact[0] - 1) < 1e-3).sum())
        yield Record("spectral density, Ritz values at λmax", name, "copies", [copies])
    for name, theta in nodes.items():
        error = abs(float(np.sort(theta)[::-1][4]) / exact[4] - 1)
        yield Record("spectral density, fifth Ritz value", name, "relative error of λ5", [error])


def agreement(arguments: argparse.Namespace) -> Iterator[Record]:
    """The top five eigenvalues of every contender, with settings that let it converge."""
    model, data = problem(arguments)
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
    for name, (_, count_) in found.items():
        yield Record("top five eigenvalues, products at most", name, "products", [count_])
    for name, (values, _) in found.items():
        if name != "sharpkit":
            off = float(np.abs(np.asarray(values) / mine.values - 1).max())
            yield Record(
                "top five eigenvalues, difference", name, "of sharpkit's", [off], "<= 1e-4"
            )


def memory(arguments: argparse.Namespace) -> Iterator[Record]:
    """Peak of a process above its start, two products."""
    case = "memory of two Hessian-vector products"
    for name in [*OURS, *installed()]:
        command = [sys.executable, __file__, "--worker", name, "--size", str(arguments.size)]
        done = subprocess.run(
            [*command, "--n", str(arguments.n)], stdout=subprocess.PIPE, text=True, check=True
        )
        report = json.loads(done.stdout.splitlines()[-1])
        yield Record(case, name, "MB", [report["peak"] / 1e6])
        if report["stated"]:
            yield Record(f"{case}, as stated", name, "MB", [report["stated"] / 1e6])


def worker(name: str, size: int, n: int) -> None:
    model, data = cnn(size), images(n, size)
    model(data[0][:2]).sum().backward()
    before = peak_memory()
    f = product(name, model, data, 0 if name in OURS else 100)
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    f(v), f(v)
    owner = getattr(f, "__self__", None)
    print(json.dumps({"peak": peak_memory() - before, "stated": getattr(owner, "kept_bytes", 0)}))


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def scaling(arguments: argparse.Namespace) -> Iterator[Record]:
    """Exponents of the cost against data, steps and parameters."""
    top = 3 if arguments.quick else 4
    grids = {
        "examples": [250 * 2**i for i in range(top)],
        "steps": [10 * 2**i for i in range(top)],
        "parameters": [256 * 2**i for i in range(top)],  # width of a dense network
    }
    curves = {}
    for what, values in grids.items():
        x, seconds = [], []
        for value in values:
            # in a convolutional network the cost follows the images, not the parameters
            model = mlp(14, value) if what == "parameters" else cnn(14, 16, 64)
            data = images(value if what == "examples" else 500, 14)
            steps = value if what == "steps" else 20
            with sk.HessianOperator(model, data) as operator:
                f = partial(sk.spectral_density, operator, steps=steps, probes=1)
                seconds.append(min(rounds({"f": f}, 3, arguments.clock)["f"]))
                x.append(operator.shape[0] if what == "parameters" else value)
        curves[what] = x, seconds
        exponent = float(np.polyfit(np.log(x), np.log(seconds), 1)[0])
        case = f"spectral density, growth with {what}"
        yield Record(case, "sharpkit", "exponent of a power law", [exponent], "<= 1.1")
    if arguments.figure:
        draw(curves, arguments.figure)


def draw(curves: dict[str, tuple[list[int], list[float]]], path: Path) -> None:
    """Time against examples, steps and parameters, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (what, (x, seconds)) in zip(axes, curves.items(), strict=True):
        slope = np.polyfit(np.log(x), np.log(seconds), 1)[0]
        axis.loglog(x, seconds, "o-")
        axis.set_xlabel(what)
        axis.set_title(f"exponent {slope:.2f}", fontsize=9)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def problem(arguments: argparse.Namespace):
    return cnn(arguments.size), images(arguments.n, arguments.size)


def described(model, data) -> str:
    size = sum(p.numel() for p in model.parameters())
    return f"CNN {size / 1e6:.2f} M, {len(data[0]):,} images"


CASES: dict[str, Case] = {
    "products": products,
    "differences": differences,
    "density": density_of_all,
    "agreement": agreement,
    "memory": memory,
    "scaling": scaling,
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    options = parser(__doc__, CASES)
    options.add_argument("--clock", choices=CLOCKS, default="wall")
    options.add_argument("--size", type=int, default=28, help="side of the images")
    options.add_argument("--n", type=int, default=None, help="images")
    options.add_argument("--figure", type=Path, help="of the growth with data, steps, parameters")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    warnings.filterwarnings("ignore")
    arguments.n = arguments.n or (400 if arguments.quick else 2000)
    arguments.clock = CLOCKS[arguments.clock]
    if arguments.worker:
        worker(arguments.worker, arguments.size, arguments.n)
    else:
        print(f"peers: {', '.join(installed()) or 'none'}; {torch.get_num_threads()} threads")
        run_cases(arguments, CASES)


if __name__ == "__main__":
    main()
