"""The vectorised engine: gradients and perturbed losses of many groups at a time.

The examples are streamed in chunks. In every chunk `torch.func.vmap` takes the gradient of each
base group (as many examples as the greatest common divisor of all m); the gradient of a larger
group is the mean of its base groups', so one gradient pass serves every m and rho. A group whose
gradient is complete is perturbed and evaluated at once, so memory stays at a few chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from sharpkit.contract.examples import Examples
from sharpkit.errors import ModelError
from sharpkit.groupwise import geometry
from sharpkit.groupwise.fallback import Disagreement
from sharpkit.groupwise.low_rank import pays
from sharpkit.groupwise.objective import Objective
from sharpkit.sharpness.ascent import (
    Ascent,
    gaussian_direction,
    projected_ascent,
    random_point,
    scaled,
)
from sharpkit.sharpness.blocks import Blocks, concatenated, stacked
from sharpkit.sharpness.gradient_pass import GradientPass, block_at
from sharpkit.sharpness.groups import Groups

# relative to the largest entry; a rule that is lost changes much more
_AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-2}


@dataclass
class Groupwise:
    """What was measured at one m, in the order of the groups."""

    m: int
    increases: list[Tensor] = field(default_factory=list)  # (rho, groups) float64 each, on the CPU
    sizes: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # by which groups are averaged
    zero_gradients: int = 0

    @property
    def start(self) -> int:
        """The first example of the next group."""
        return sum(self.sizes)


@dataclass
class Level(Groupwise):
    """The groups of one m while they are collected from base groups."""

    factored: frozenset[str] = frozenset()  # linear weights whose gradient stays factored
    pending: Blocks | None = None  # the mean gradient of a group that is not complete yet


class Sweep:
    """All m and rho over a stream of chunks.

    Args:
        objective: What is measured.
        examples: In the order of the groups.
        ms: Group sizes.
        rhos: Radii.
        ascent: How the inner maximum is found.
        factored: Rows per example of every linear weight whose gradient may stay factored.
    """

    def __init__(
        self,
        objective: Objective,
        examples: Examples,
        ms: Sequence[int],
        rhos: Sequence[float],
        ascent: Ascent,
        factored: dict[str, int],
    ) -> None:
        self.objective, self.examples, self.rhos, self.ascent = objective, examples, rhos, ascent
        self.block = math.gcd(*ms)
        self.scale = (
            {name: w.abs() for name, w in objective.weights.items()} if ascent.adaptive else None
        )

        def factored_at(m: int) -> frozenset[str]:
            # groups that are evaluated alone, or span chunks, are few: theirs are multiplied out
            if m > objective.chunk or m >= objective.alone:
                return frozenset()
            return frozenset(
                name for name, rows in factored.items() if pays(objective.weights[name], m * rows)
            )

        self.gradient_pass = GradientPass(
            objective, factored_at(self.block), losses_only=not ascent.needs_gradient
        )
        self.levels = [Level(m, factored=factored_at(m)) for m in ms]

    def extend(self, start: int, stop: int, advance: Callable[[int], object]) -> None:
        """Measure the groups that examples start to stop complete; all of them at the end."""
        step = max(self.block, self.objective.chunk // self.block * self.block)
        for a in range(start, stop, step):
            self._chunk(a, min(a + step, stop))
            advance(min(a + step, stop) - a)
        if stop == len(self.examples):
            for level in self.levels:
                if level.pending is not None:  # the smaller last group
                    self._measure(level, level.pending)
                    level.pending = None

    def _chunk(self, start: int, stop: int) -> None:
        whole = start + (stop - start) // self.block * self.block
        for a, b, size in ((start, whole, self.block), (whole, stop, stop - whole)):
            if b > a:
                blocks = self.gradient_pass(self._examples(a, b), size)
                self._check(blocks, a)
                for level in self.levels:
                    self._add(level, blocks)

    def _add(self, level: Level, blocks: Blocks) -> None:
        done = 0
        if level.pending is not None:
            done = min(len(blocks), (level.m - level.pending.size) // blocks.size)
            if done:
                part = blocks.slice(0, done).merged(1)
                level.pending = concatenated(level.pending, part)
            if level.pending.size == level.m:
                self._measure(level, level.pending)
                level.pending = None
        if level.pending is None:
            per_group = level.m // blocks.size
            groups = (len(blocks) - done) // per_group
            if groups:
                whole = blocks.slice(done, done + groups * per_group)
                self._measure(level, whole.merged(groups, level.factored))
                done += groups * per_group
        if done < len(blocks):
            rest = blocks.slice(done, len(blocks)).merged(1)
            level.pending = rest if level.pending is None else concatenated(level.pending, rest)

    def _measure(self, level: Level, blocks: Blocks) -> None:
        count, size = len(blocks), blocks.size
        if count > 1 and size >= self.objective.alone:
            for i in range(count):
                self._measure(level, blocks.slice(i, i + 1))
            return
        examples = self._examples(level.start, level.start + count * size)
        groups = Groups(self.objective, examples, count)
        with self.objective.model.evaluating():
            if self.ascent.kind == "average":
                increases = self._average(level, groups, blocks.loss)
            else:
                increases = self._ascend(level, groups, blocks)
        for rho, row in zip(self.rhos, increases, strict=True):
            if not bool(torch.isfinite(row).all()):
                raise ModelError(
                    f"the loss is not finite at the perturbed weights (m = {level.m}, rho = {rho})"
                )
        level.increases.append(increases.cpu())
        level.sizes += [size] * count
        level.weights += blocks.weight.tolist()

    def _ascend(self, level: Level, groups: Groups, blocks: Blocks) -> Tensor:
        ascent, weights = self.ascent, self.objective.weights
        first = geometry.steepest(scaled(blocks.tensors, self.scale), ascent.p, blocks.factors)
        geometry.check_flat(first, blocks.tensors, blocks.factors)
        moves = first.coefficient > 0
        level.zero_gradients += int((~moves).sum())
        rows = []
        if ascent.kind in ("pgd", "apgd"):
            rows = [
                projected_ascent(
                    ascent,
                    weights,
                    self.scale,
                    first,
                    blocks.loss,
                    rho,
                    groups.gradients,
                    groups.losses,
                    partial(
                        random_point,
                        ascent,
                        weights,
                        level.m,
                        len(level.sizes),
                        len(blocks),
                        rho,
                    ),
                )
                for rho in self.rhos
            ]
        else:
            step = scaled(first.tensors, self.scale)
            for rho in self.rhos:
                amount = rho * first.coefficient
                at = geometry.moved(weights, step, amount)
                rows.append(groups.losses(at, first.factors, amount) - blocks.loss)
        # without a gradient there is no perturbation: exactly 0, not the rounding of two passes
        return torch.where(moves | (ascent.restarts > 1), torch.stack(rows), 0.0)

    def _average(self, level: Level, groups: Groups, base: Tensor) -> Tensor:
        weights, steps = self.objective.weights, self.ascent.steps
        total = torch.zeros(len(self.rhos), len(base), dtype=torch.float64, device=base.device)
        for sample in range(steps):
            direction = gaussian_direction(
                self.ascent, weights, level.m, len(level.sizes), len(base), sample
            )
            step = scaled(direction.tensors, self.scale)
            for i, rho in enumerate(self.rhos):
                at = geometry.moved(weights, step, rho * direction.coefficient)
                total[i] += groups.losses(at) - base
        return total / steps

    def _examples(self, start: int, stop: int) -> Examples:
        f = self.objective.model
        return self.examples.slice(start, stop).to(f.device, f.dtype)

    def _check(self, blocks: Blocks, start: int) -> None:
        bad = (~torch.isfinite(blocks.loss)).nonzero()
        if not len(bad):
            return
        first = start + int(bad[0]) * blocks.size
        f = self.objective
        if bool(torch.isfinite(f.losses(f.weights, self._examples(first, first + blocks.size))[0])):
            raise Disagreement("a weight is used otherwise than it was at first")
        raise ModelError(
            f"the loss is not finite at the unperturbed weights (examples {first} to "
            f"{first + blocks.size - 1} in the order measured)"
        )

    def compare(self, examples: Examples) -> None:
        """Raise Disagreement if single examples side by side differ from one after the other.

        Function transforms replace the rules of some operations, and not always rightly.
        """
        count = len(examples)
        if self.objective.alone == 1 or count < 2 or self.gradient_pass.losses_only:
            return
        f = self.objective
        side = self.gradient_pass(examples, 1).merged(count)
        one = stacked([block_at(f, f.weights, examples.slice(i, i + 1)) for i in range(count)])
        largest = torch.stack([t.abs().amax() for t in one.tensors.values() if t.numel()]).amax()
        shift = torch.where(torch.isfinite(one.exponent), one.exponent - side.exponent, 0.0)
        for name, t in one.tensors.items():
            other = side.tensors[name] * geometry.expand(torch.exp2(shift), t)
            if bool(((t - other).abs() > _AGREEMENT.get(t.dtype, 0.3) * largest).any()):
                raise Disagreement(f"the gradient of {name!r} differs")
        at = {name: w.expand(count, *w.shape) for name, w in f.weights.items()}
        with f.model.evaluating():
            losses = Groups(f, examples, count).losses(at)
        if not torch.allclose(losses, one.loss, rtol=_AGREEMENT.get(f.model.dtype, 0.3)):
            raise Disagreement("the loss differs")
