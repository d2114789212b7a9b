"""Every speed figure of a GPU as one table, in at most six minutes: `make bench-gpu`.

    PYTHONPATH=. python benchmarks/gpu.py [--quick] [--only TEXT] [--device cuda] [--seconds N]
                                          [--out FILE]

What is measured, and how, is as in `bench_speed.py`; a loop of many small groups runs over 64 of
them. It takes what a CUDA image of PyTorch has and sharpkit's own requirements; sharpkit itself
may be a source tree. Peers that are installed are measured too.

Each case may take its share of the time that is left. A short share means fewer repetitions, and
what is last in the list is left out when the time is over; the end says what was. A case that
fails, such as for want of memory, is a row, and the others run. `--quick` is for trying the script.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import inspect
import json
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import bench_curvature
import factory
import torch
from bench_speed import (
    LOOP,
    MS,
    PARTS,
    SAM_MS,
    STEPS,
    UNIT,
    How,
    Sharpness,
    Steps,
    calls_of,
    m_sam_step,
    sweep_of,
)
from loops import Layouts, gradient_pass, sgd_step
from networks import NETWORKS
from run_all import commit, machine_name
from timing import HEADER, Record, in_turn, over, row
from torch import nn

import sharpkit
from sharpkit.contract.precision import measuring_precision
from sharpkit.runs.provenance import own_version

BEGAN = time.monotonic()
HERE = Path(__file__).resolve().parent
GRADIENTS, PROBE = "gradient passes", "one probe"
TIMES = {UNIT, LOOP, STEPS, PARTS, GRADIENTS, PROBE}
EXAMPLES = {
    "CNN 0.47 M": 8192, "ResNet-20": 4096, "WRN-28-10": 512, "VGG 19.2 M": 1024, "ResNet-50": 256,
    "ViT-B/16": 256, "small ViT": 4096, "LSTM": 8192, "WRN-16-4": 2048,
}  # fmt: skip
IN_UNITS = {  # at m = 1
    "CNN 0.47 M": {"full": "<= 6.5", "tf32": "<= 4"},
    "ResNet-20": {"full": "<= 5", "tf32": "<= 3.2"},
    "WRN-28-10": {"full": "<= 1.8", "tf32": "<= 4"},
}
IN_STEPS = {"CNN 0.22 M": "<= 5", "ResNet-20": "<= 5", "WRN-28-10": "<= 6"}
IN_GRADIENTS = {"CNN 0.11 M": "<= 1.2", "ResNet-20": "<= 1.9"}
# all images of the small one, which is bound by launches; of the other, what fits
PEER_BATCH = {"CNN 0.11 M": 10_000, "ResNet-20": 1024}
WEIGHTS = {"WRN-28-10": 4, "ResNet-50": 4, "ViT-B/16": 5, "VGG 19.2 M": 2, "ResNet-20": 2}


@dataclass(frozen=True)
class Job:
    """One case.

    Attributes:
        name: For the list of what was left out or failed.
        weight: Of its share of the time.
        run: Measures it.
    """

    name: str
    weight: float
    run: Callable[[How], Iterator[Record]]


@dataclass(frozen=True)
class Sizes:
    """How large everything is: as wanted, or to try the script."""

    networks: tuple[str, ...]
    images: int | None  # instead of EXAMPLES
    ms: tuple[int, ...]
    sam_ms: tuple[int, ...]
    batch: int
    sam: tuple[str, ...]
    curvature: tuple[str, ...]
    curvature_images: int
    steps: int
    calls: tuple[str, ...]
    counted: tuple[int, int]  # images of which the waits are compared
    factory: factory.Sizes


FULL = Sizes(
    networks=tuple(EXAMPLES), images=None, ms=MS,
    sam=tuple(IN_STEPS), sam_ms=SAM_MS, batch=128,
    curvature=tuple(IN_GRADIENTS), curvature_images=10_000, steps=20,
    calls=("CNN 0.47 M", "ResNet-20"), counted=(128, 512),
    factory=factory.FULL,
)  # fmt: skip
QUICK = Sizes(
    networks=("CNN 0.47 M", "LSTM"), images=16, ms=(1, 16),
    sam=("CNN 0.22 M",), sam_ms=(1, 16), batch=16,
    curvature=("CNN 0.11 M",), curvature_images=48, steps=3,
    calls=("CNN 0.47 M",), counted=(32, 128),
    factory=factory.QUICK,
)  # fmt: skip


@contextmanager
def computing(kind: Literal["full", "tf32"]) -> Iterator[None]:
    """Loops and ordinary passes compute as sharpkit does."""
    with sharpkit.precision(kind), measuring_precision():
        yield


@lru_cache(maxsize=1)
def bench_of(name: str, n: int, how: How, kind: str) -> Sharpness:
    """The network and its data, kept from one m to the next."""
    return Sharpness(name, NETWORKS[name], n, how)


@lru_cache(maxsize=1)
def steps_of(name: str, batch: int, how: How) -> Steps:
    return Steps(name, NETWORKS[name], batch, how)


# --- the cases, the most important first ------------------------------------------------------


def jobs_of(sizes: Sizes, device: str, base: How) -> Iterator[Job]:
    """All cases."""
    gpu = torch.device(device).type == "cuda"
    for name in sizes.networks[:3]:
        yield from sharpness_jobs(sizes, gpu, base, name)
    for name in sizes.sam:
        for m in sizes.sam_ms:
            run = partial(m_sam, sizes, base, name, m)
            yield Job(f"m-SAM, {name}, m = {m}", WEIGHTS.get(name, 1), run)
    for name in sizes.curvature:
        yield Job(f"products, {name}", 3, partial(products, sizes, device, name, False))
    for name in sizes.calls:
        run = partial(calls_of, name, NETWORKS[name], device, sizes.counted)
        yield Job(f"calls and waits, {name}", 1, lambda how, run=run: in_full(run))
    for name in sizes.networks[3:]:
        yield from sharpness_jobs(sizes, gpu, base, name)
    yield Job("many pairs in one call", 3, partial(pairs, sizes))
    yield Job("four probes", 4, partial(probes, sizes, device))
    yield from factory_jobs(sizes.factory, device)
    for name in sizes.curvature if installed_peers() else ():
        run = partial(products, sizes, device, name, True)
        yield Job(f"products of the peers, {name}", 6, run)
    if can_compile(sharpkit.training.m_sam_gradient) and compiler():
        yield Job("compiled", 6, partial(compiled, sizes, base))


def factory_jobs(sizes: factory.Sizes, device: str) -> Iterator[Job]:
    """Training and scoring of zoos."""
    for preset in sizes.presets:
        for recipe in factory.recipes_of(preset):
            for stack in sizes.stacks:
                run = partial(factory.training, sizes, device, preset, recipe, stack)
                name = f"factory, training, {preset}, batch {recipe.batch_size}, stack of {stack}"
                yield Job(name, 2, run)
    for processes in sizes.processes:
        run = partial(factory.scoring, sizes, device, "processes", workers=processes)
        yield Job(f"factory, scoring, {processes} processes", 4, run)
    for stack in sizes.scored:
        run = partial(factory.scoring, sizes, device, "in a stack", stack=stack)
        yield Job(f"factory, scoring, {stack} in a stack", 4, run)


def sharpness_jobs(sizes: Sizes, gpu: bool, base: How, name: str) -> Iterator[Job]:
    """m-sharpness of one network."""
    weight = WEIGHTS.get(name, 1)
    if gpu and name in IN_UNITS:
        run = partial(against_loop, sizes, base, name, 1, "tf32")
        yield Job(f"m-sharpness, {name}, m = 1, TF32", weight, run)
    for m in sizes.ms:
        run = partial(against_loop, sizes, base, name, m, "full")
        yield Job(f"m-sharpness, {name}, m = {m}", weight, run)


def count(sizes: Sizes, name: str) -> int:
    return sizes.images or EXAMPLES[name]


def in_full(run: Callable[[], Iterator[Record]]) -> Iterator[Record]:
    with computing("full"):
        yield from run()


def pairs(sizes: Sizes, how: How) -> Iterator[Record]:
    name = "CNN 0.47 M"
    with computing("full"):
        yield from sweep_of(name, NETWORKS[name], count(sizes, name), sizes.ms, how)


def against_loop(
    sizes: Sizes, base: How, name: str, m: int, kind: Literal["full", "tf32"], how: How
) -> Iterator[Record]:
    with computing(kind):
        mine = bench_of(name, count(sizes, name), base, kind)
        mine.how = how
        for record in mine.against_loop(m, IN_UNITS.get(name, {}).get(kind, "")):
            if kind == "full":
                yield record
            elif not record.case.endswith("of the call"):  # its memory is asked of float32
                yield replace(record, case=f"{record.case}, TF32")
        if m == sizes.ms[1] and kind == "full":
            case = f"m-sharpness, {name}, m = {m}, difference"
            yield Record(case, "plain loop", "of sharpkit's", [mine.difference(m)])


def m_sam(sizes: Sizes, base: How, name: str, m: int, how: How) -> Iterator[Record]:
    """With the precision that torch has: a step of training is not a measurement."""
    mine = steps_of(name, sizes.batch, base)
    mine.how = how
    yield from mine.m_sam(m, IN_STEPS[name] if m == 1 else "")


def products(sizes: Sizes, device: str, name: str, peers: bool, how: How) -> Iterator[Record]:
    """One Hessian-vector product in gradient passes: sharpkit's, or those of the peers."""
    with computing("full"):
        model, x, y = curvature_problem(sizes, device, name)
        best = Layouts(model, x, y, gradient_pass).best(how.batches)
        v = torch.randn(sum(p.numel() for p in model.parameters()), device=device)
        runs = {"gradient": lambda: gradient_pass(best.model, best.x, best.y, best.batch)}
        runs["gradient"]()
        results, case = {}, f"Hessian-vector product, {name}, {len(x):,} images"
        make = peers_of if peers else ours_of
        exact = ours_of(model, (x, y), 0)["sharpkit"]()(v)
        for contender, prepare in make(model, (x, y), PEER_BATCH[name]).items():
            try:
                product = prepare()
                results[contender] = product(v)
                runs[contender] = partial(product, v)
            except Exception as error:
                yield failed(f"{case}, {contender}", error)
        times = in_turn(runs, how.repeats, how.seconds)
        for contender, found in results.items():
            bound = IN_GRADIENTS[name] if contender == "sharpkit" else ""
            values = over(times, contender, "gradient")
            yield Record(case, contender, GRADIENTS, values, bound)
            if contender != "sharpkit":
                off = float((found - exact).norm() / exact.norm())
                yield Record(f"{case}, difference", contender, "of sharpkit's", [off], "<= 1e-3")


def curvature_problem(
    sizes: Sizes, device: str, name: str
) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    if name == "ResNet-20":
        return NETWORKS[name].case(min(4096, sizes.curvature_images), device)
    x, y = bench_curvature.images(sizes.curvature_images, 28)
    return bench_curvature.cnn(28).to(device), x.to(device), y.to(device)


Products = dict[str, Callable[[], Callable[[torch.Tensor], torch.Tensor]]]  # what makes each


def ours_of(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], batch: int) -> Products:
    def operator(**options: object) -> Callable[[torch.Tensor], torch.Tensor]:
        return sharpkit.HessianOperator(model, data, progress=False, **options).matvec

    found = {"sharpkit": operator, "sharpkit past its budget": partial(operator, memory_budget=0)}
    if can_compile(sharpkit.HessianOperator) and compiler():
        found["sharpkit compiled"] = partial(operator, compile=True)
    return found


def peers_of(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], batch: int) -> Products:
    def compiled_peer() -> Callable[[torch.Tensor], torch.Tensor]:
        loader = bench_curvature.batches(data, batch)
        peer = bench_curvature.curvlinops_operator(model, loader)
        peer._mp = bench_curvature.traced_and_compiled(peer._mp)  # its function of one batch
        return lambda v: peer @ v

    found: Products = {
        name: partial(bench_curvature.product, name, model, data, batch)
        for name in installed_peers()
    }
    if "curvlinops" in found and compiler():
        found["curvlinops compiled"] = compiled_peer
    return found


def installed_peers() -> list[str]:
    peers = bench_curvature.PEERS.items()
    return [name for name, module in peers if importlib.util.find_spec(module)]


def probes(sizes: Sizes, device: str, how: How) -> Iterator[Record]:
    """A density with four probes in those with one."""
    model, x, y = curvature_problem(sizes, device, "CNN 0.11 M")
    with sharpkit.HessianOperator(model, (x, y), progress=False) as operator:
        runs = {
            str(probes): partial(
                sharpkit.spectral_density, operator, steps=sizes.steps, probes=probes, seed=0
            )
            for probes in (1, 4)
        }
        for run in runs.values():
            run()
        times = in_turn(runs, how.repeats, how.seconds)
    case = f"{sizes.steps}-step spectral density, CNN 0.11 M, {len(x):,} images, four probes"
    yield Record(case, "sharpkit", PROBE, over(times, "4", "1"))


def compiled(sizes: Sizes, base: How, how: How) -> Iterator[Record]:
    """A step of m-SAM at m = 1 with `compile=True`, whose code is kept from step to step."""
    name = sizes.sam[0]
    mine = steps_of(name, sizes.batch, base)
    mine.model.eval()
    best = mine.layouts().best([sizes.batch])
    runs = {
        "sgd": sgd_step(best.model, best.x, best.y),
        "compiled": m_sam_step(mine.model, mine.x, mine.y, 1, compile=True),
    }
    for run in runs.values():
        run()
    times = in_turn(runs, how.repeats, how.seconds)
    case = f"m-SAM step in plain ones, {name}, batch {sizes.batch}, m = 1"
    yield Record(case, "sharpkit compiled", STEPS, over(times, "compiled", "sgd"))


def can_compile(function: Callable[..., object]) -> bool:
    return "compile" in inspect.signature(function).parameters


def compiler() -> bool:
    """Whether inductor has what it needs on a GPU."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


# --- the run ----------------------------------------------------------------------------------


def failed(case: str, error: Exception) -> Record:
    """A row that says why there is no figure."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0][:120].replace("|", "/")
    return Record(case, "failed", reason, [float("nan")])


def run_jobs(jobs: list[Job], base: How, seconds: float) -> tuple[list[Record], list[str]]:
    """Measure in order while there is time; print every record.

    Returns:
        tuple: The records, and the names of what was left out.
    """
    records: list[Record] = []
    print(HEADER)
    for i, job in enumerate(jobs):
        left = BEGAN + seconds - time.monotonic()
        if left <= 0:
            return records, [job.name for job in jobs[i:]]
        share = left * job.weight / sum(other.weight for other in jobs[i:])
        try:
            # half: the other is for what comes before the first repetition
            for record in job.run(replace(base, seconds=share / 2)):
                records.append(record)
                print(row(record), flush=True)
        except Exception as error:
            records.append(failed(job.name, error))
            print(row(records[-1]), flush=True)
            bench_of.cache_clear(), steps_of.cache_clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return records, []


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="Sizes too small for the targets.")
    parser.add_argument("--only", default="", help="Only cases with this in their names.")
    parser.add_argument("--seconds", type=float, default=330, help="After which no case begins.")
    parser.add_argument("--out", type=Path, help="JSON; benchmarks/results/<device>.json if none.")
    arguments = parser.parse_args()
    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here: --device cpu --quick tries the script")
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    sizes = QUICK if arguments.quick else FULL
    batches = (16,) if arguments.quick else (64, 256, 1024, 4096)
    repeats = 1 if arguments.quick else 5
    base = How(arguments.device, repeats, batches=batches, loop_groups=64, share=1)
    name = device_name(arguments.device)
    print(f"{name}, torch {torch.__version__}, sharpkit {own_version()} ({commit()})")
    jobs = [job for job in jobs_of(sizes, arguments.device, base) if arguments.only in job.name]
    if not jobs:
        raise SystemExit(f"no case has {arguments.only!r} in its name")
    records, left_out = run_jobs(jobs, base, arguments.seconds)
    timed = [r for r in records if r.unit in TIMES]
    fewer = [f"{r.case} ({len(r.values)})" for r in timed if len(r.values) < repeats]
    slug = machine_name(name, 1).removesuffix("-1-cores") + "-quick" * arguments.quick
    part = f"-{machine_name(arguments.only, 1).removesuffix('-1-cores')}" if arguments.only else ""
    out = arguments.out or HERE / "results" / f"{slug}{part}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "device": name,
        "versions": {"torch": str(torch.__version__), "sharpkit": own_version()},
        "commit": commit(),
        "quick": arguments.quick,
        "seconds": round(time.monotonic() - BEGAN),
        "left_out": left_out,
        "records": [
            asdict(r) | {"median": r.median, "holds": r.holds}
            for r in records
            if r.contender != "failed"
        ],
        "failed": {r.case: r.unit for r in records if r.contender == "failed"},
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    missed = [r.case for r in records if r.holds is False]
    print(f"\n{result['seconds']} s; {len(missed)} targets missed; {len(result['failed'])} failed")
    print(f"left out for want of time: {', '.join(left_out) or 'nothing'}")
    print(f"fewer than {repeats} repetitions: {', '.join(fewer) or 'none'}")
    print(out)


if __name__ == "__main__":
    main()
