"""Time and memory from 0.1 M to 1 B parameters: counted at every size, rates from this machine.

    PYTHONPATH=. python benchmarks/sizes.py [--quick] [--busy] [--threads 2] [--examples 2000]

The networks are vision transformers on 64 patches of images of 32 pixels. Operations and memory
of every size are counted without weights (device "meta"), memory as sharpkit's own plan for a CPU
counts it. On this machine sizes up to 10 M are measured: the rate of a gradient pass, m-sharpness
in gradient and forward passes, a product with the Hessian in gradient passes; larger sizes take
the figures of the largest measured. `--busy` takes processor time over the threads in place of
wall time, for a machine that something else runs on. The column of a GPU is computed: the counts,
at the rate that sharpkit's plans assume for it, and the ratios recorded in
results/nvidia-h100-80gb-hbm3.json. Less than three minutes on two idle cores; writes
results/sizes.json and results/sizes.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from networks import VisionTransformer
from run_all import commit, describe_machine
from torch import Tensor, nn

import sharpkit
from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.losses import cross_entropy
from sharpkit.curvature.lanczos import basis_bytes
from sharpkit.curvature.memory import gigabytes
from sharpkit.groupwise.survey import CPU, GPU, Survey, survey
from sharpkit.sharpness.sweep_plan import cpu_batch, cpu_chunk

RESULTS = Path(__file__).resolve().parent / "results"
RECORDED = RESULTS / "nvidia-h100-80gb-hbm3.json"
SHAPES = {  # width, depth, heads
    "0.1 M": (64, 2, 2),
    "1 M": (128, 5, 4),
    "10 M": (256, 13, 8),
    "100 M": (832, 12, 13),
    "1 B": (1856, 24, 29),
}
MEASURED = {"0.1 M": 512, "1 M": 256, "10 M": 32}  # examples
MS = (1, 16, 256)
STEPS, PROBES, BATCH = 80, 1, 64
BUDGET = 4 * 2**30  # of a chunk, and of kept graphs, on a CPU
GPU_MEMORY = 80 * 2**30


@dataclass(frozen=True)
class Counts:
    """What a size costs, counted: operations and bytes in float32."""

    parameters: int
    forward: float  # operations of a forward pass over one example
    saved: int  # bytes that a gradient keeps for one example
    calls: int  # operations that a forward pass launches
    weights: int  # bytes
    own: int  # bytes of the gradient of a group at m = 1, in factors where these take less time


@dataclass(frozen=True)
class Rates:
    """What a device takes: operations a second, and passes."""

    flops: float
    units: Mapping[int, float]  # m-sharpness in a gradient and a forward pass, by m
    kept: float  # a product in gradient passes, where the graph is kept
    again: float  # where it is recorded again
    graph: float  # bytes of a kept graph in those that a gradient saves
    call: float = 0.0  # seconds that a call takes at least


def network(name: str, device: str = "cpu") -> nn.Module:
    with torch.device(device):
        torch.manual_seed(0)
        return VisionTransformer(32, 4, *SHAPES[name], 10).eval()


def counts(name: str) -> Counts:
    """The counts of a size, without its weights."""
    model = network(name, "meta")
    weights = {key: p.detach() for key, p in model.named_parameters()}
    images, labels = (
        torch.zeros(2, 3, 32, 32, device="meta"),
        torch.zeros(2, dtype=torch.long, device="meta"),
    )
    with mock.patch("torch.is_autocast_enabled", return_value=False):  # it knows no "meta"
        found: Survey = survey(FunctionalModel(model), weights, Examples(images, labels))
    factored = found.factored(weights)
    own = sum(
        factored[key].nbytes(w) if key in factored else w.nbytes for key, w in weights.items()
    )
    total = sum(w.numel() for w in weights.values())
    saved = saved_bytes(model, images) - saved_bytes(model, images[:1])
    return Counts(total, found.flops, saved, found.calls, 4 * total, own)


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes of what autograd keeps of a forward pass, each storage once, weights left out."""
    kept: dict[int, tuple[Tensor, int]] = {}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = t, storage.nbytes()
        return t

    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        outputs = model(images)
    del outputs
    return sum(size for _, size in kept.values())


def sharpness_bytes(c: Counts, m: int) -> int:
    """What `m_sharpness` takes on a CPU: its plan, the model, and the copy it is put back from."""
    if m >= CPU.alone(c.forward, c.calls):  # one by one: weights that move, and a gradient
        return min(cpu_batch(c.saved, BUDGET), m) * c.saved + 4 * c.weights

    def side_by_side(chunk: int) -> int:
        return chunk * c.saved + 2 * math.ceil(chunk / m) * c.own

    return side_by_side(cpu_chunk(side_by_side, c.saved, BUDGET)) + 2 * c.weights


def density_bytes(c: Counts) -> int:
    """What a density takes: the Lanczos basis, and the graph of an example.

    Beside them are the model, the copy it is put back from, the operator's own weights, the
    gradient, and the vectors of a product.
    """
    basis = basis_bytes(c.parameters, STEPS, PROBES, torch.float32)
    return basis + 6 * c.weights + 2 * c.saved


def seconds(c: Counts, rates: Rates, n: int, passes: float) -> float:
    """Of so many gradient passes, three forward passes each, over n examples."""
    work = 3 * c.forward * n / rates.flops
    launches = 3 * c.calls * rates.call * math.ceil(n / BATCH)
    return passes * max(work, launches)


def sharpness_seconds(c: Counts, rates: Rates, n: int, m: int) -> float:
    return seconds(c, rates, n, rates.units[m] * 4 / 3)


def density_seconds(c: Counts, rates: Rates, n: int, budget: int) -> float:
    share = min(1.0, budget / (rates.graph * c.saved * n))
    product = share * rates.kept + (1 - share) * rates.again
    return seconds(c, rates, n, STEPS * PROBES * product)


def measured(name: str, c: Counts, quick: bool, clock: Callable[[], float]) -> Rates:
    """The rates of this machine at one size."""
    n, repeats = max(16, MEASURED[name] // (16 if quick else 1)), 1 if quick else 2
    model = network(name)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, 32, 32, generator=generator)
    y = torch.randint(10, (n,), generator=generator)

    def gradient() -> None:
        for a in range(0, n, BATCH):
            loss = cross_entropy(model(x[a : a + BATCH]), y[a : a + BATCH])
            torch.autograd.grad(loss, list(model.parameters()))

    pass_seconds = best(gradient, 2, clock)
    units = {}
    for m in MS:
        if m > n:
            units[m] = units[16]
            continue
        took = best(
            lambda m=m: sharpkit.m_sharpness(model, (x, y), m=m, rho=0.05, progress=False),
            repeats, clock,
        )  # fmt: skip
        units[m] = took / (pass_seconds * 4 / 3)
    products, graph = {}, 0.0
    for key, budget in (("kept", None), ("again", 0)):
        with sharpkit.HessianOperator(model, (x, y), memory_budget=budget, progress=False) as h:
            v = torch.randn(h.shape[0], generator=generator)
            h @ v
            products[key] = best(lambda h=h, v=v: h @ v, repeats, clock) / pass_seconds
            if h.kept_chunks:
                graph = h.kept_bytes / (h.kept_chunks * n / h.chunks) / c.saved
    flops = 3 * c.forward * n / pass_seconds
    return Rates(flops, units, products["kept"], products["again"], graph)


def best(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """Seconds of the fastest of a few runs: what disturbs only adds to it."""
    found = []
    for _ in range(repeats):
        began = clock()
        run()
        found.append(clock() - began)
    return min(found)


def recorded_gpu(graph: float) -> Rates:
    """A GPU from its recorded ratios, in full float32."""
    records = json.loads(RECORDED.read_text())["records"]

    def median(case: str, contender: str) -> float:
        (found,) = (r for r in records if (r["case"], r["contender"]) == (case, contender))
        return float(found["median"])

    unit = median("m-sharpness in passes, WRN-28-10, m = 1", "sharpkit")
    case = "Hessian-vector product, ResNet-20, 4,096 images"
    return Rates(
        GPU.flops, dict.fromkeys(MS, unit), median(case, "sharpkit"),
        median(case, "sharpkit past its budget"), graph, GPU.call,
    )  # fmt: skip


def table(rows: Mapping[str, Mapping[str, float]], n: int) -> str:
    """Markdown: time on this machine and on a GPU, and memory, for each size and task."""
    tasks = [f"m = {m}" for m in MS] + ["density"]
    lines = [
        f"| parameters | task, {n:,} examples | 2 cores | one H100 (computed) | memory |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        for task in tasks:
            cpu, gpu, memory = (row[f"{task}, {kind}"] for kind in ("cpu", "gpu", "bytes"))
            first = "m-sharpness, " + task if task != "density" else f"density, {STEPS} steps"
            fits = "" if memory <= GPU_MEMORY else ", does not fit"
            lines.append(
                f"| {name} | {first} | {duration(cpu)} | {duration(gpu)}{fits} "
                f"| {gigabytes(int(memory))} |"
            )
    return "\n".join(lines)


def heading(result: Mapping[str, Any]) -> str:
    """Where, with what and how carefully it was measured."""
    machine = result["machine"]
    how = "a trial with few examples" if result["quick"] else "two runs each, the faster one"
    if result["busy"]:
        how += "; processor time over the threads, since the machine was busy"
    return (
        f"Measured on {machine['cores']} cores of {machine['processor']}, {result['threads']} "
        f"threads, commit {result['commit']} ({how}).\n\n"
    )


def duration(took: float) -> str:
    """A time for people, two digits.

    >>> duration(0.5), duration(90), duration(200_000)
    ('0.5 s', '1.5 min', '2.3 days')
    """
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if took >= size:
            return f"{float(f'{took / size:.2g}'):g} {unit}"
    return f"{float(f'{max(took, 0.01):.1g}' if took < 1 else f'{took:.2g}'):g} s"


def rows_of(
    found: Mapping[str, Counts], cpu: Mapping[str, Rates], gpu: Rates, n: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """Time and memory of every size and task."""
    rates = next(iter(cpu.values()))
    for name, c in found.items():
        rates = cpu.get(name, rates)  # of the largest measured so far
        row: dict[str, float] = {}
        for m in MS:
            row[f"m = {m}, cpu"] = sharpness_seconds(c, rates, n, m)
            row[f"m = {m}, gpu"] = sharpness_seconds(c, gpu, n, m)
            row[f"m = {m}, bytes"] = sharpness_bytes(c, m)
        row["density, cpu"] = density_seconds(c, rates, n, BUDGET)
        row["density, gpu"] = density_seconds(c, gpu, n, GPU_MEMORY // 2)
        row["density, bytes"] = density_bytes(c)
        yield name, row


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--quick", action="store_true", help="Fewer examples: to try the script.")
    options.add_argument("--busy", action="store_true", help="Processor time over the threads.")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--examples", type=int, default=2000, help="Of the table.")
    options.add_argument("--results", type=Path, default=RESULTS, help="Folder of both files.")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    clock = time.perf_counter
    if given.busy:
        clock = lambda: time.process_time() / given.threads  # noqa: E731
    began = time.monotonic()
    found = {name: counts(name) for name in SHAPES}
    cpu = {}
    for name in MEASURED:
        cpu[name] = measured(name, found[name], given.quick, clock)
        print(f"{name}: {cpu[name]}", file=sys.stderr)
    gpu = recorded_gpu(cpu["10 M"].graph)
    rows = dict(rows_of(found, cpu, gpu, given.examples))
    result = {
        "machine": describe_machine(), "threads": given.threads, "commit": commit(),
        "seconds": round(time.monotonic() - began), "quick": given.quick, "busy": given.busy,
        "examples": given.examples, "counts": {k: asdict(c) for k, c in found.items()},
        "rates": {k: asdict(r) for k, r in cpu.items()}, "gpu": asdict(gpu), "rows": rows,
    }  # fmt: skip
    given.results.mkdir(parents=True, exist_ok=True)
    (given.results / "sizes.json").write_text(json.dumps(result, indent=1) + "\n")
    page = heading(result) + table(rows, given.examples)
    (given.results / "sizes.md").write_text(page + "\n")
    print(page)


if __name__ == "__main__":
    main()
