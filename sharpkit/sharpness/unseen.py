"""What was measured, and what of it nobody has looked at yet.

Losses that are not finite and norms that may be wrong stay on the device until many chunks are
done: a GPU is not waited for in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sharpkit.contract.examples import Examples
from sharpkit.errors import ModelError
from sharpkit.groupwise.fallback import Disagreement
from sharpkit.groupwise.geometry import Direction
from sharpkit.groupwise.objective import Objective
from sharpkit.sharpness.blocks import Blocks, concatenated


class Doubtful(Exception):
    """A gradient's norm may have left the dtype: the measurement is to be made with care."""


@dataclass
class Level:
    """The groups of one m, in their order; of several networks, on an axis in front of theirs."""

    m: int  # group size
    factored: frozenset[str] = frozenset()  # weights whose gradient stays in factors
    pending: Blocks | None = None  # the mean gradient of a group that is not complete yet
    increases: list[Tensor] = field(default_factory=list)  # (rho, groups) float64 each
    sizes: list[int] = field(default_factory=list)  # examples of every group
    # by which groups are averaged, (groups,) each
    weights: list[Tensor] = field(default_factory=list)
    # groups that do not move, a scalar each
    zero_gradients: list[Tensor] = field(default_factory=list)

    @property
    def start(self) -> int:
        """The first example of the next group."""
        return sum(self.sizes)

    def completed(self, blocks: Blocks) -> Iterator[Blocks]:
        """The groups that further blocks complete, to be measured before the next is asked for.

        What is left over is kept as pending.
        """
        done = 0
        if self.pending is not None:
            done = min(len(blocks), (self.m - self.pending.size) // blocks.size)
            if done:
                self.pending = concatenated(self.pending, blocks.slice(0, done).merged(1))
            if self.pending.size == self.m:
                yield from self.rest()
        if self.pending is None:
            per_group = self.m // blocks.size
            groups = (len(blocks) - done) // per_group
            if groups:
                whole = blocks.slice(done, done + groups * per_group)
                yield whole.merged(groups, self.factored)
                done += groups * per_group
        if done < len(blocks):
            rest = blocks.slice(done, len(blocks)).merged(1)
            self.pending = rest if self.pending is None else concatenated(self.pending, rest)

    def rest(self) -> Iterator[Blocks]:
        """The group that is pending, if there is one: at the end, a smaller one."""
        if self.pending is not None:
            yield self.pending
            self.pending = None


class Unseen:
    """What was found since it was last looked at."""

    def __init__(self, objective: Objective, examples: Examples, rhos: Sequence[float]) -> None:
        self._objective, self._examples, self._rhos = objective, examples, rhos
        self.losses: list[tuple[int, Tensor, int]] = []  # where groups start, losses, their size
        self.doubts: list[Tensor] = []  # whether a gradient's norm is doubtful
        self.lost: list[Tensor] = []  # how many groups have a gradient that is not finite
        self._seen: dict[int, int] = {}

    def note(self, direction: Direction, counted: Tensor | None = None) -> None:
        """Keep in mind the groups whose direction may be wrong."""
        self.lost.append(torch.isnan(direction.coefficient).sum())
        if direction.doubtful is not None:
            doubt = direction.doubtful
            self.doubts.append((doubt if counted is None else doubt & counted).any())

    def look(self, levels: Sequence[Level]) -> None:
        """Look at all that was found since the last time, at once.

        Raises:
            Doubtful: If norms must be taken with care.
            Disagreement: If a loss is finite only when its group is evaluated alone.
            ModelError: If a loss or gradient is not finite.
        """
        if not self.losses:
            return
        device = self.losses[0][1].device
        fresh = {v.m: v.increases[self._seen.get(v.m, 0) :] for v in levels}
        increases = [x.flatten() for found in fresh.values() for x in found]
        flags = torch.stack(
            [
                _all_finite([loss for _, loss, _ in self.losses], device),
                ~torch.stack([*self.doubts, torch.tensor(False, device=device)]).any(),
                torch.stack([*self.lost, torch.tensor(0, device=device)]).sum() == 0,
                _all_finite(increases, device),
            ]
        )
        known, certain, found, finite = flags.tolist()
        if not known:
            self._explain_loss()
        if not certain:
            raise Doubtful
        if not found:
            raise ModelError(
                f"the gradient of {int(sum(self.lost))} groups has NaN or infinite entries, "
                "although the loss is finite"
            )
        if not finite:
            self._explain_increase(fresh)
        self._seen = {level.m: len(level.increases) for level in levels}
        self.losses, self.doubts, self.lost = [], [], []

    def _explain_loss(self) -> None:
        f = self._objective
        for start, loss, size in self.losses:
            bad = (~torch.isfinite(loss)).nonzero()
            if not len(bad):
                continue
            first = start + int(bad[0]) * size
            group = group_of(self._examples, first, first + size)
            group = group.to(f.model.device, f.model.dtype)
            alone, _ = f.losses(f.weights, group)
            if bool(torch.isfinite(alone)):
                raise Disagreement("a weight is used otherwise than it was at first")
            raise ModelError(
                f"the loss is not finite at the unperturbed weights (examples {first} to "
                f"{first + size - 1} in the order measured)"
            )

    def _explain_increase(self, fresh: dict[int, list[Tensor]]) -> None:
        for m, found in fresh.items():
            bad = ~torch.isfinite(torch.cat(found, 1)).all(1) if found else torch.zeros(0)
            if bool(bad.any()):
                rho = self._rhos[int(bad.nonzero()[0])]
                raise ModelError(
                    f"the loss is not finite at the perturbed weights (m = {m}, rho = {rho})"
                )


def group_of(examples: Examples, start: int, stop: int) -> Examples:
    """The examples of a group; if it is of all, as they are: a stream's are never held whole."""
    return examples if stop - start == len(examples) else examples.slice(start, stop)


def _all_finite(parts: list[Tensor], device: torch.device) -> Tensor:
    return torch.isfinite(torch.cat([*parts, torch.zeros(1, device=device)])).all()
