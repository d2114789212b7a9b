"""Losses and gradients of groups that run as one ordinary batch (see `one_batch`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.losses import MeanLoss
from sharpkit.groupwise import low_rank, windows
from sharpkit.groupwise.fallback import Disagreement
from sharpkit.groupwise.geometry import Factors, Tensors
from sharpkit.groupwise.group_gradient import GroupTerms, group_losses, group_slopes
from sharpkit.groupwise.objective import floating_leaves
from sharpkit.groupwise.one_batch import OneBatch, Point, Positions
from sharpkit.groupwise.packing import Packing
from sharpkit.groupwise.survey import Survey


@dataclass(frozen=True)
class BatchGradients:
    """What `BatchPasses.gradients` finds: terms, packs (groups, ...) times 2^exponent, factors."""

    terms: GroupTerms
    packs: Tensors
    factors: Factors


@dataclass
class BatchPasses:
    """Passes of a model over groups as one batch."""

    model: FunctionalModel
    loss: MeanLoss
    weights: Tensors  # the parameters that differ from group to group, (*shape)
    rows: dict[str, low_rank.Rows]  # of the weights whose gradient may stay in factors
    packed: bool = True  # whether small parameters lie side by side (see `Packing`)
    kept: dict[Any, Tensor] = field(default_factory=dict)
    # other parameters, and buffers, that differ from group to group but get no gradient, (*shape)
    fixed: Tensors = field(default_factory=dict)
    positions: Positions = field(default_factory=dict)  # (see `Survey`)

    def __post_init__(self) -> None:
        self.packing = Packing(self.weights, frozenset(self.rows if self.packed else self.weights))
        self._stand_ins = low_rank.stand_ins({**self.weights, **self.fixed})
        self._own: list[Tensor] | None = None
        self._points: dict[tuple[int, int, frozenset[str]], tuple[Tensors, Point]] = {}

    def gradients(
        self,
        examples: Examples,
        groups: int,
        factored: frozenset[str] = frozenset(),
        at: Tensors | None = None,
        fixed: Tensors | None = None,
    ) -> BatchGradients:
        """The loss of every group and its gradient, one of the group's own.

        `at` are packs (groups, ...), None for the weights themselves; `factored` are the weights
        whose gradient is wanted as factors; `fixed` are the values (groups, ...) of those tensors.
        """
        if at is None:
            leaves, point = self._at_the_weights(groups, len(examples) // groups, factored)
        else:
            values = {**self.packing.parts(at), **(fixed or {})}
            leaves, point = self._at(groups, len(examples) // groups, at, values, factored)
        with torch.enable_grad(), self._run(point) as batch:
            outputs = self.model.outputs(examples.inputs)
        terms = group_slopes(self.loss, outputs, examples.labels, groups)
        probes = [probe for calls in batch.probes.values() for probe in calls]
        ends = floating_leaves(outputs)
        pairs = [(e, s) for e, s in zip(ends, terms.slopes, strict=True) if e.requires_grad]
        found = torch.autograd.grad(
            [e for e, _ in pairs], [*leaves.values(), *probes], [s for _, s in pairs],
            allow_unused=True,
        ) if pairs else [None] * (len(leaves) + len(probes))  # fmt: skip
        factors = _factors(batch, found[len(leaves) :], groups)
        dense = {
            name: low_rank.multiplied_out(*factors.pop(name), self.weights[name].shape)
            for name in batch.probes
            if name not in factored
        }
        packs = self._packs(leaves, found, dense)
        return BatchGradients(terms, packs, factors)

    def losses(
        self,
        examples: Examples,
        groups: int,
        at: Tensors,
        thin: Factors | None = None,
        fixed: Tensors | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean losses and their weights, (groups,) float64.

        `at` are packs (groups, ...), `thin` perturbations DᵀA of the weights that are not in them;
        `fixed` as in `gradients`.
        """
        thin = thin or {}
        values = {
            **self.packing.parts(at, copied=True),
            **{name: self.weights[name] for name in thin},
            **(fixed or {}),
        }
        point = Point(groups, len(examples) // groups, values, thin)
        with self.model.evaluating(), self._run(point):
            outputs = self.model.outputs(examples.inputs)
        return group_losses(self.loss, outputs, examples.labels, groups)

    def _packs(self, leaves: Tensors, found: Sequence[Tensor | None], more: Tensors) -> Tensors:
        """Gradients of packs, and more of some parameters, (groups, *shape), added to them."""
        packs = {}
        for (name, leaf), g in zip(leaves.items(), found, strict=False):
            own = more.pop(name, None)
            if own is not None:
                g = own if g is None else g + own
            packs[name] = torch.zeros_like(leaf) if g is None else g
        parts = self.packing.parts(packs)
        for name, own in more.items():
            parts[name] += own
        return packs

    def _at_the_weights(
        self, groups: int, size: int, factored: frozenset[str]
    ) -> tuple[Tensors, Point]:
        """Made once: every chunk starts from the same weights."""
        key = groups, size, factored
        if key not in self._points:
            shared = {name: w for name, w in self.weights.items() if name not in factored}
            packs = self.packing.joined(shared)
            at = {name: w.expand(groups, *w.shape) for name, w in packs.items()}
            self._points.clear()
            self._points[key] = self._at(groups, size, at, self.weights, factored)
        return self._points[key]

    def _at(
        self, groups: int, size: int, at: Tensors, values: Tensors, factored: frozenset[str]
    ) -> tuple[Tensors, Point]:
        """What is differentiated by, packs, and the point that consists of them."""
        leaves = {name: t.detach().requires_grad_() for name, t in at.items()}
        with torch.enable_grad():
            targets = self.packing.parts(leaves)
        return leaves, Point(groups, size, values, targets=targets, probed=factored)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the model holds NaN where groups differ: nothing is swapped for each pass."""
        with self.model.assigned(self._stand_ins) as own:
            self._own = own
            try:
                yield
            finally:
                self._own = None

    @contextmanager
    def _run(self, point: Point) -> Iterator[OneBatch]:
        with nullcontext() if self._own is not None else self.held():
            assert self._own is not None
            held = dict(zip(self._stand_ins, self._own, strict=True))
            with self.batch(held, point) as batch:
                yield batch

    def batch(self, held: Tensors, point: Point) -> OneBatch:
        """The mode in which a model that holds such tensors runs at a point."""
        return OneBatch(held, point, self.kept, self.positions)


def _factors(batch: OneBatch, grads: Any, groups: int) -> Factors:
    """The rows of all calls of every probed weight, one after the other."""
    found, rest = {}, list(grads)
    # matrices of one recurrent layer may share their derivatives, which are held: ids come again
    known: dict[int, tuple[Tensor, Tensor]] = {}

    def rows(g: Tensor, name: str) -> Tensor:
        if id(g) not in known:
            known[id(g)] = g, windows.delta_rows(g, groups, convolution=batch.held_ndim(name) > 2)
        return known[id(g)][1]

    for name, probes in batch.probes.items():
        calls = len(probes)
        mine, rest = rest[:calls], rest[calls:]
        deltas = [
            rows(torch.zeros_like(p) if g is None else g, name)
            for g, p in zip(mine, probes, strict=True)
        ]
        found[name] = (_joined(batch.inputs[name]), _joined(deltas))
    return found


def _joined(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def batch_passes(
    model: FunctionalModel, loss: MeanLoss, weights: Tensors, found: Survey, *, packed: bool = True
) -> BatchPasses:
    """The passes of a model, if every use of a weight is recognised.

    Raises:
        Disagreement: If it cannot run as one batch.
    """
    if found.refused:
        raise Disagreement(f"as one batch, {found.refused}")
    return BatchPasses(
        model, loss, weights, found.factored(weights), packed, positions=found.positions
    )
