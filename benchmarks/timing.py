"""How the benchmarks measure, and what they record: ratios from one process, one value a round."""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import operator
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

COMPARISONS = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Record:
    """What one contender took in one case.

    Args:
        case: What was done.
        contender: "sharpkit", or a peer.
        unit: Of the values, such as "s" or "gradient passes".
        values: One per repetition.
        target: Asked of their median, such as "<= 1.5"; empty for none.
    """

    case: str
    contender: str
    unit: str
    values: list[float]
    target: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def holds(self) -> bool | None:
        """Whether the median meets the target; None without one."""
        if not self.target:
            return None
        sign, bound = self.target.split()
        return COMPARISONS[sign](self.median, float(bound))

    @property
    def verdict(self) -> str:
        return {None: "", True: "yes", False: "**no**"}[self.holds]

    def __str__(self) -> str:
        low, high = short(min(self.values)), short(max(self.values))
        spread = "" if low == high else f" ({low}-{high})"
        return f"{short(self.median)}{spread}"


Case = Callable[[argparse.Namespace], Iterator[Record]]


def short(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def parser(description: str | None, cases: Mapping[str, Case]) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help="Less work, fewer repetitions.")
    options.add_argument("--only", choices=cases, action="append")
    options.add_argument("--out", type=Path, help="File to append the records to, a JSON a line.")
    return options


HEADER = "| case | contender | median (range) | unit | target | holds |\n|---|---|---|---|---|---|"


def row(record: Record) -> str:
    """One line of the table that the benchmarks print."""
    return (
        f"| {record.case} | {record.contender} | {record} | {record.unit} "
        f"| {record.target} | {record.verdict} |"
    )


def run_cases(arguments: argparse.Namespace, cases: Mapping[str, Case]) -> None:
    """Print every record as a row, and write it at once, so that a failure loses only its own."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(HEADER)
    for name in arguments.only or cases:
        for record in cases[name](arguments):
            print(row(record), flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(asdict(record)) + "\n")


def timed(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Wall seconds of one run, with the GPU waited for; or those of another clock."""
    start = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def peak_gib(run: Callable[[], object]) -> float | None:
    """GPU memory that a run takes above what was there before; None without a GPU."""
    if not torch.cuda.is_available():
        run()
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def in_turn(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run in rounds, there and back, so that a slow spell hits all of them.

    Args:
        runs: Warm already.
        repeats: Rounds, if the time allows.
        seconds: After which no further round begins; the first always does.
        clock: Of the times; `time.process_time` for what runs in one thread of a busy machine.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for turn in range(repeats):
        if turn and (time.perf_counter() - began) * (turn + 1) / turn > seconds:
            break
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            times[name].append(timed(runs[name], clock))
    return times


def over(times: Mapping[str, list[float]], name: str, unit: str) -> list[float]:
    """Times of one run in those of another of the same round."""
    return [a / b for a, b in zip(times[name], times[unit], strict=True)]


def keep_freed_memory() -> None:
    """Tell the C library's allocator to keep freed memory, where it can be told.

    Otherwise it hands activations back to the system now and then, and the page faults that follow
    (up to 40 % of a pass, from one run to the next) drown the differences.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        for name, option in (("TRIM", -1), ("MMAP", -3)):
            getattr(library, "mallopt", lambda *_: 0)(option, 2**30)
            os.environ[f"MALLOC_{name}_THRESHOLD_"] = str(2**30)  # sharpkit leaves it alone then
