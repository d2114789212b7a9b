"""m-sharpness and m-SAM beside the plain loop, and what they cost in ordinary passes.

    python benchmarks/bench_speed.py [--quick] [--only CASE] [--system-allocator]

Every ratio comes from one process: the contenders run in turn, and each value is that of one round.
The loops (`loops.py`) and the ordinary passes run at the batch size and memory layout that is
fastest for them. At small m a loop's time is in proportion to the examples, and many times
sharpkit's, so it runs over a part of them. From m = 16 on, where both take as long, they run over
the same examples in more rounds: single ones differ by a tenth.

On Linux the C allocator is told to keep freed memory. Otherwise it hands activations back to the
system now and then, and the page faults that follow (up to 40 % of a pass, from one run to the
next) drown the differences. `--system-allocator` leaves it alone.
"""

from __future__ import annotations

import argparse
import math
import resource
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from dispatch import calls, waits
from loops import (
    Layouts,
    fastest,
    forward_pass,
    gradient_pass,
    m_sam_loop_step,
    moved_in_place,
    moved_side_by_side,
    sgd_step,
    sharpness_loop,
    two_pass_step,
    unit,
    uses_batch_statistics,
)
from networks import NETWORKS, Network
from timing import (
    Case,
    Record,
    in_turn,
    keep_freed_memory,
    over,
    parser,
    peak_gib,
    run_cases,
    timed,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sharpkit
import sharpkit.training as training
from sharpkit.contract.losses import resolve_loss

SMALL = (
    "CNN 0.47 M", "ResNet-20", "WRN-16-4", "small ViT", "LSTM", "encoder", "perceptron", "LeNet-5",
)  # fmt: skip
MS = (1, 4, 16, 64, 256)
SAM_MS = (1, 4, 16, 64, 128)
COMPILED = ("CNN 0.22 M", "ResNet-20")
RHO = 0.05
RHOS = (0.01, 0.02, 0.05, 0.1)
BATCH = 128
BATCHES = (16, 32, 64, 128)  # on a CPU
UNIT = "gradient + forward passes"
LOOP = "time of the plain loop"
ALIKE = 16  # group size from which a loop takes about as long
STEPS = "plain SGD steps"
PARTS = "sum of its passes alone"
AS_FAST = "<= 1.05"
EXAMPLES = {  # enough for the checks before a measurement to weigh as little as in a real one
    "CNN 0.47 M": 2048, "ResNet-20": 2048, "WRN-16-4": 512, "small ViT": 1024, "LSTM": 4096,
    "encoder": 2048, "perceptron": 8192, "LeNet-5": 8192,
}  # fmt: skip
MEMORY = {("WRN-28-10", 1): "<= 12"}  # on a GPU
SAM_MEMORY = {("WRN-28-10", 1): "<= 24"}
IN_UNITS = {"CNN 0.47 M": "<= 1.4", "ResNet-20": "<= 1.7"}  # at m = 1


@dataclass(frozen=True)
class How:
    """How a case is measured.

    Attributes:
        device: Where.
        repeats: Rounds; twice as many where contenders take about as long.
        seconds: After which no further round begins.
        spare: Seconds until which rounds go on, up to five times as many: those of small networks.
        batches: Batch sizes that the loops and ordinary passes try.
        loop_groups: Groups that a loop runs over, at most.
        share: Of the examples, for ordinary passes and for loops at small m.
    """

    device: str = "cpu"
    repeats: int = 5
    seconds: float = math.inf
    spare: float = 0.0
    batches: tuple[int, ...] = BATCHES
    loop_groups: int = 10**9
    share: float = 1 / 4

    def rounds(self, m: int) -> int:
        """Of sharpkit and a loop over groups of m examples."""
        return 2 * self.repeats if m >= ALIKE and self.repeats > 1 else self.repeats

    def times(self, runs: Mapping[str, Callable[[], object]], m: int) -> dict[str, list[float]]:
        """Seconds of all rounds, by contender."""
        began, rounds = time.perf_counter(), self.rounds(m)
        found = in_turn(runs, rounds, self.seconds)
        left = self.spare - (time.perf_counter() - began)
        more = in_turn(runs, 4 * rounds, left) if left > 0 else {}
        return {name: times + more.get(name, []) for name, times in found.items()}


def measurement(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    m: int | Sequence[int],
    rho: float | Sequence[float],
    **options: Any,
) -> Callable[[], sharpkit.SharpnessResult]:
    """A call of m-sharpness with the examples in their order."""
    return lambda: sharpkit.m_sharpness(
        model, data, m=m, rho=rho, seed=None, progress=False, **options
    )


# --- m-sharpness ------------------------------------------------------------------------------


class Sharpness:
    """m-sharpness of a network beside the loop and the unit.

    Args:
        name: Of the network.
        network: The network.
        n: Examples.
        how: Of the measurement.
        options: Of `m_sharpness`.
    """

    def __init__(self, name: str, network: Network, n: int, how: How, **options: Any) -> None:
        self.name, self.how, self.options = name, how, options
        self.model, self.x, self.y = network.case(n, how.device)
        self.layouts = Layouts(self.model, self.x, self.y)

    def against_loop(self, m: int, target: str = "") -> Iterator[Record]:
        """One m in times of the loop; on a GPU its memory; at m = 1 also both in units."""
        examples, case = self._part(m), f"m-sharpness, {self.name}, m = {m}"
        runs = {"sharpkit": self._ours(m), "loop": self._loop(m, examples)}
        if m == 1:
            best = self.layouts.best(self.how.batches)
            unit_examples = min(len(self.x), max(best.batch, int(len(self.x) * self.how.share)))
            x, y = best.x[:unit_examples], best.y[:unit_examples]
            runs["unit"] = lambda: unit(best.model, x, y, best.batch)
        peak = peak_gib(runs["sharpkit"]) if torch.cuda.is_available() else None
        measurement(self.model, (self.x[: 2 * m], self.y[: 2 * m]), m, RHO, **self.options)()
        runs["loop"]()
        times = self.how.times(runs, m)
        whole = len(self.x)
        ours = [t / whole for t in times["sharpkit"]]  # seconds per example
        loop = [t / examples for t in times["loop"]]
        yield Record(case, "sharpkit", LOOP, _ratios(ours, loop), AS_FAST)
        if peak is not None:
            bound = MEMORY.get((self.name, m), "")
            yield Record(f"{case}, peak memory of the call", "sharpkit", "GiB", [peak], bound)
        if m == 1:
            one = [t / unit_examples for t in times["unit"]]
            case = f"m-sharpness in passes, {self.name}, m = 1"
            yield Record(case, "sharpkit", UNIT, _ratios(ours, one), target)
            yield Record(case, "plain loop", UNIT, _ratios(loop, one))

    def difference(self, m: int) -> float:
        """Of the loop's value from sharpkit's over the same groups, relative."""
        examples = self._part(m)
        found = float(self._loop(m, examples)())
        data = self.x[:examples], self.y[:examples]
        return abs(found / measurement(self.model, data, m, RHO, **self.options)().value - 1)

    def _ours(self, m: int) -> Callable[[], sharpkit.SharpnessResult]:
        return measurement(self.model, (self.x, self.y), m, RHO, **self.options)

    def _loop(self, m: int, examples: int) -> Callable[[], Tensor]:
        best = self.layouts.best([b for b in self.how.batches if b < m] + [m])
        x, y = best.x[:examples], best.y[:examples]
        return lambda: sharpness_loop(best.model, x, y, m, RHO, best.batch)

    def _part(self, m: int) -> int:
        """Examples that the loop runs over: whole groups, at least one."""
        share = 1.0 if m >= ALIKE else self.how.share
        groups = min(self.how.loop_groups, int(len(self.x) * share) // m)
        return max(1, groups) * m


def _ratios(times: list[float], units: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(times, units, strict=True)]


def sharpness(arguments: argparse.Namespace) -> Iterator[Record]:
    """Every small network at every m."""
    for name in SMALL[:2] if arguments.quick else SMALL:
        n = 64 if arguments.quick else EXAMPLES[name]
        bench = Sharpness(name, NETWORKS[name], n, how(arguments))
        for m in (1, 16) if arguments.quick else MS:
            yield from bench.against_loop(m, IN_UNITS.get(name, ""))
        found = max(bench.difference(m) for m in (1, 16))
        yield Record(f"m-sharpness, {name}, difference", "plain loop", "relative", [found])


def large(arguments: argparse.Namespace) -> Iterator[Record]:
    """A network whose weights do not fit the memory once per example."""
    name, n = "VGG 19.2 M", 4 if arguments.quick else 16
    bench = Sharpness(name, NETWORKS[name], n, how(arguments, most=3))
    yield from bench.against_loop(1, "<= 2")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    case = f"m-sharpness, {name}, m = 1, peak memory of the process"
    yield Record(case, "sharpkit", "GiB", [peak], "<= 4")


# --- many pairs at once -----------------------------------------------------------------------


def sweep_of(name: str, network: Network, n: int, ms: Sequence[int], how: How) -> Iterator[Record]:
    """A grid of m and rho in one call, beside its parts: a gradient pass, a forward pass a pair.

    The forward pass at weights of each group's own is the fastest that is known: what sharpkit
    takes for one radius more, or a plain one, in place or under vmap.
    """
    model, x, y = network.case(n, how.device)
    best = Layouts(model, x, y, gradient_pass).best(how.batches)
    runs: dict[str, Callable[[], object]] = {
        "sweep": measurement(model, (x, y), list(ms), list(RHOS)),
        "gradient": lambda: gradient_pass(best.model, best.x, best.y, best.batch),
    }
    for m in ms:
        runs[f"plain {m}"] = _forward_at_own_weights(model, x, y, m, how)
        runs[f"one {m}"] = measurement(model, (x, y), m, RHOS[0])
        runs[f"four {m}"] = measurement(model, (x, y), m, RHOS)
    for run in runs.values():
        run()
    times = in_turn(runs, how.repeats, how.seconds)
    passes = {
        m: min(
            statistics.median(times[f"plain {m}"]),
            statistics.median(
                (four - one) / (len(RHOS) - 1)
                for four, one in zip(times[f"four {m}"], times[f"one {m}"], strict=True)
            ),
        )
        for m in ms
    }
    parts = statistics.median(times["gradient"]) + len(RHOS) * sum(passes.values())
    case = f"m-sharpness, {len(ms)} m x {len(RHOS)} rho in one call, {name}"
    yield Record(case, "sharpkit", PARTS, [t / parts for t in times["sweep"]], "<= 1.15")


def _forward_at_own_weights(
    model: nn.Module, x: Tensor, y: Tensor, m: int, how: How
) -> Callable[[], object]:
    plain = Layouts(model, x, y, forward_pass).best([b for b in how.batches if b < m] + [m])
    steps = [1e-3 * torch.randn_like(p) for p in model.parameters()]

    def in_place(stop: int) -> Tensor:
        return moved_in_place(plain.model, plain.x[:stop], plain.y[:stop], m, steps, plain.batch)

    def side_by_side(stop: int, batch: int) -> Tensor:
        return moved_side_by_side(model, x[:stop], y[:stop], m, steps, batch)

    ways: dict[str, Callable[[int], Tensor]] = {"in place": in_place}
    few = {"in place": min(len(x), max(m, 64))}
    for batch in how.batches:
        if batch // m > 1 and batch <= min(1024, len(x)):  # memory for the weights of every group
            ways[f"{batch} side by side"] = partial(side_by_side, batch=batch)
            few[f"{batch} side by side"] = batch
    tries = {name: partial(way, few[name]) for name, way in ways.items()}
    return partial(ways[fastest(tries, few)], len(x))


def sweep(arguments: argparse.Namespace) -> Iterator[Record]:
    """Five m and four rho."""
    if arguments.quick:
        yield from sweep_of("CNN 0.47 M", NETWORKS["CNN 0.47 M"], 64, (1, 4, 16), how(arguments))
        return
    yield from sweep_of("CNN 0.47 M", NETWORKS["CNN 0.47 M"], 512, MS, how(arguments))


# --- m-SAM ------------------------------------------------------------------------------------


class Steps:
    """Steps of a network on one batch, in times of a plain one.

    Args:
        name: Of the network.
        network: The network.
        batch: Examples in the batch.
        how: Of the measurement.
    """

    def __init__(self, name: str, network: Network, batch: int, how: How) -> None:
        self.name, self.how, self.batch = name, how, batch
        self.model, self.x, self.y = network.case(batch, how.device)
        self._layouts: dict[bool, Layouts] = {}  # by training mode

    def layouts(self) -> Layouts:
        """Those of the model in the mode that it is in, tried once."""
        mode = self.model.training
        if mode not in self._layouts:
            self._layouts[mode] = Layouts(self.model, self.x, self.y, gradient_pass)
        return self._layouts[mode]

    def m_sam(self, m: int, target: str = "") -> Iterator[Record]:
        """A step of m-SAM and the loop's; BatchNorm is in eval mode at m = 1, as it must be."""
        self.model.train(m > 1)
        layouts = self.layouts()
        whole = layouts.best([self.batch])
        whole_groups = uses_batch_statistics(self.model)
        part = layouts.best([b for b in self.how.batches if b < m and not whole_groups] + [m])
        runs = {
            "sgd": sgd_step(whole.model, whole.x, whole.y),
            "sharpkit": m_sam_step(self.model, self.x, self.y, m),
            "loop": m_sam_loop_step(part.model, part.x, part.y, m, RHO, part.batch),
        }
        for run in runs.values():
            run()  # what a first step prepares is kept
        peak = peak_gib(runs["sharpkit"])
        times = self.how.times(runs, m)
        case = f"m-SAM step, {self.name}, batch {self.batch}, m = {m}"
        yield Record(case, "sharpkit", LOOP, over(times, "sharpkit", "loop"), AS_FAST)
        if peak is not None:
            bound = SAM_MEMORY.get((self.name, m), "")
            yield Record(f"{case}, peak memory of the step", "sharpkit", "GiB", [peak], bound)
        case = f"m-SAM step in plain ones, {self.name}, batch {self.batch}, m = {m}"
        yield Record(case, "sharpkit", STEPS, over(times, "sharpkit", "sgd"), target)
        yield Record(case, "plain loop", STEPS, over(times, "loop", "sgd"))

    def compiled(self) -> Iterator[Record]:
        """A step of m-SAM at m = 1 with `compile=True` in times of one without, on one thread.

        By processor time: a compiled pass computes in one thread what a machine with others would
        divide otherwise than the plain one does.
        """
        self.model.eval()
        runs = {
            "plain": m_sam_step(self.model, self.x, self.y, 1),
            "compiled": m_sam_step(self.model, self.x, self.y, 1, compile=True),
        }
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            runs["plain"]()
            first = timed(runs["compiled"])
            times = in_turn(runs, self.how.repeats, self.how.seconds, time.process_time)
        finally:
            torch.set_num_threads(threads)
        case = f"m-SAM step, {self.name}, batch {self.batch}, m = 1"
        values = over(times, "compiled", "plain")
        yield Record(f"{case}, one thread", "sharpkit compiled", "time without", values)
        yield Record(f"{case}, first step", "sharpkit compiled", "s", [first])

    def sam(self) -> Iterator[Record]:
        """`SAM.step(closure)` and the usual optimizer of two passes."""
        self.model.train()
        runs = {
            "sgd": sgd_step(self.model, self.x, self.y),
            "sharpkit": closure_step(self.model, self.x, self.y),
            "two-pass SAM": two_pass_step(self.model, self.x, self.y),
        }
        for run in runs.values():
            run()
        times = in_turn(runs, 5 * self.how.repeats, self.how.seconds)
        case = f"SAM.step(closure), {self.name}, batch {self.batch}"
        yield Record(case, "sharpkit", STEPS, over(times, "sharpkit", "sgd"), "<= 2.15")
        yield Record(case, "two-pass SAM", STEPS, over(times, "two-pass SAM", "sgd"))


def m_sam_step(
    model: nn.Module, x: Tensor, y: Tensor, m: int, **options: Any
) -> Callable[[], object]:
    """A step of m-SAM."""
    optimizer = training.SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=1e-3, momentum=0.9)
    return lambda: optimizer.step_batch(model, x, y, m=m, **options)


def closure_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """A step of SAM."""
    optimizer = training.SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=1e-3, momentum=0.9)

    def closure() -> Tensor:
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)


def sam(arguments: argparse.Namespace) -> Iterator[Record]:
    """m-SAM of every small network, and SAM of one."""
    batch = 32 if arguments.quick else BATCH
    for name in ("CNN 0.22 M", "ResNet-20") if arguments.quick else ("CNN 0.22 M", *SMALL[1:]):
        bench = Steps(name, NETWORKS[name], batch, how(arguments))
        if name == "CNN 0.22 M":
            yield from bench.sam()
        for m in (1, 16) if arguments.quick else SAM_MS:
            if name != "WRN-16-4" or m in (1, 16, 128):  # seconds a step
                yield from bench.m_sam(m, "<= 2.6" if m == 1 else "")


def compiled(arguments: argparse.Namespace) -> Iterator[Record]:
    """m-SAM that is compiled, where there is a compiler."""
    batch = 32 if arguments.quick else BATCH
    for name in COMPILED if shutil.which("c++") else ():
        yield from Steps(name, NETWORKS[name], batch, how(arguments)).compiled()


# --- what a GPU would be given to do, and waited for ------------------------------------------

CALLS = {"CNN 0.47 M": ("<= 2.5", "<= 4"), "ResNet-20": ("<= 3.5", "<= 8")}


def calls_of(
    name: str, network: Network, device: str, sizes: tuple[int, int] = (128, 512)
) -> Iterator[Record]:
    """Calls of a chunk and of a step at m = 1 in those of plain ones; waits at two n.

    The plain passes have the same loss, which is exact where torch's rounds. What is asked for
    holds for calls that have work to do, without views. Pooling is done as on a GPU, by torch.
    """
    with patch("sharpkit.groupwise.pooling.is_plain", lambda *a, **k: False):
        yield from _calls_of(name, network, device, sizes)


def _calls_of(name: str, network: Network, device: str, sizes: tuple[int, int]) -> Iterator[Record]:
    model, x, y = network.case(sizes[1], device)
    loss = resolve_loss("cross_entropy")
    few = 16  # one slice of m-SAM

    def chunks(count: int) -> Callable[[], object]:
        size = sizes[0] // 2
        return measurement(model, (x[: count * size], y[: count * size]), 1, RHO, chunk=size)

    def accumulate() -> None:
        optimizer.zero_grad()
        optimizer.accumulate_groups(model, x[:few], y[:few], m=1)
        optimizer.restore()

    def gradient() -> None:
        model.zero_grad()
        loss(model(x[:few]), y[:few]).backward()

    def passes() -> None:
        torch.autograd.grad(loss(model(x), y), list(model.parameters()))
        with torch.no_grad():
            loss(model(x), y)

    optimizer = training.SAM(model.parameters(), torch.optim.SGD, lr=1e-3)
    accumulate(), gradient()
    bounds = CALLS.get(name, ("", ""))
    plain, step, own = calls(passes), calls(gradient), calls(accumulate)
    chunk = [b - a for a, b in zip(calls(chunks(2)), calls(chunks(3)), strict=True)]
    for kind, i in (("", 0), (", views left out", 1)):
        value, bound = chunk[i] / plain[i], bounds[0] if i else ""
        case = f"calls of a chunk of m-sharpness, {name}, m = 1{kind}"
        yield Record(case, "sharpkit", "those of a gradient and a forward pass", [value], bound)
        value, bound = own[i] / step[i], bounds[1] if i else ""
        case = f"calls of a slice of m-SAM, {name}, m = 1{kind}"
        yield Record(case, "sharpkit", "those of a plain gradient", [value], bound)
    found = [waits(measurement(model, (x[:n], y[:n]), 1, RHO), device) for n in sizes]
    case, more = f"waits for the device, {name}, m = 1", f"waits more than at n = {sizes[0]}"
    yield Record(f"{case}, n = {sizes[0]}", "sharpkit", "waits", [found[0]])
    yield Record(f"{case}, n = {sizes[1]}", "sharpkit", more, [found[1] - found[0]], "<= 0")
    found = [waits(lambda n=n: _gradient(model, x[:n], y[:n]), device) for n in sizes]
    case = f"waits of an m-SAM gradient, {name}, m = 1, n = {sizes[1]}"
    yield Record(case, "sharpkit", more, [found[1] - found[0]], "<= 0")


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> None:
    training.m_sam_gradient(model, x, y, m=1, rho=RHO)
    model.zero_grad()


def dispatched(arguments: argparse.Namespace) -> Iterator[Record]:
    """Calls and waits of two networks."""
    for name in ("CNN 0.47 M",) if arguments.quick else CALLS:
        yield from calls_of(name, NETWORKS[name], "cpu")


CASES: dict[str, Case] = {
    "sharpness": sharpness,
    "sam": sam,
    "compiled": compiled,
    "sweep": sweep,
    "large": large,
    "calls": dispatched,
}


def how(arguments: argparse.Namespace, most: int = 5) -> How:
    """How a CPU is measured."""
    if arguments.quick:
        return How(repeats=1, batches=(16,))
    return How(repeats=most, seconds=200.0, spare=20.0)


if __name__ == "__main__":
    options = parser(__doc__, CASES)
    options.add_argument("--system-allocator", action="store_true", help="Do not tune malloc.")
    arguments = options.parse_args()
    if not arguments.system_allocator:
        keep_freed_memory()
    warnings.filterwarnings("ignore", message="groups are evaluated one after the other")
    torch.manual_seed(0)
    run_cases(arguments, CASES)
