"""Losses and gradients of groups, each at weights of its own."""

from __future__ import annotations

from torch import Tensor
from torch.func import grad_and_value, vmap

from sharpkit.contract.examples import Examples, Inputs
from sharpkit.groupwise import low_rank
from sharpkit.groupwise.geometry import Factors, Tensors
from sharpkit.groupwise.objective import Objective, grouped
from sharpkit.sharpness.gradient_pass import block_at


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
            means, _ = vmap(f.at)(weights, *grouped(self.examples, self.count))
            return means.double()
        single = {name: w[0] for name, w in weights.items()}
        return f.losses(single, self.examples)[0].unsqueeze(0)

    def gradients(self, weights: Tensors) -> tuple[Tensors, Tensor]:
        """The gradient (groups, *shape), up to a factor, and loss (groups,) of each group."""
        f = self.objective
        if self.count > 1:
            gradient, (loss, _) = vmap(grad_and_value(f.at, has_aux=True))(
                weights, *grouped(self.examples, self.count)
            )
            return gradient, loss.double()
        single = {name: w[0] for name, w in weights.items()}
        block = block_at(f, single, self.examples)
        return block.tensors, block.loss

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

            with low_rank.Calls(layers, rule) as calls:
                return f.at({**w, **calls.stand_ins}, inputs, labels)[0]

        return vmap(one)(weights, thin, *grouped(self.examples, self.count)).double()
