"""How the benchmarks measure: ratios from one process, medians, one allocator for all."""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def parse_arguments(description: str | None) -> argparse.Namespace:
    """The common options: quick, device, system_allocator (obeyed here) and out."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="Less work, fewer repetitions.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--system-allocator", action="store_true", help="Do not tune malloc.")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not arguments.system_allocator:
        keep_freed_memory()
    return arguments


def timed(run: Callable[[], object]) -> float:
    """Wall seconds of one run, with the GPU waited for."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(run: Callable[[], object], unit: Callable[[], object], repeats: int) -> dict[str, float]:
    """Time of `run` in times of `unit`: median and range over repetitions.

    Each run stands between two units, so that a slow spell of the machine hits both.
    """
    run()
    ratios = []
    before = timed(unit)
    for _ in range(repeats):
        middle, after = timed(run), timed(unit)
        ratios.append(2 * middle / (before + after))
        before = after
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def keep_freed_memory() -> None:
    """Tell the C library's allocator to keep freed memory, where it can be told.

    Otherwise it hands activations back to the system now and then, and the page faults that follow
    (up to 40 % of a pass, from one run to the next) drown the differences.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            getattr(library, "mallopt", lambda *_: 0)(option, 2**30)
