"""What the factory of zoos makes of a device: training in stacks; scoring in stacks or processes.

A case of `gpu.py`: `python benchmarks/gpu.py --only factory`. Networks train for a fixed number of
epochs, on random images, one alone and as many as a stack has; what counts is networks per second.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from bench_speed import How
from timing import Record, in_turn, over
from torch.utils.data import TensorDataset

import sharpkit
from sharpkit.errors import ModelError
from sharpkit.workers import Failure
from sharpkit.zoo_training import Recipe
from sharpkit.zoo_training.cost_counts import flops_of_an_example
from sharpkit.zoo_training.grid_file import read_plan
from sharpkit.zoo_training.model import train_model
from sharpkit.zoo_training.stacked import train_stacked
from sharpkit.zoo_training.stacked_state import Job

ALONE = "one by one"
RATE = "networks per s, in those of one by one"
SHAPES = {"medium": (1, 14, 14), "cifar-nin": (3, 32, 32)}  # presets, and their images


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        presets: Whose largest networks are trained, at the batch sizes that it has.
        images: To fit.
        epochs: Of each network.
        stacks: Networks at a time.
        models: Scored.
        examples: Of each measurement.
        processes: That score at a time.
        scored: Networks of a stack that is scored.
    """

    presets: tuple[str, ...]
    images: int
    epochs: int
    stacks: tuple[int, ...]
    models: int
    examples: int
    processes: tuple[int, ...]
    scored: tuple[int, ...]


FULL = Sizes(
    presets=("medium", "cifar-nin"), images=1000, epochs=3, stacks=(8, 64),
    models=48, examples=2000, processes=(4,), scored=(8, 48),
)  # fmt: skip
QUICK = Sizes(
    presets=("medium",), images=64, epochs=1, stacks=(4,),
    models=2, examples=32, processes=(2,), scored=(2,),
)  # fmt: skip


def recipes_of(preset: str) -> Iterator[Recipe]:
    """The largest network of a preset, at each of its batch sizes."""
    plan = read_plan(preset)
    largest = {name: values[-1] for name, values in plan.grid.items() if name != "rho"}
    for size in plan.grid["batch_size"]:
        yield replace(plan.recipe, **{**largest, "batch_size": size})


def training(
    sizes: Sizes, device: str, preset: str, recipe: Recipe, stack: int, how: How
) -> Iterator[Record]:
    """Networks of one shape in a stack, and one by one."""
    shape = SHAPES[preset]
    data = images(sizes.images, shape)
    never = replace(recipe, epochs=sizes.epochs, stop_at_loss=1e-30, attempts=1)
    jobs = [Job(str(i), never, (0, i)) for i in range(stack)]

    def alone() -> None:
        try:
            train_model(never, data, data, device=device)
        except ModelError as error:
            ended_as_planned(str(error), sizes.epochs)

    def together() -> None:
        for _, found in train_stacked(jobs, data, data, most=stack, device=device):
            ended_as_planned(found.message if isinstance(found, Failure) else "", sizes.epochs)

    runs = {ALONE: alone, "stack": together}
    for run in runs.values():
        run()
    times = in_turn(runs, how.repeats, how.seconds)
    step, forward = flops_of_an_example(recipe, (*shape[1:], shape[0]), 10)
    work = f"{(step + forward) / 1e6:.2g} MFLOP, batch {recipe.batch_size}"
    case = f"factory, training, {preset}, {work}, stack of {stack}"
    counts = {ALONE: sizes.epochs, "stack": stack * sizes.epochs}
    yield from rates(case, times, counts, "epochs of a network per s")


def rates(
    case: str, times: dict[str, list[float]], counts: dict[str, int], unit: str
) -> Iterator[Record]:
    """Of the way that is not one by one, in times of that; and what each does in a second."""
    other = next(name for name in times if name != ALONE)
    share = counts[other] / counts[ALONE]
    yield Record(case, other, RATE, [share * ratio for ratio in over(times, ALONE, other)])
    for name, seconds in times.items():
        yield Record(f"{case}, rate", name, unit, [counts[name] / s for s in seconds])


def ended_as_planned(message: str, epochs: int) -> None:
    """RuntimeError unless training missed its target after all epochs, which none can reach."""
    if f"after {epochs} epochs; target" not in message:
        raise RuntimeError(f"a network did not train: {message or 'it reached its target'}")


def images(count: int, shape: tuple[int, int, int]) -> TensorDataset:
    """Random ones of ten classes."""
    x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, torch.arange(count) % 10)


def scoring(sizes: Sizes, device: str, other: str, how: How, **options: int) -> Iterator[Record]:
    """Models of the embedded zoo one by one, and another way, which the options say."""
    ms = tuple(m for m in (1, 4, 16, 64, 256) if m <= sizes.examples)
    zoo, measure = sharpkit.embedded_zoo(), sharpkit.MSharpness(m=ms, rho=0.1)

    def score(**options: int) -> None:
        scores = sharpkit.score_zoo(
            zoo, measure, n=sizes.examples, limit=sizes.models, device=device, progress=False,
            **options,
        )  # fmt: skip
        if len(scores.failures):
            raise RuntimeError(f"models were not scored: {scores.failures}")

    runs = {ALONE: score, other: lambda: score(**options)}
    for run in runs.values():
        run()
    times = in_turn(runs, how.repeats, how.seconds)
    (number,) = options.values()
    case = f"factory, scoring, {sizes.models} models of the embedded zoo, {number} {other}"
    yield from rates(case, times, dict.fromkeys(times, sizes.models), "models per s")
