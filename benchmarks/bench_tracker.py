"""What a tracker adds to the time of a training, and what it spends on λmax.

    python benchmarks/bench_tracker.py [--quick]

A small CNN on the embedded images, SGD with momentum on batches of 64: the same training without a
tracker and with one, in turn. A share is the time of the processor that the tracker added, over
that of the training without it in the same round; all of it in one thread, so that other work on
the machine changes little. All trackers measure 500 images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timing import Case, Record, in_turn, parser, run_cases
from torch import nn

import sharpkit as sk

BATCH, EXAMPLES, M = 64, 500, 16


def network() -> nn.Module:
    """7,690 parameters."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(288, 10),
    )  # fmt: skip


@dataclass
class Training:
    """What a training took, in seconds of the processor."""

    tracker: sk.Tracker | None
    calls: list[float]  # of the tracker, where it measured
    steps: float  # all together

    @property
    def share(self) -> float:
        return 100 * sum(self.calls) / self.steps


def train(steps: int, options: dict[str, Any] | None) -> Training:
    """Always from the same start, in epochs over the images."""
    x, y = sk.load_dataset("embedded")[0].tensors
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    per_epoch = len(x) // BATCH
    done = Training(None if options is None else sk.Tracker((x, y), n=EXAMPLES, **options), [], 0.0)
    look(done, model, optimizer, 0, 0)
    for step in range(steps):
        if step % per_epoch == 0:
            batches = torch.randperm(len(x), generator=order).split(BATCH)
        chosen = batches[step % per_epoch]
        began = time.process_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        done.steps += time.process_time() - began
        ended = (step + 1) % per_epoch == 0
        look(done, model, optimizer, step + 1, (step + 1) // per_epoch if ended else None)
    return done


def look(
    done: Training, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, epoch: int | None
) -> None:
    """A call of the tracker, if there is one."""
    if done.tracker is None:
        return
    began = time.process_time()
    if done.tracker(model, optimizer, step=step, epoch=epoch) is not None:
        done.calls.append(time.process_time() - began)


def in_rounds(
    steps: int, repeats: int, trackers: dict[str, dict[str, Any]]
) -> dict[str, tuple[list[float], Training]]:
    """Per cent added by each tracker to a training without one, and its last training."""
    last: dict[str, Training] = {}

    def run(name: str, options: dict[str, Any] | None) -> None:
        last[name] = train(steps, options)

    every: dict[str, dict[str, Any] | None] = {"none": None, **trackers}
    runs = {name: partial(run, name, options) for name, options in every.items()}
    times = in_turn(runs, repeats, clock=time.process_time)
    added = {
        name: [100 * (a / b - 1) for a, b in zip(times[name], times["none"], strict=True)]
        for name in trackers
    }
    return {name: (added[name], last[name]) for name in trackers}


def periods(arguments: argparse.Namespace) -> Iterator[Record]:
    """λmax every so many steps, m-sharpness every epoch; what a call costs, first and warm."""
    steps, repeats = (100, 1) if arguments.quick else (400, 5)
    options: dict[str, dict[str, Any]] = {
        f"loss and λmax every {every} steps": {"every": every} for every in (10, 50, 100)
    }
    sharpness = sk.MSharpness(m=M, rho=0.05)
    options[f"m-sharpness, m = {M}, every epoch"] = {
        "measures": [sharpness], "every": 1, "per": "epoch",
    }  # fmt: skip
    train(2, {"every": 1})
    for name, (added, training) in in_rounds(steps, repeats, options).items():
        one = training.steps / steps
        yield Record(name, "sharpkit", "% of the training time", added)
        yield Record(f"{name}: first call", "sharpkit", "steps", [training.calls[0] / one])
        warm = [call / one for call in training.calls[1:]]
        yield Record(f"{name}: further calls", "sharpkit", "steps", warm)
        if training.tracker is not None and "λmax" in name:
            products = training.tracker.frame().lambda_max_products.iloc[1:].astype(float)
            yield Record(f"{name}: further calls", "sharpkit", "products", products.tolist())


def budget(arguments: argparse.Namespace) -> Iterator[Record]:
    """5 % of the training time, with λmax measured as often as that allows."""
    steps, repeats = (1500, 1) if arguments.quick else (6000, 3)
    options = {"loss and λmax, budget=0.05": {"every": 1, "budget": 0.05}}
    train(2, {"every": 1})
    for name, (added, training) in in_rounds(steps, repeats, options).items():
        yield Record(name, "sharpkit", "% of the training time, between two runs", added)
        yield Record(
            name, "sharpkit", "% of the training time, in one run", [training.share], "<= 5"
        )
        yield Record(name, "sharpkit", "measurements", [float(len(training.calls))])


CASES: dict[str, Case] = {"periods": periods, "budget": budget}

if __name__ == "__main__":
    torch.set_num_threads(1)
    run_cases(parser(__doc__, CASES).parse_args(), CASES)
