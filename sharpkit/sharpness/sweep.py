"""All m and rho over a stream of chunks of examples.

In every chunk the gradient of each base group is taken (as many examples as the greatest common
divisor of all m); the gradient of a larger group is the mean of its base groups', so one gradient
pass serves every m and rho. A group whose gradient is complete is perturbed and evaluated at once,
so memory stays at a few chunks. How groups are evaluated is up to `passes`.

What is to be looked at (see `unseen`) stays on the device until many chunks are done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial

import torch

from sharpkit.contract.examples import Examples
from sharpkit.contract.precision import may_use_tf32
from sharpkit.errors import ArgumentError
from sharpkit.groupwise import geometry
from sharpkit.groupwise.fallback import Disagreement
from sharpkit.groupwise.geometry import Direction
from sharpkit.groupwise.in_place import InPlace, Moved
from sharpkit.groupwise.objective import Objective
from sharpkit.sharpness.ascent_rules import Ascent
from sharpkit.sharpness.ball import Ball, gaussian_direction, random_point, scaled
from sharpkit.sharpness.blocks import Blocks
from sharpkit.sharpness.passes import Alone, Passes
from sharpkit.sharpness.unseen import Level, Unseen, group_of

# relative to the largest entry; a rule that is lost changes much more
_AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-2}
_COARSE = 0.3  # of half precision, and of TF32
_UNSEEN = 64  # chunks whose results are not looked at


class Care(IntEnum):
    """How much care gradients are taken with: one more than the last, where that was doubtful."""

    NONE = 0  # as they are, which only weights that move in place do
    SCALED = 1  # times a power of two that takes the slopes of the loss to 1
    ALL = 2  # and their squares added up likewise (see `geometry.steepest`)


class Sweep:
    """All m and rho over a stream of chunks.

    `alone` is how one group is evaluated, `side` how many are, side by side, or None to take all
    one after the other. `first` is the number of the first example among all, of which these may
    be a share: random numbers are those of the groups of all. `levels` is what was measured.
    """

    def __init__(
        self,
        objective: Objective,
        examples: Examples,
        ms: Sequence[int],
        rhos: Sequence[float],
        ascent: Ascent,
        alone: Alone,
        side: Passes | None,
        *,
        care: Care = Care.SCALED,
        first: int = 0,
    ) -> None:
        self.objective, self.examples, self.rhos, self.ascent = objective, examples, rhos, ascent
        self.alone, self.side, self.care, self.first = alone, side, care, first
        self.careful = care == Care.ALL
        self.block = math.gcd(*ms)
        self.weights = alone.packing.joined(objective.weights)
        self.scale = {k: w.abs() for k, w in self.weights.items()} if ascent.adaptive else None
        self.factored = self._factored_at(self.block)
        self.levels = [Level(m, self._factored_at(m)) for m in ms]
        self.in_place = self._moves_in_place()
        self._moved: list[Moved] = []  # by single groups, in their order
        self._chunks = 0
        self._unseen = Unseen(objective, examples, rhos)

    def extend(self, start: int, stop: int, advance: Callable[[int], object]) -> None:
        """Measure the groups that examples start to stop complete; all of them at the end."""
        if self.in_place is not None:
            with self.in_place.held():
                self._by_chunks(self.block, start, stop, advance)
        else:
            step = max(self.block, self.objective.chunk // self.block * self.block)
            self._by_chunks(step, start, stop, advance)

    def _by_chunks(
        self, step: int, start: int, stop: int, advance: Callable[[int], object]
    ) -> None:
        for a in range(start, stop, step):
            if self.in_place is None:
                self._chunk(a, min(a + step, stop))
            else:
                self._group(self.in_place, a, min(a + step, stop))
            self._chunks += 1
            if self._chunks % _UNSEEN == 1:
                self._look()
            advance(min(a + step, stop) - a)
        if stop == len(self.examples):
            for level in self.levels:
                for last in level.rest():
                    self._measure(level, last)
        self._look()

    def compare(self, examples: Examples) -> None:
        """Raise Disagreement if single examples side by side differ from one after the other.

        Function transforms replace the rules of some operations, and not always rightly.
        """
        count = len(examples)
        if self.side is None or self.objective.alone == 1 or count < 2:
            return
        if not self.ascent.rule.needs_gradient:
            return
        side = self.side.gradients(examples, count, self.factored).merged(count)
        one = self.alone.gradients(examples, count)
        known = {name: torch.isfinite(t) for name, t in one.tensors.items()}
        tops = [torch.where(known[k], t.abs(), 0.0).amax() for k, t in one.tensors.items()]
        agreement = self._agreement()
        allowed = agreement * torch.stack(tops).amax()
        shift = torch.where(torch.isfinite(one.exponent), one.exponent - side.exponent, 0.0)
        far = []
        for name, t in one.tensors.items():
            other = side.tensors[name] * geometry.expand(torch.exp2(shift), t)
            # what is not finite in either way is reported when it is measured
            far.append((known[name] & ~((t - other).abs() <= allowed)).any())
        at = {name: w.expand(count, *w.shape) for name, w in self.weights.items()}
        with self.objective.model.evaluating():
            losses = self.side.losses(examples, count, at)
        close = torch.isclose(losses, one.loss, agreement)
        apart = ~(close | ~torch.isfinite(one.loss)).all()
        for kind, differ in zip(
            ("gradients", "losses"), torch.stack([torch.stack(far).any(), apart]).tolist(),
            strict=True,
        ):  # fmt: skip
            if differ:
                raise Disagreement(f"{kind} differ from those of one group after the other")

    def _agreement(self) -> float:
        f = self.objective.model
        return _COARSE if may_use_tf32(f.device) else _AGREEMENT.get(f.dtype, _COARSE)

    def _factored_at(self, m: int) -> frozenset[str]:
        # groups that are evaluated alone, or span chunks, are few: theirs are multiplied out
        if self.side is None or not self.ascent.allows_factors or m > self.objective.chunk:
            return frozenset()
        if m >= self.objective.alone:
            return frozenset()
        weights = self.objective.weights
        return frozenset(
            name for name, rows in self.side.rows.items() if rows.pay(weights[name], m)
        )

    def _passes(self, groups: int, size: int) -> Passes:
        if self.side is None or groups == 1 or size >= self.objective.alone:
            return self.alone
        return self.side

    def _moves_in_place(self) -> InPlace | None:
        """A single m whose groups are all alone goes the way of a loop by hand."""
        f, ascent = self.objective, self.ascent
        alone = self.side is None or self.block >= f.alone
        plain = ascent.rule.linearised and ascent.p == 2.0 and not self.careful
        known = f.model.dtype in (torch.float32, torch.float64) and not f.model.has_complex
        if len(self.levels) > 1 or not (alone and plain and known):
            return None
        weights = f.weights.items()
        scale = {k: w.abs() for k, w in weights} if ascent.adaptive else None
        return InPlace(f, scale, scaled=self.care > Care.NONE)

    def _group(self, in_place: InPlace, start: int, stop: int) -> None:
        found = in_place.group(self._examples(start, stop, alone=True), self.rhos)
        self._moved.append(found)
        self._unseen.losses.append((start, found.loss.unsqueeze(0), stop - start))
        self.levels[0].sizes.append(stop - start)

    def _gather(self) -> None:
        """What single groups gave, as levels hold it."""
        if not self._moved:
            return
        (level,) = self.levels
        loss, weight, length, exponent = (
            torch.stack([getattr(found, name) for found in self._moved])
            for name in ("loss", "weight", "length", "exponent")
        )
        after = torch.stack([torch.stack(found.after) for found in self._moved], 1)
        direction = geometry.of_length(length)
        self._unseen.note(direction, exponent < torch.inf)
        if self.care == Care.NONE:
            self._unseen.doubts.append((~(length >= geometry.LEAST_UNSCALED)).any())  # also NaN
        stays = direction.coefficient == 0
        level.increases.append((after - loss).masked_fill(stays, 0.0))
        level.weights.append(weight)
        level.zero_gradients.append(stays.sum())
        self._moved = []

    def _chunk(self, start: int, stop: int) -> None:
        whole = start + (stop - start) // self.block * self.block
        for a, b, size in ((start, whole, self.block), (whole, stop, stop - whole)):
            if b == a:
                continue
            groups = (b - a) // size
            passes = self._passes(groups, size)
            examples = self._examples(a, b, alone=groups == 1)
            if self.ascent.rule.needs_gradient:
                blocks = passes.gradients(examples, groups, self.factored)
            else:
                blocks = passes.losses_only(examples, groups)
            self._unseen.losses.append((a, blocks.loss, size))
            for level in self.levels:
                for complete in level.completed(blocks):
                    self._measure(level, complete)

    def _measure(self, level: Level, blocks: Blocks) -> None:
        count, size = len(blocks), blocks.size
        if count > 1 and size >= self.objective.alone:
            for i in range(count):
                self._measure(level, blocks.slice(i, i + 1))
            return
        passes = self.alone if not blocks.factors else self.side
        if count > 1:
            passes = self._passes(count, size)
        assert passes is not None
        alone = count == 1 and passes is self.alone
        examples = self._examples(level.start, level.start + count * size, alone=alone)
        with self.objective.model.evaluating():
            increases = self.ascent.rule.increases(
                self._ball(level, passes, examples, blocks), self.rhos
            )
        if increases.shape != (len(self.rhos), count):
            raise ArgumentError(
                f"the rule {self.ascent.rule.name!r} gave increases of shape "
                f"{tuple(increases.shape[1:])}: expected one for each group, ({count},)"
            )
        level.increases.append(increases)
        level.sizes += [size] * count
        level.weights.append(blocks.weight)

    def _ball(self, level: Level, passes: Passes, examples: Examples, blocks: Blocks) -> Ball:
        ascent, groups, join = self.ascent, len(blocks), self.alone.packing.joined
        first = Direction({}, torch.zeros_like(blocks.loss))
        if ascent.rule.needs_gradient:
            first = geometry.steepest(
                scaled(blocks.tensors, self.scale), ascent.p, blocks.factors, careful=self.careful
            )
            self._unseen.note(first, blocks.exponent < torch.inf)
            level.zero_gradients.append((first.coefficient == 0).sum())
        place = self.first // level.m + len(level.sizes)
        keys = ascent.seed, ascent.p, self.objective.weights, level.m, place, groups

        def gaussian(sample: int) -> Direction:
            found = gaussian_direction(*keys, sample)
            return Direction(join(found.tensors), found.coefficient)

        return Ball(
            ascent.p, ascent.steps, ascent.restarts, self.weights, self.scale, blocks.loss,
            partial(passes.slopes, examples, groups), partial(passes.losses, examples, groups),
            gaussian, lambda rho, restart: join(random_point(*keys, rho, restart)),
            blocks.tensors, first, self.careful, self._unseen.note,
        )  # fmt: skip

    def _look(self) -> None:
        """Look at all that was found since the last time, at once (see `Unseen.look`)."""
        self._gather()
        self._unseen.look(self.levels)

    def _examples(self, start: int, stop: int, *, alone: bool) -> Examples:
        """Examples start to stop; `alone` if they are one group, which is read in batches."""
        f = self.objective.model
        e = self.examples
        found = group_of(e, start, stop) if alone else e.slice(start, stop)
        return found.to(f.device, f.dtype)
