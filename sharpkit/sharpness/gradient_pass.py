"""The gradients of all base groups of a chunk, by vmap or one by one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import vmap

from sharpkit.contract.examples import Examples, Inputs
from sharpkit.groupwise import low_rank
from sharpkit.groupwise.geometry import Tensors
from sharpkit.groupwise.group_gradient import GroupGradient, group_gradient, joined_factors
from sharpkit.groupwise.objective import Objective, grouped
from sharpkit.sharpness.blocks import Blocks, concatenated, stacked


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
                [
                    block_at(
                        self.objective,
                        self.objective.weights,
                        examples.slice(i * size, (i + 1) * size),
                        losses_only=self.losses_only,
                    )
                    for i in range(count)
                ]
            )
        found = vmap(lambda x, y: self._block(x, y, size))(*grouped(examples, count))
        return Blocks(
            size, found.mean, found.weight, found.dense, joined_factors(found), found.exponent
        )

    def _block(self, inputs: Inputs, labels: Tensor, size: int) -> GroupGradient:
        f = self.objective
        if self.losses_only:
            with f.model.evaluating():
                loss, weight = f.at(f.weights, inputs, labels)
            loss = loss.double()
            return GroupGradient(loss, weight.double(), {}, {}, {}, torch.zeros_like(loss), {})
        shapes = self._output_shapes(inputs, size)
        return group_gradient(f.model, f.loss, self.dense, self.factored, shapes, inputs, labels)

    def _output_shapes(self, inputs: Inputs, size: int) -> dict[str, list[torch.Size]]:
        """Shapes of the factored layers' outputs for one block, from a forward pass of its own."""
        if not self.factored:
            return {}
        if size not in self._shapes:
            shapes: dict[str, list[torch.Size]] = {name: [] for name in self.factored}

            def rule(name: str, call: int, layer_input: Tensor, out: Tensor) -> Tensor:
                shapes[name].append(out.shape)
                return out

            f = self.objective
            with f.model.evaluating(), low_rank.Calls(self.factored, rule) as calls:
                f.model({**f.weights, **calls.stand_ins}, inputs)
            self._shapes[size] = shapes
        return self._shapes[size]


def block_at(
    objective: Objective, weights: Tensors, examples: Examples, *, losses_only: bool = False
) -> Blocks:
    """One block of any size at the given weights by plain autograd, in slices of a chunk."""
    if losses_only:
        loss, weight = (t.unsqueeze(0) for t in objective.losses(weights, examples))
        return Blocks(len(examples), loss, weight, {}, {}, torch.zeros_like(loss))
    total: Blocks | None = None
    for part in examples.chunks(objective.chunk):
        found = objective.gradient(weights, part)
        tensors = {
            name: (torch.zeros_like(w) if g is None else g).unsqueeze(0)
            for (name, w), g in zip(weights.items(), found.gradient, strict=True)
        }
        loss, weight, exponent = (
            t.unsqueeze(0) for t in (found.mean, found.weight, found.exponent)
        )
        block = Blocks(len(part), loss, weight, tensors, {}, exponent)
        total = block if total is None else concatenated(total, block)
    assert total is not None
    return total
