"""What the checks of model, loss and data cost beside what they come before.

    python benchmarks/bench_contract.py [--quick]

The share of one call that is spent in the checks, for m-sharpness of 2,048 images (m = 1, one
radius) and for an operator and ten products over 2,000.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from networks import small_cnn
from timing import Case, Record, parser, run_cases

import sharpkit
from sharpkit.curvature import operator, problem
from sharpkit.sharpness import sweep


class Stopwatch:
    """Adds up the seconds spent in functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def share(run: Callable[[], object], parts: list[tuple[Any, str]]) -> float:
    """Seconds in the parts, over seconds of the rest."""
    watch = Stopwatch()
    patches = [patch.object(home, name, watch.around(getattr(home, name))) for home, name in parts]
    for p in patches:
        p.start()
    try:
        start = time.perf_counter()
        run()
        whole = time.perf_counter() - start
    finally:
        for p in patches:
            p.stop()
    return watch.seconds / (whole - watch.seconds)


def _data(n: int) -> tuple[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return small_cnn().eval(), (torch.randn(n, 1, 28, 28), torch.randint(0, 10, (n,)))


def sharpness(arguments: argparse.Namespace) -> Iterator[Record]:
    """Contract, unused weights, and groups side by side against one after the other."""
    model, data = _data(512 if arguments.quick else 2048)
    home = sys.modules["sharpkit.sharpness.m_sharpness"]  # the package's name is the function's
    parts = [(home, "examine"), (home, "unused"), (sweep.Sweep, "compare")]

    def run() -> None:
        sharpkit.m_sharpness(model, data, m=1, rho=0.05, progress=False)

    run()
    shares = [share(run, parts) for _ in range(1 if arguments.quick else 5)]
    yield Record(
        "checks before m-sharpness of 2,048 images", "sharpkit", "share", shares, "<= 0.05"
    )


def products(arguments: argparse.Namespace) -> Iterator[Record]:
    """Contract and second derivatives, before an operator and ten products."""
    model, data = _data(200 if arguments.quick else 2000)
    parts = [(problem, "examine"), (operator, "choose_mode")]

    def run() -> None:
        with sharpkit.HessianOperator(model, data, progress=False) as H:
            v = torch.randn(H.shape[0])
            for _ in range(10):
                H.matvec(v)

    run()
    shares = [share(run, parts) for _ in range(1 if arguments.quick else 5)]
    case = "checks before ten products, 2,000 images"
    yield Record(case, "sharpkit", "share of the rest", shares, "<= 0.05")


CASES: dict[str, Case] = {"sharpness": sharpness, "products": products}

if __name__ == "__main__":
    run_cases(parser(__doc__, CASES).parse_args(), CASES)
