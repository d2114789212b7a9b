"""Losses and gradients of groups, each at weights of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from sharpkit.contract.examples import Examples, Inputs
from sharpkit.sharpness import low_rank
from sharpkit.sharpness.geometry import Factors, Tensors
from sharpkit.sharpness.objective import Objective, grouped


class Groups:
    """Groups of consecutive examples, to be evaluated each at weights of its own."""

    def __init__(self, objective: Objective, examples: Examples, count: int) -> None:
        self.objective, self.examples, self.count = objective, examples, count

    def losses(
        self, weights: Tensors, factors: Factors | None = None, amount: Tensor | None = None
    ) -> Tensor:
        """The mean loss of each group, (groups,) float64.

        Args:
            weights: (groups, *shape) each.
            factors: Linear weights that are W + amount · DᵀA instead.
            amount: (groups,).
        """
        f = self.objective
        if factors:
            assert amount is not None
            return self._factored_losses(weights, factors, amount)
        if self.count > 1:
            return vmap(f.at)(weights, *grouped(self.examples, self.count)).double()
        single = {name: w[0] for name, w in weights.items()}
        total = torch.zeros(1, dtype=torch.float64, device=f.model.device)
        for e in self.examples.chunks(f.chunk):
            total += f.at(single, e.inputs, e.labels).double() * len(e)
        return total / len(self.examples)

    def gradients(self, weights: Tensors) -> tuple[Tensors, Tensor]:
        """The gradient (groups, *shape) and loss (groups,) of each group at its own weights."""
        f = self.objective
        if self.count > 1:
            gradient, loss = vmap(grad_and_value(f.at))(
                weights, *grouped(self.examples, self.count)
            )
            return gradient, loss.double()
        single = {name: w[0] for name, w in weights.items()}
        total: Tensors = {}
        value = torch.zeros(1, dtype=torch.float64, device=f.model.device)
        for e in self.examples.chunks(f.chunk):
            gradient, loss = grad_and_value(f.at)(single, e.inputs, e.labels)
            share = len(e) / len(self.examples)
            value += loss.double() * share
            total = {k: t * share + total.get(k, 0.0) for k, t in gradient.items()}
        return {name: t.unsqueeze(0) for name, t in total.items()}, value

    def _factored_losses(self, weights: Tensors, factors: Factors, amount: Tensor) -> Tensor:
        f = self.objective
        layers = {name: f.weights[name] for name in factors}
        # the amount may leave float32 although its product with the factors does not
        root = amount.sqrt().view(-1, 1, 1)
        thin = {
            name: ((a.double() * root).to(a.dtype), (d.double() * root).to(d.dtype))
            for name, (a, d) in factors.items()
        }

        def one(w: Tensors, thin: Factors, inputs: Inputs, labels: Tensor) -> Tensor:
            def rule(name: str, call: int, layer_input: Tensor, out: Tensor) -> Tensor:
                a, d = thin[name]
                return out + (layer_input @ a.mT) @ d

            with low_rank.Calls(layers, rule):
                return f.at({**w, **layers}, inputs, labels)

        return vmap(one)(weights, thin, *grouped(self.examples, self.count)).double()
