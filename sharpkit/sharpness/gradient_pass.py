"""The gradients of all base groups of a chunk, by vmap or one by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp, vmap

from sharpkit.contract.examples import Examples, Inputs
from sharpkit.sharpness import geometry, low_rank
from sharpkit.sharpness.blocks import Blocks, concatenated, stacked
from sharpkit.sharpness.geometry import Factors, Tensors
from sharpkit.sharpness.objective import Objective, grouped


class GradientPass:
    """Per-block gradients at the unperturbed weights.

    Args:
        objective: What is measured.
        factored: Names of linear weights whose gradient is kept as factors.
        losses_only: Skip the gradients.
    """

    def __init__(
        self, objective: Objective, factored: frozenset[str], *, losses_only: bool = False
    ) -> None:
        self.objective, self.losses_only = objective, losses_only
        self.dense = {k: w for k, w in objective.weights.items() if k not in factored}
        self.factored = {k: w for k, w in objective.weights.items() if k in factored}
        self._shapes: dict[int, dict[str, list[torch.Size]]] = {}

    def __call__(self, examples: Examples, size: int) -> Blocks:
        """Gradients of consecutive blocks of `size` examples each."""
        count = len(examples) // size
        if not self.factored and (count == 1 or size >= self.objective.alone):
            return stacked(
                [self._one_block(examples.slice(i * size, (i + 1) * size)) for i in range(count)]
            )
        outputs = vmap(lambda x, y: self._block(x, y, size))(*grouped(examples, count))
        return self._blocks(size, *outputs)

    def _one_block(self, examples: Examples) -> Blocks:
        """A block of any size without vmap, in slices of a chunk; exact for the mean loss."""
        total: Blocks | None = None
        for chunk in examples.chunks(self.objective.chunk):
            part = self._slice(chunk)
            total = part if total is None else concatenated(total, part)
        assert total is not None
        return total

    def _slice(self, part: Examples) -> Blocks:
        """One block by plain autograd, which has less overhead than torch.func."""
        f = self.objective
        if self.losses_only:
            with torch.no_grad():
                loss = f.at(f.weights, part.inputs, part.labels).double().unsqueeze(0)
            return Blocks(len(part), loss, {}, {}, torch.zeros_like(loss))
        weights = {name: w.detach().requires_grad_() for name, w in f.weights.items()}
        with torch.enable_grad():
            out = f.model(weights, part.inputs)
            leaf = out.detach().requires_grad_()
            loss = f.loss(leaf, part.labels)
            delta = torch.autograd.grad(loss, leaf, allow_unused=True, materialize_grads=True)[0]
        delta, exponent = _without_underflow(delta)
        leaves = list(weights.values())
        gradient: Sequence[Tensor] = [torch.zeros_like(w) for w in leaves]
        if out.requires_grad:  # else no selected weight is used
            gradient = torch.autograd.grad(
                out, leaves, delta, allow_unused=True, materialize_grads=True
            )
        tensors = {k: g.unsqueeze(0) for k, g in zip(weights, gradient, strict=True)}
        loss = loss.detach().double().unsqueeze(0)
        return Blocks(len(part), loss, tensors, {}, exponent.unsqueeze(0))

    def _block(
        self, inputs: Inputs, labels: Tensor, size: int
    ) -> tuple[Tensor, Tensors, dict[str, list[Tensor]], dict[str, list[Tensor]], Tensor]:
        f = self.objective
        if self.losses_only:
            with torch.no_grad():
                loss = f.at(f.weights, inputs, labels).double()
            return loss, {}, {}, {}, torch.zeros_like(loss)
        probes = {
            name: [torch.zeros(s, device=f.model.device, dtype=f.model.dtype) for s in shapes]
            for name, shapes in self._output_shapes(inputs, size).items()
        }

        def outputs(
            dense: Tensors, probes: dict[str, list[Tensor]]
        ) -> tuple[Tensor, dict[str, list[Tensor]]]:
            layer_inputs: dict[str, list[Tensor]] = {name: [] for name in self.factored}

            def rule(name: str, call: int, layer_input: Tensor, out: Tensor) -> Tensor:
                layer_inputs[name].append(layer_input)
                return out + probes[name][call]

            with low_rank.Calls(self.factored, rule):
                return f.model({**dense, **self.factored}, inputs), layer_inputs

        out, pull, layer_inputs = vjp(  # type: ignore[misc]
            outputs, self.dense, probes, has_aux=True
        )
        delta, loss = grad_and_value(f.loss)(out, labels)
        delta, exponent = _without_underflow(delta)
        with torch.no_grad():  # else torch.func records the backward pass for a second derivative
            dense, deltas = pull(delta, retain_graph=False)
        return loss.double(), dense, layer_inputs, deltas, exponent

    def _blocks(
        self,
        size: int,
        loss: Tensor,
        dense: Tensors,
        layer_inputs: dict[str, list[Tensor]],
        deltas: dict[str, list[Tensor]],
        exponent: Tensor,
    ) -> Blocks:
        factors: Factors = {}
        for name in self.factored:
            a = torch.cat([t.reshape(len(loss), -1, t.shape[-1]) for t in layer_inputs[name]], 1)
            d = torch.cat([t.reshape(len(loss), -1, t.shape[-1]) for t in deltas[name]], 1)
            factors[name] = (a, d)
        return Blocks(size, loss, dense, factors, exponent)

    def _output_shapes(self, inputs: Inputs, size: int) -> dict[str, list[torch.Size]]:
        """Shapes of the factored layers' outputs for one block, from a forward pass of its own."""
        if not self.factored:
            return {}
        if size not in self._shapes:
            shapes: dict[str, list[torch.Size]] = {name: [] for name in self.factored}

            def rule(name: str, call: int, layer_input: Tensor, out: Tensor) -> Tensor:
                shapes[name].append(out.shape)
                return out

            with torch.no_grad(), low_rank.Calls(self.factored, rule):
                self.objective.model(self.objective.weights, inputs)
            self._shapes[size] = shapes
        return self._shapes[size]


def _without_underflow(delta: Tensor) -> tuple[Tensor, Tensor]:
    """A loss gradient scaled so that its largest entry is near 1, and the power of two that did."""
    top = delta.abs().amax().double()
    exponent = torch.where(top > 0, -torch.floor(torch.log2(top)), torch.inf)
    return geometry.power_of_two(delta, torch.where(top > 0, exponent, 0.0)), exponent
