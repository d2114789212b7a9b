"""One group after the other, by weights that move in place: what a careful loop by hand does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from sharpkit.contract.examples import Examples
from sharpkit.groupwise import geometry
from sharpkit.groupwise.geometry import Tensors
from sharpkit.groupwise.objective import Objective, examples_in_layout, in_layout, leaf_gradient

_LEAST = 1e-30  # a length of 0 must not divide; what is near it is doubtful


class Moved(NamedTuple):
    """What one group gives: float64 scalars that the host has not looked at."""

    loss: Tensor
    weight: Tensor  # by which groups are averaged
    length: Tensor  # of the scaled gradient
    exponent: Tensor  # +inf where the gradient is exactly 0
    after: list[Tensor]  # losses at the perturbed weights, one for each rho


class InPlace:
    """One-step perturbations in the 2-norm of one group after the other.

    The module holds one copy of the weights, in the layout that is fastest, for all groups. No
    weight is complex. `scale` is T of the adaptive geometry, None for ones; `scaled` takes
    gradients times a power of two, for small ones.
    """

    def __init__(
        self, objective: Objective, scale: Tensors | None = None, *, scaled: bool = True
    ) -> None:
        self.objective, self._scaled = objective, scaled
        self._home = list(in_layout(objective.weights, objective.layout).values())
        self._at = [torch.clone(w) for w in self._home]
        self._scale = None
        if scale is not None:
            self._scale = list(in_layout(scale, objective.layout).values())
        self._leaves: Sequence[Tensor] = ()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the module holds the copy."""
        at = dict(zip(self.objective.weights, self._at, strict=True))
        with self.objective.model.assigned(at) as self._leaves:
            yield

    def group(self, examples: Examples, rhos: Sequence[float]) -> Moved:
        """One group; its examples are on the model's device."""
        f = self.objective
        examples = examples_in_layout(examples, f.layout)
        found = leaf_gradient(f.model, f.loss, self._leaves, examples, f.batch, scaled=self._scaled)
        used = [i for i, g in enumerate(found.gradient) if g is not None]
        gradient = [g for g in found.gradient if g is not None]
        if not gradient:
            nothing = torch.zeros_like(found.mean)
            return Moved(
                found.mean, found.weight, nothing, found.exponent, [found.mean] * len(rhos)
            )
        at, home = [self._at[i] for i in used], [self._home[i] for i in used]
        scale = None if self._scale is None else [self._scale[i] for i in used]
        if scale is not None:
            gradient = list(torch._foreach_mul(gradient, scale))
        length = geometry.length_of_one(gradient)
        after = []
        for rho in rhos:
            amount = rho / length.clamp(min=_LEAST)
            torch._foreach_add_(at, geometry.step_of_one(gradient, amount, scale))
            after.append(f.at_leaves(examples)[0])
            torch._foreach_copy_(at, home)
        return Moved(found.mean, found.weight, length, found.exponent, after)
