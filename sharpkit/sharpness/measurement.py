"""One measurement of m-sharpness: the fastest way of evaluating groups that proves right."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sharpkit.contract.checks import Probe
from sharpkit.contract.examples import Examples
from sharpkit.contract.holding import fused_attention
from sharpkit.groupwise.fallback import (
    Disagreement,
    Engine,
    first_that_works,
    in_memory,
    vectorised_or_loop,
)
from sharpkit.groupwise.objective import Objective
from sharpkit.groupwise.packing import Packing
from sharpkit.progress import progress_bar
from sharpkit.sharpness.ascent_rules import Ascent
from sharpkit.sharpness.passes import Alone, Passes
from sharpkit.sharpness.sweep import Care, Sweep
from sharpkit.sharpness.sweep_plan import SweepPlan, transformed
from sharpkit.sharpness.unseen import Doubtful, Level

# how often an early stop is considered, as a share of the examples; a chunk never decides it
_CHECKS = 16


@dataclass(frozen=True)
class Measurement:
    """A grid of m and rho on some examples, evaluated as a plan and an engine say.

    Args:
        plan: How the examples are cut.
        probe: A few examples with the model's outputs, that every way is compared on.
        examples: What is measured.
        ms: Group sizes.
        rhos: Radii.
        rule: How a group's weights are perturbed.
        engine: "vectorized" and "loop" try one way only.
        compile: Whether the inner functions are compiled.
        tolerance: Stop once std_error <= tolerance * |value|; None for never.
        progress: Whether a bar is shown.
        first: Number of the first example among all, of which these may be a share.
    """

    plan: SweepPlan
    probe: Probe
    examples: Examples
    ms: tuple[int, ...]
    rhos: tuple[float, ...]
    rule: Ascent
    engine: Engine
    compile: bool
    tolerance: float | None
    progress: bool
    first: int = 0

    def __call__(self) -> tuple[Sweep, bool]:
        """What was found, and whether groups were evaluated side by side.

        Raises:
            ModelError: If the engine is "vectorized" and the model has an operation that cannot be.
        """
        return in_memory(self._in_chunks, self.plan.chunk)

    def _in_chunks(self, size: int) -> tuple[Sweep, bool]:
        objective = self.plan.objective(size)
        return vectorised_or_loop(
            self.engine,
            lambda: self._side_by_side(objective),
            lambda: self._swept(self.plan.objective(size, loop=True), None),
            self.plan.function.model,
        )

    def _side_by_side(self, objective: Objective) -> Sweep:
        if not self.examples.uniform:
            raise Disagreement("the examples have different shapes")
        if math.gcd(*self.ms) >= objective.alone:
            return self._swept(objective, None)
        plan, rule = self.plan, self.rule
        return first_that_works(
            lambda: self._swept(objective, plan.one_batch(rule, compile=self.compile)),
            lambda: self._swept(objective, transformed(objective, self.probe, rule)),
        )

    def _swept(self, objective: Objective, side: Passes | None) -> Sweep:
        """All examples along one way, with more care about norms if what was found is doubtful."""
        weights = self.plan.weights
        packing = Packing(weights, self.rule.apart(weights)) if side is None else side.packing
        alone = Alone(objective, packing)
        for care in Care:
            sweep = Sweep(
                objective, self.examples, self.ms, self.rhos, self.rule, alone, side, care=care,
                first=self.first,
            )  # fmt: skip
            if care == Care.NONE and sweep.in_place is None:
                continue
            try:
                with fused_attention(), nullcontext() if side is None else side.held():
                    sweep.compare(self.probe.examples)
                    return self._run(sweep)
            except Doubtful:
                continue
        raise AssertionError("norms that were taken with care are not doubtful")

    def _run(self, sweep: Sweep) -> Sweep:
        n = len(self.examples)
        with progress_bar(
            total=n, desc="m-sharpness", unit="example", leave=False, delay=2,
            progress=self.progress,
        ) as bar:  # fmt: skip
            for start, stop in itertools.pairwise([0, *_stops(n, self.ms, self.tolerance)]):
                sweep.extend(start, stop, bar.update)
                if self.tolerance is not None and _precise(sweep.levels, self.tolerance):
                    break
        return sweep


class Groups(NamedTuple):
    """What groups of one m gave, on the CPU."""

    increases: Tensor  # (rho, groups)
    weights: Tensor  # (groups,)
    sizes: list[int]
    zero_gradients: int


class Measured(NamedTuple):
    """What one process found, with the share of all groups that it had."""

    levels: list[Groups]  # one for each m
    vectorised: bool
    peak_memory: int
    seconds: float


def on_cpu(level: Level) -> Groups:
    """The groups of a level."""
    return Groups(*collected(level), level.sizes, int(sum(level.zero_gradients)))


def no_groups(rhos: int) -> Groups:
    """Those of a process where there are fewer than processes."""
    none = torch.zeros(rhos, 0, dtype=torch.float64)
    return Groups(none, none[0], [], 0)


def joined(parts: Sequence[Groups]) -> Groups:
    """The groups of all processes, in the order of one."""
    return Groups(
        torch.cat([part.increases for part in parts], 1),
        torch.cat([part.weights for part in parts]),
        [size for part in parts for size in part.sizes],
        sum(part.zero_gradients for part in parts),
    )


def estimate(increases: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and its standard error over groups, which count by their weight; (rho,) each."""
    share = weights / (weights.sum() or 1.0)
    mean = increases @ share
    groups = int((share > 0).sum())
    if groups <= 1:
        return mean, torch.full_like(mean, torch.nan)
    squares = ((increases - mean.unsqueeze(1)) * share).square().sum(1)
    return mean, torch.sqrt(squares * groups / (groups - 1))


def collected(level: Level) -> tuple[Tensor, Tensor]:
    """Increases (rho, groups) and weights (groups,) of all groups, on the CPU."""
    return torch.cat(level.increases, 1).cpu(), torch.cat(level.weights).cpu()


def _stops(n: int, ms: tuple[int, ...], tolerance: float | None) -> list[int]:
    """Where an early stop is considered: whole groups of every m, whatever the chunk size."""
    step = math.lcm(*ms)
    if tolerance is None or step >= n:
        return [n]
    step *= max(1, round(n / _CHECKS / step))
    return [*range(step, n, step), n]


def _precise(levels: Sequence[Level], tolerance: float) -> bool:
    for level in levels:
        mean, error = estimate(*collected(level))
        if not bool((error <= tolerance * mean.abs()).all()):
            return False
    return True
