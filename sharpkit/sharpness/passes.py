"""Three ways to evaluate groups: as one batch, under vmap, or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from sharpkit.compiling import Compiled
from sharpkit.contract.examples import Examples, Inputs
from sharpkit.contract.holding import unfused_attention
from sharpkit.groupwise import low_rank
from sharpkit.groupwise.batch_passes import BatchPasses
from sharpkit.groupwise.geometry import Factors, Tensors
from sharpkit.groupwise.group_gradient import GroupGradient, group_gradient, joined_factors
from sharpkit.groupwise.objective import Objective, grouped
from sharpkit.groupwise.packing import Packing
from sharpkit.sharpness.blocks import Blocks, stacked


class Passes(Protocol):
    """Losses and gradients of equally large groups of consecutive examples.

    Weights are given and gradients returned as packs (see `Packing`) with an axis of groups.
    """

    packing: Packing
    rows: dict[str, low_rank.Rows]  # of the weights whose gradient may stay in factors

    def held(self) -> AbstractContextManager[None]:
        """To be entered around many passes."""

    def losses_only(self, examples: Examples, groups: int) -> Blocks:
        """The losses at the weights themselves."""

    def gradients(self, examples: Examples, groups: int, factored: frozenset[str]) -> Blocks:
        """Losses and gradients at the weights themselves."""

    def losses(
        self, examples: Examples, groups: int, at: Tensors, thin: Factors | None = None
    ) -> Tensor:
        """Mean losses, (groups,) float64, at packs and at factored weights moved by DᵀA."""

    def slopes(self, examples: Examples, groups: int, at: Tensors) -> tuple[Tensors, Tensor]:
        """Gradients, up to a factor per group, and losses at packs."""


class Alone:
    """Groups one after the other, by plain autograd with the weights assigned, in batches."""

    def __init__(self, objective: Objective, packing: Packing) -> None:
        self.objective, self.packing = objective, packing
        self.rows: dict[str, low_rank.Rows] = {}
        self.held = nullcontext

    def losses_only(self, examples: Examples, groups: int) -> Blocks:
        """As `Passes`."""
        f = self.objective
        found = [f.losses(f.weights, part) for part in _split(examples, groups)]
        loss, weight = (torch.stack(part) for part in zip(*found, strict=True))
        return Blocks(len(examples) // groups, {}, loss, weight, {}, {}, torch.zeros_like(loss))

    def gradients(
        self, examples: Examples, groups: int, factored: frozenset[str] = frozenset()
    ) -> Blocks:
        """As `Passes`; nothing stays in factors."""
        weights = self.objective.weights
        return stacked([self._block(weights, part) for part in _split(examples, groups)])

    def losses(
        self, examples: Examples, groups: int, at: Tensors, thin: Factors | None = None
    ) -> Tensor:
        """As `Passes`."""
        return torch.stack([self.objective.losses(w, e)[0] for w, e in self._each(at, examples)])

    def slopes(self, examples: Examples, groups: int, at: Tensors) -> tuple[Tensors, Tensor]:
        """As `Passes`."""
        found = stacked([self._block(w, e) for w, e in self._each(at, examples)])
        return found.tensors, found.loss

    def _each(self, at: Tensors, examples: Examples) -> Iterator[tuple[Tensors, Examples]]:
        """The weights and the examples of every group."""
        tensors = self.packing.parts(at)
        groups = len(next(iter(tensors.values())))
        for i, part in enumerate(_split(examples, groups)):
            yield {name: t[i] for name, t in tensors.items()}, part

    def _block(self, weights: Tensors, examples: Examples) -> Blocks:
        found = self.objective.gradient(weights, examples)
        packs = self.packing.joined(
            {
                name: torch.zeros_like(w) if g is None else g
                for (name, w), g in zip(weights.items(), found.gradient, strict=True)
            }
        )
        return Blocks(
            len(examples), {}, found.mean.unsqueeze(0), found.weight.unsqueeze(0),
            {name: g.unsqueeze(0) for name, g in packs.items()}, {}, found.exponent.unsqueeze(0),
        )  # fmt: skip


class OneBatchPasses:
    """All groups as one ordinary batch.

    With `compile` they run compiled, one form of each: that of the first chunk.
    """

    def __init__(self, passes: BatchPasses, *, compile: bool = False) -> None:
        self._passes, self.packing, self.rows = passes, passes.packing, passes.rows
        self.held = passes.held
        self._compile = compile
        self._compiled: dict[Any, Compiled[Any]] = {}

    def losses_only(self, examples: Examples, groups: int) -> Blocks:
        """As `Passes`."""
        loss, weight = self._passes.losses(
            examples, groups, self.packing.joined(self._passes.weights)
        )
        return Blocks(len(examples) // groups, {}, loss, weight, {}, {}, torch.zeros_like(loss))

    def gradients(self, examples: Examples, groups: int, factored: frozenset[str]) -> Blocks:
        """As `Passes`."""

        def found(inputs: Inputs, labels: Tensor) -> tuple[Any, Tensors, Factors]:
            found = self._passes.gradients(Examples(inputs, labels), groups, factored)
            return found.terms[:3], found.packs, found.factors

        run = self._made(found, "gradients", groups, factored)
        (mean, weight, exponent), packs, factors = run(examples.inputs, examples.labels)
        shapes = {name: self._passes.weights[name].shape for name in factored}
        return Blocks(len(examples) // groups, shapes, mean, weight, packs, factors, exponent)

    def losses(
        self, examples: Examples, groups: int, at: Tensors, thin: Factors | None = None
    ) -> Tensor:
        """As `Passes`."""

        def found(inputs: Inputs, labels: Tensor, at: Tensors, thin: Factors) -> Tensor:
            return self._passes.losses(Examples(inputs, labels), groups, at, thin)[0]

        run = self._made(found, "perturbed losses", groups, frozenset(thin or {}))
        result: Tensor = run(examples.inputs, examples.labels, at, thin or {})
        return result

    def slopes(self, examples: Examples, groups: int, at: Tensors) -> tuple[Tensors, Tensor]:
        """As `Passes`."""
        found = self._passes.gradients(examples, groups, at=at)
        return found.packs, found.terms.mean

    def _made(
        self, function: Callable[..., Any], name: str, groups: int, factored: frozenset[str]
    ) -> Callable[..., Any]:
        if not self._compile:
            return function
        return self._compiled.setdefault((name, groups, factored), Compiled(function, name))


class Transformed:
    """Each group a call of the model as a function, all of them under vmap."""

    def __init__(
        self, objective: Objective, packing: Packing, rows: dict[str, low_rank.Rows]
    ) -> None:
        self.objective, self.packing, self.rows = objective, packing, rows
        self._shapes: dict[tuple[int, frozenset[str]], dict[str, list[torch.Size]]] = {}
        self.held = nullcontext  # each call of a transform swaps weights by itself

    def losses_only(self, examples: Examples, groups: int) -> Blocks:
        """As `Passes`."""
        f = self.objective
        with unfused_attention(), f.model.evaluating():
            mean, weight = vmap(lambda x, y: f.at(f.weights, x, y))(*grouped(examples, groups))
        loss = mean.double()
        size = len(examples) // groups
        return Blocks(size, {}, loss, weight.double(), {}, {}, torch.zeros_like(loss))

    def gradients(self, examples: Examples, groups: int, factored: frozenset[str]) -> Blocks:
        """As `Passes`."""
        f, size = self.objective, len(examples) // groups
        dense = {name: w for name, w in f.weights.items() if name not in factored}
        thin = {name: f.weights[name] for name in factored}
        shapes = self._output_shapes(examples, size, thin)

        def one(inputs: Inputs, labels: Tensor) -> GroupGradient:
            return group_gradient(f.model, f.loss, dense, thin, shapes, inputs, labels)

        with unfused_attention():
            found = vmap(one)(*grouped(examples, groups))
        return Blocks(
            size, {name: w.shape for name, w in thin.items()}, found.mean, found.weight,
            self.packing.joined(found.dense), joined_factors(found), found.exponent,
        )  # fmt: skip

    def losses(
        self, examples: Examples, groups: int, at: Tensors, thin: Factors | None = None
    ) -> Tensor:
        """As `Passes`."""
        f, thin = self.objective, thin or {}
        layers = {name: f.weights[name] for name in thin}

        def one(w: Tensors, thin: Factors, inputs: Inputs, labels: Tensor) -> Tensor:
            def rule(name: str, call: int, layer_input: Tensor, out: Tensor) -> Tensor:
                a, d = thin[name]
                return out + (layer_input @ a.mT) @ d

            with low_rank.Calls(layers, rule) as calls:
                return f.at({**w, **calls.stand_ins}, inputs, labels)[0]

        with unfused_attention():
            if not thin:
                means, _ = vmap(f.at)(self.packing.parts(at), *grouped(examples, groups))
            else:
                means = vmap(one)(self.packing.parts(at), thin, *grouped(examples, groups))
        return means.double()

    def slopes(self, examples: Examples, groups: int, at: Tensors) -> tuple[Tensors, Tensor]:
        """As `Passes`."""
        with unfused_attention():
            gradient, (loss, _) = vmap(grad_and_value(self.objective.at, has_aux=True))(
                self.packing.parts(at), *grouped(examples, groups)
            )
        return self.packing.joined(gradient), loss.double()

    def _output_shapes(
        self, examples: Examples, size: int, thin: Tensors
    ) -> dict[str, list[torch.Size]]:
        """Shapes of the factored layers' outputs for one group, from a forward pass of its own."""
        if not thin:
            return {}
        key = size, frozenset(thin)
        if key not in self._shapes:
            shapes: dict[str, list[torch.Size]] = {name: [] for name in thin}

            def rule(name: str, call: int, layer_input: Tensor, out: Tensor) -> Tensor:
                shapes[name].append(out.shape)
                return out

            f = self.objective
            with f.model.evaluating(), low_rank.Calls(thin, rule) as calls:
                f.model({**f.weights, **calls.stand_ins}, examples.slice(0, size).inputs)
            self._shapes[key] = shapes
        return self._shapes[key]


def _split(examples: Examples, groups: int) -> list[Examples]:
    if groups == 1:  # which may be all of a stream
        return [examples]
    size = len(examples) // groups
    return [examples.slice(i * size, (i + 1) * size) for i in range(groups)]
