"""The loss of every example at many points of a subspace: one after the other, or side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from sharpkit.contract.checks import Probe
from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.losses import MeanLoss
from sharpkit.groupwise.fallback import Disagreement
from sharpkit.groupwise.objective import examples_in_layout, in_layout
from sharpkit.groupwise.survey import survey
from sharpkit.landscapes.batch_norm import (
    layers_with_statistics,
    recompute_statistics,
    statistics_batches,
)
from sharpkit.landscapes.states import Tensors
from sharpkit.landscapes.subspace import Subspace, working
from sharpkit.measures.passes import single_terms
from sharpkit.training.loop import classifies

_HELD = 2**31  # bytes of examples that lie on the device all the time
_OUTPUTS = 2**22  # entries of outputs that wait for their loss
_STACKED = 2**26  # entries of weights side by side, at most
_MOST = 64  # points side by side, at most


class Terms(NamedTuple):
    """The loss of any examples at a point is Σ sums / Σ weights; all of shape (n,), float64."""

    sums: Tensor
    weights: Tensor
    # 1 for an example that is classified rightly, NaN for one without a class; None without classes
    right: Tensor | None


@dataclass
class Passes:
    """Forward passes over the examples at points of a subspace, given by their coefficients.

    Attributes:
        function: The model, inside `frozen`.
        loss: What is measured.
        subspace: Where the weights go.
        examples: All of them, in order.
        batch: Examples at a time.
        layout: Of images and of the weights of convolutions.
        recompute: Whether each point has BatchNorm statistics of its own.
        loop_loss: Whether the loss is called for one example at a time.
    """

    function: FunctionalModel
    loss: MeanLoss
    subspace: Subspace
    examples: Examples
    batch: int
    layout: torch.memory_format = torch.contiguous_format
    recompute: bool = False
    loop_loss: bool = False
    _home: list[Tensor] = field(init=False, repr=False)
    _basis: list[list[Tensor]] = field(init=False, repr=False)
    _held: bool = field(init=False, repr=False)  # whether all examples are on the device

    def __post_init__(self) -> None:
        origin = {name: working(w) for name, w in self.subspace.origin.items()}
        self._home = list(in_layout(origin, self.layout).values())
        self._basis = [list(in_layout(b, self.layout).values()) for b in self.subspace.basis]
        self._held = self.examples.in_memory and _bytes(self.examples) <= _HELD
        if self._held:
            self.examples = self._ready(self.examples)

    def one_by_one(self, coefficients: NDArray[np.float64]) -> Iterator[Terms]:
        """The terms of each point, shape (points, K), with the weights assigned to the module."""
        function = self.function
        layers = layers_with_statistics(function.model) if self.recompute else []
        for c in coefficients:
            function.set_buffers(self.subspace.buffers_at(c))
            with function.evaluating(), function.assigned(self._weights(c)):
                if layers:
                    recompute_statistics(function, layers, statistics_batches(self.examples))
                yield self._terms()

    def side_by_side(self, coefficients: NDArray[np.float64], probe: Probe) -> Iterator[Terms]:
        """The same, for several points at a time under vmap.

        Raises:
            Disagreement: If the model cannot run at swapped weights, or gives other losses then.
        """
        refused = probe.try_swapping()
        if not self.examples.in_memory:  # a loader that is begun draws a number, which vmap refuses
            refused = "the examples are a stream, which is read for one point at a time"
        if refused:
            raise Disagreement(refused)
        function = self.function

        def at(state: Tensors) -> tuple[Tensor, ...]:
            terms = function.within(state, self._terms)
            return tuple(t for t in terms if t is not None)

        count = points_at_a_time(self._home)
        for start in range(0, len(coefficients), count):
            block = coefficients[start : start + count]
            states = [{**self._weights(c), **self.subspace.buffers_at(c)} for c in block]
            stacked = {name: torch.stack([s[name] for s in states]) for name in states[0]}
            with function.evaluating():
                found = [t.detach() for t in torch.func.vmap(at)(stacked)]
            if start == 0:
                self._compare(block[-1], found[0][-1])
            for k in range(len(block)):
                sums, weights, *right = (t[k] for t in found)
                yield Terms(sums, weights, right[0] if right else None)

    def _compare(self, coefficients: NDArray[np.float64], sums: Tensor) -> None:
        alone = next(self.one_by_one(coefficients[None])).sums
        both = torch.isfinite(alone) & torch.isfinite(sums)
        tolerance = 1e-3 if self.function.dtype != torch.float64 else 1e-9
        scale = alone[both].abs().amax() if bool(both.any()) else 1.0
        if bool(((alone - sums)[both].abs() > tolerance * scale).any()):
            raise Disagreement("weights are used otherwise than one point at a time")

    def _weights(self, coefficients: NDArray[np.float64]) -> Tensors:
        """The weights at a point, each in its own dtype."""
        at = self._home
        for b, c in zip(self._basis, coefficients.tolist(), strict=True):
            if c != 0.0:  # an infinite entry times 0 is no number
                at = list(torch._foreach_add(at, b, alpha=c))
        named = zip(self.subspace.origin.items(), at, strict=True)
        return {name: t.to(w.dtype) for (name, w), t in named}

    def _terms(self) -> Terms:
        """The terms of all examples at whatever weights the module holds now."""
        waiting: list[tuple[Any, Tensor]] = []
        found: list[Terms] = []
        entries = 0
        for part in self.examples.chunks(self.batch):
            ready = part if self._held else self._ready(part)
            outputs = self.function.outputs(ready.inputs)
            waiting.append((outputs, ready.labels))
            entries += sum(t.numel() for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor))
            if entries > _OUTPUTS:
                found += self._losses(waiting)
                waiting, entries = [], 0
        found += self._losses(waiting)
        sums, weights = torch.cat([f.sums for f in found]), torch.cat([f.weights for f in found])
        rights = [f.right for f in found if f.right is not None]
        return Terms(sums, weights, torch.cat(rights) if len(rights) == len(found) else None)

    def _losses(self, waiting: list[tuple[Any, Tensor]]) -> list[Terms]:
        """The terms of outputs; of several batches at once where they have one shape."""
        if len(waiting) > 1 and self.examples.uniform and isinstance(waiting[0][0], Tensor):
            waiting = [(torch.cat([o for o, _ in waiting]), torch.cat([y for _, y in waiting]))]
        found = []
        for outputs, labels in waiting:
            right = None
            if classifies(outputs, labels):
                right = (outputs.argmax(1) == labels).double()
                right = torch.where(labels < 0, torch.nan, right)
            if self.loss.exact:
                outputs = pytree.tree_map(_in_double, outputs)
            sums, weights = self._each(outputs, labels)
            found.append(Terms(sums.detach().double(), weights.double(), right))
        return found

    def _each(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not self.loop_loss:
            return single_terms(self.loss)(outputs, labels)
        pairs = []
        for k in range(len(labels)):
            one = pytree.tree_map(partial(_row, k), outputs)
            pairs.append(self.loss.terms(one, labels[k : k + 1]))
        means, weights = (torch.stack(list(part)) for part in zip(*pairs, strict=True))
        return means * weights.to(means.dtype), weights

    def _ready(self, examples: Examples) -> Examples:
        moved = examples.to(self.function.device, self.function.dtype)
        return examples_in_layout(moved, self.layout)


def needs_loop_loss(loss: MeanLoss, probe: Probe) -> bool:
    """Whether a loss of one's own cannot be called for many examples side by side."""
    if loss.exact:
        return False
    try:
        single_terms(loss)(probe.outputs, probe.examples.labels)
    except Exception:  # of whatever kind: then it is called for one after the other
        return True
    return False


def prefers_side_by_side(function: FunctionalModel, origin: Tensors, probe: Probe, n: int) -> bool:
    """Whether points run faster side by side: where one alone leaves a GPU waiting for calls.

    On a CPU one after the other took 0.35 to 0.7 of the time.
    """
    if function.device.type != "cuda":
        return False
    return n < survey(function, origin, probe.examples).alone(function.device)


def points_at_a_time(weights: Sequence[Tensor]) -> int:
    """How many points have their weights side by side; it follows from sizes alone."""
    entries = max(1, sum(w.numel() for w in weights))
    return max(1, min(_MOST, _STACKED // entries))


def _bytes(examples: Examples) -> int:
    parts = (pytree.tree_leaves((p.inputs, p.labels)) for p in examples.chunks(len(examples)))
    return sum(t.nbytes for leaves in parts for t in leaves)


def _row(k: int, leaf: Any) -> Any:
    return leaf[k : k + 1] if isinstance(leaf, Tensor) else leaf


def _in_double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
