"""The two passes of m-SAM over a chunk of groups: where each goes, and the gradient there.

Pass one takes the gradient of every group at the shared weights w; pass two the gradient, with
respect to w, of the mean loss of the groups at w + ε_i with ε_i constant. There are three ways:
all groups of a chunk as one ordinary batch, all of them under vmap, or a group alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.func import vmap

from sharpkit.contract.examples import Examples, Inputs
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.losses import MeanLoss
from sharpkit.contract.recompute import without_checkpointing, without_reentry
from sharpkit.groupwise import low_rank
from sharpkit.groupwise.batch_passes import BatchPasses
from sharpkit.groupwise.geometry import Tensors
from sharpkit.groupwise.group_gradient import GroupGradient, group_gradient, pulled_back
from sharpkit.groupwise.objective import (
    PlainGradient,
    examples_in_layout,
    grouped,
    in_layout,
    leaf_gradient,
)
from sharpkit.groupwise.one_batch import Point
from sharpkit.training.batch_norm_statistics import Recorder, Statistics
from sharpkit.training.group_perturbation import Steps, step_of_one, steps_of_groups
from sharpkit.training.noise import Noise
from sharpkit.training.radius import Radii
from sharpkit.training.variants import PLAIN_SAM, SamVariant, combined

if TYPE_CHECKING:
    from sharpkit.training.step_plan import StepPlan


@dataclass(frozen=True)
class StepTask:
    """What one step works on."""

    model: FunctionalModel
    loss: MeanLoss
    shared: Tensors  # the values of the parameters to be trained, by name, detached
    radii: Radii  # of their perturbations
    recorder: Recorder  # of BatchNorm statistics
    examples: Examples  # the batch
    m: int  # examples per group
    scale: Callable[[Tensor], Tensor] = lambda loss: loss  # of the loss whose gradient is taken
    variant: SamVariant = PLAIN_SAM
    compile: bool = False  # the passes over groups side by side, where that works

    def weighted(self, weight: Tensor) -> Tensor:
        """What groups of such weights count in the batch."""
        return weight / len(self.examples)

    def again(self, noise: Noise) -> AbstractContextManager[None]:
        """The same random numbers for the second pass as for the first."""
        return noise.replayed(then_on=self.variant.direction is not None)

    def combined(
        self, plain: tuple[Tensors, Tensor], perturbed: tuple[Tensors, Tensor], shares: Tensor
    ) -> list[Tensor | None]:
        """What the variant makes of the gradients of groups (see `variants.combined`)."""
        assert self.variant.combine is not None
        found = combined(self.variant.combine, plain, perturbed, self.scale(shares))
        return [found[name] for name in self.shared]


class ChunkGradient(NamedTuple):
    """What both passes over a chunk give; the host has looked at nothing of it."""

    loss: Tensor  # at w, (groups,)
    weight: Tensor  # (groups,)
    after: Tensor  # the sum of the losses at w + ε_i, as the groups count
    gradient: Sequence[Tensor | None]  # of that sum, in the order of the parameters; None: unused
    statistics: Statistics  # of BatchNorm layers, with an axis of groups
    doubtful: Tensor  # a bool: whether a norm may have left float32 on the way


# both passes over some number of equally large groups of consecutive examples
Passes: TypeAlias = Callable[[Examples, int], ChunkGradient]


class AsOneBatch:
    """All groups as one ordinary batch, whose layers know whose examples are whose.

    Perturbations of the weights that the plan has in factors stay in factors.
    """

    def __init__(self, task: StepTask, plan: StepPlan) -> None:
        factored = plan.factored
        self.task, self._careful, self._thin = task, plan.careful, frozenset(factored)
        self._passes = BatchPasses(
            task.model, task.loss, task.shared, factored, packed=not task.variant.by_name,
            positions=plan.positions,
        )  # fmt: skip
        self._leaves = {name: w.detach().requires_grad_() for name, w in task.shared.items()}
        self._stand_ins = low_rank.stand_ins(task.shared)
        join = self._passes.packing.joined
        dense = {name: w for name, w in task.shared.items() if name not in factored}
        scale = task.radii.scale(dense)
        self._weights, self._scale = join(dense), None if scale is None else join(scale)

    def __call__(self, examples: Examples, groups: int) -> ChunkGradient:
        """As `Passes`."""
        task, noise = self.task, Noise(self.task.model.device)
        with without_checkpointing():
            with task.recorder.of_one_batch(groups) as statistics:
                first = self._passes.gradients(examples, groups, self._thin)
            terms = first.terms
            steps = steps_of_groups(
                self._weights, first.packs, first.factors, terms.exponent, task.radii,
                self._scale, task.variant.direction, careful=self._careful,
            )  # fmt: skip
            shares = task.weighted(terms.weight)
            with task.again(noise):
                if task.variant.combine is None:
                    del first
                    after, gradient = self._second_pass(examples, groups, steps, shares)
                else:
                    second = self._passes.gradients(examples, groups, at=steps.at)
                    after = (second.terms.mean * shares).sum()
                    gradient = task.combined(
                        (first.packs, terms.exponent), (second.packs, second.terms.exponent), shares
                    )
        return ChunkGradient(terms.mean, terms.weight, after, gradient, statistics, steps.doubtful)

    def _second_pass(
        self, examples: Examples, groups: int, steps: Steps, shares: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        task, leaves = self.task, self._leaves
        own = self._passes.packing.parts(steps.at, copied=True)
        values = {**own, **{name: task.shared[name] for name in self._thin}}
        with torch.enable_grad():
            tied = at_own_values(leaves, own)

        def moved(name: str) -> Tensor:
            return leaves[name] if name in self._thin else tied[name]

        point = Point(groups, len(examples) // groups, values, steps.thin, leaves, moved)
        with torch.enable_grad():
            with (
                task.model.assigned(self._stand_ins) as held,
                self._passes.batch(dict(zip(leaves, held, strict=True)), point) as batch,
            ):
                outputs = task.model.outputs(examples.inputs)
            probes = [probe for calls in batch.probes.values() for probe in calls]
            total, found = pulled_back(
                task.loss, outputs, examples.labels, shares, task.scale,
                [*leaves.values(), *probes],
            )  # fmt: skip
        gradient = dict(zip(leaves, found, strict=False))
        deltas = iter(found[len(leaves) :])
        for name, inputs in batch.inputs.items():  # of recurrent layers: rows of every step
            for a in inputs:
                d = next(deltas)
                if d is not None:
                    part = d.reshape(-1, d.shape[-1]).mT @ a.flatten(0, 1)
                    before = gradient[name]
                    gradient[name] = part if before is None else before + part
        return total, list(gradient.values())


def at_own_values(leaves: Tensors, own: Tensors) -> Tensors:
    """Values of groups (groups, *shape), whose gradients go to shared leaves, as their sum."""
    outs = _At.apply(  # type: ignore[no-untyped-call]
        len(own), *(leaves[name] for name in own), *own.values()
    )
    return dict(zip(own, outs, strict=True)) if own else {}


class _At(torch.autograd.Function):
    """Values (groups, *shape) of some leaves; all their gradients are added up by one call."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The values."""
        ctx.set_materialize_grads(False)
        ctx.shapes = [leaf.shape for leaf in tensors[:count]]
        return tuple(own.view_as(own) for own in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The sums over groups; None for values that were not used."""
        used = [g.reshape(len(g), -1) for g in grads if g is not None]
        sums: list[Tensor] = []
        if used:
            joined = used[0] if len(used) == 1 else torch.cat(used, 1)
            sums = list(torch.split(joined.sum(0), [g.shape[1] for g in used]))
        parts = iter(sums)
        found = [
            None if g is None else next(parts).view(shape)
            for g, shape in zip(grads, ctx.shapes, strict=True)
        ]
        return (None, *found, *[None] * len(grads))


class Vectorised:
    """Each group a call of the model as a function, all of them under vmap."""

    def __init__(self, task: StepTask, plan: StepPlan) -> None:
        self.task = task
        self._scale = task.radii.scale(task.shared)

    def __call__(self, examples: Examples, groups: int) -> ChunkGradient:
        """As `Passes`."""
        task, noise = self.task, Noise(self.task.model.device)

        def first(inputs: Inputs, labels: Tensor) -> GroupGradient:
            return group_gradient(
                task.model, task.loss, task.shared, {}, {}, inputs, labels,
                task.recorder.over_groups,
            )  # fmt: skip

        def second(at: Tensors, inputs: Inputs, labels: Tensor) -> GroupGradient:
            return group_gradient(task.model, task.loss, at, {}, {}, inputs, labels)

        with without_checkpointing():
            found = vmap(first, randomness="different")(*grouped(examples, groups))
            steps = steps_of_groups(
                task.shared, found.dense, {}, found.exponent, task.radii, self._scale,
                task.variant.direction, careful=True,
            )  # fmt: skip
            shares = task.weighted(found.weight)
            gradient: Sequence[Tensor | None]
            with task.again(noise):
                if task.variant.combine is None:
                    after, gradient = self._second_pass(examples, groups, steps, shares)
                else:
                    one = vmap(second, randomness="different")(steps.at, *grouped(examples, groups))
                    after = (one.mean * shares).sum()
                    gradient = task.combined(
                        (found.dense, found.exponent), (one.dense, one.exponent), shares
                    )
        return ChunkGradient(found.mean, found.weight, after, gradient, found.noted, steps.doubtful)

    def _second_pass(
        self, examples: Examples, groups: int, steps: Steps, shares: Tensor
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        with torch.enable_grad():
            leaves = [w.detach().requires_grad_() for w in self.task.shared.values()]
            at = at_own_values(dict(zip(self.task.shared, leaves, strict=True)), steps.at)
            losses: Tensor = vmap(self._loss, randomness="different")(
                at, *grouped(examples, groups)
            )
            total = (losses.double() * shares).sum()
            gradient = torch.autograd.grad(self.task.scale(total), leaves, allow_unused=True)
        return total.detach(), gradient

    def _loss(self, at: Tensors, inputs: Inputs, labels: Tensor) -> Tensor:
        f = self.task
        return f.model.within(at, lambda: f.loss(f.model.outputs(inputs), labels))


class Alone:
    """A group by itself, by plain autograd with the weights assigned."""

    def __init__(self, task: StepTask, plan: StepPlan) -> None:
        self.task, self._layout, self._careful = task, plan.layout, plan.careful
        self._weights: Tensors = in_layout(task.shared, plan.layout)
        self._scale = task.radii.scale(self._weights)
        wide = task.model.dtype in (torch.float32, torch.float64)
        self._scaled = plan.careful or not wide or torch.is_autocast_enabled(task.model.device.type)
        self._leaves: list[Tensor] | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the module holds the weights: nothing is swapped for each group."""
        with without_reentry(), self.task.model.assigned(self._weights) as leaves:
            self._leaves = leaves
            try:
                yield
            finally:
                self._leaves = None

    def __call__(self, examples: Examples, groups: int = 1) -> ChunkGradient:
        """As `Passes`, for a single group."""
        with nullcontext() if self._leaves is not None else self.held():
            assert self._leaves is not None
            return self._group(examples_in_layout(examples, self._layout), self._leaves)

    def _group(self, examples: Examples, leaves: list[Tensor]) -> ChunkGradient:
        task, model = self.task, self.task.model
        noise = Noise(model.device)
        with task.recorder.of_one_batch(1) as statistics:
            first = leaf_gradient(model, task.loss, leaves, examples, scaled=self._scaled)
        at, doubtful = step_of_one(
            self._weights, self._real(first.gradient), first.exponent, task.radii,
            self._scale, task.variant.direction, careful=self._careful, scaled=self._scaled,
        )  # fmt: skip
        loss, weight = first.mean, first.weight
        share = task.weighted(weight)
        self._move(leaves, at)
        with task.again(noise):
            if task.variant.combine is None:
                del first
                after, gradient = self._second_pass(examples, leaves, share)
            else:
                second = leaf_gradient(model, task.loss, leaves, examples, scaled=self._scaled)
                after = second.mean * share
                gradient = task.combined(
                    self._group_of(first), self._group_of(second), share.unsqueeze(0)
                )
        self._move(leaves, self._weights)
        return ChunkGradient(
            loss.unsqueeze(0), weight.unsqueeze(0), after, gradient, statistics, doubtful
        )

    def _second_pass(
        self, examples: Examples, leaves: list[Tensor], share: Tensor
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        task = self.task
        with torch.enable_grad():
            outputs = task.model.outputs(examples.inputs)
            total, found = pulled_back(
                task.loss, outputs, examples.labels, share.unsqueeze(0), task.scale, leaves
            )
        dense = [g.to_dense() if g is not None and g.is_sparse else g for g in found]
        return total.double(), self._real(dense)

    def _group_of(self, found: PlainGradient) -> tuple[Tensors, Tensor]:
        """A gradient with an axis of one group, 0 where nothing is used, and its exponent."""
        gradient = dict(zip(self._weights, self._real(found.gradient), strict=True))
        dense = {
            name: (torch.zeros_like(self._weights[name]) if g is None else g).unsqueeze(0)
            for name, g in gradient.items()
        }
        return dense, found.exponent.unsqueeze(0)

    def _move(self, leaves: list[Tensor], to: Tensors) -> None:
        for leaf, (name, value) in zip(leaves, to.items(), strict=True):
            leaf.data = self.task.model.native(name, value)

    def _real(self, gradient: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        model = self.task.model
        return [
            None if g is None else model.real(name, g)
            for name, g in zip(self._weights, gradient, strict=True)
        ]
