"""Losses and gradients of groups at weights of their own, each a call of the model under vmap."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor
from torch.func import vmap

from sharpkit.contract.examples import Examples, Inputs
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.holding import unfused_attention
from sharpkit.contract.losses import MeanLoss
from sharpkit.groupwise.batch_passes import BatchGradients
from sharpkit.groupwise.geometry import Tensors
from sharpkit.groupwise.group_gradient import GroupGradient, GroupTerms, group_gradient
from sharpkit.groupwise.objective import grouped
from sharpkit.groupwise.packing import Packing


@dataclass
class VmapPasses:
    """What `BatchPasses` does at given weights, for models that cannot run as one batch."""

    model: FunctionalModel
    loss: MeanLoss
    weights: Tensors  # the parameters that differ from group to group, (*shape)

    def __post_init__(self) -> None:
        self.packing, self.held = Packing(self.weights), nullcontext

    def gradients(
        self, examples: Examples, groups: int, *, at: Tensors, fixed: Tensors
    ) -> BatchGradients:
        """The loss of every group and its gradient; `at` and `fixed` as in `BatchPasses`."""

        def one(dense: Tensors, fixed: Tensors, inputs: Inputs, labels: Tensor) -> GroupGradient:
            return group_gradient(self.model, self.loss, dense, {}, {}, inputs, labels, fixed=fixed)

        with unfused_attention():
            found = vmap(one)(self.packing.parts(at), fixed, *grouped(examples, groups))
        terms = GroupTerms(found.mean, found.weight, found.exponent, [])
        return BatchGradients(terms, self.packing.joined(found.dense), {})

    def losses(
        self, examples: Examples, groups: int, at: Tensors, *, fixed: Tensors
    ) -> tuple[Tensor, Tensor]:
        """Mean losses and their weights, (groups,) float64."""

        def one(values: Tensors, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
            def terms() -> tuple[Tensor, Tensor]:
                return self.loss.terms(self.model.outputs(inputs), labels)

            return self.model.within(values, terms)

        with unfused_attention(), self.model.evaluating():
            values = {**self.packing.parts(at), **fixed}
            mean, weight = vmap(one)(values, *grouped(examples, groups))
        return mean.double(), weight.double()
