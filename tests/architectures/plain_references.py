"""What sharpkit must find, by plain loops in float64: weights assigned in place, plain autograd.

Nothing here uses sharpkit. All vectors run over the measured parameters in the model's order, a
complex entry as two real ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

Sums = Callable[[Any, Tensor], tuple[Tensor, float]]


class Reference:
    """A plain copy of a model, its examples and the sums of its loss.

    Args:
        model: Its copy runs without caches, checkpoints, sparse gradients and fused kernels.
        inputs: Tensor, tuple or dict of tensors with n examples.
        labels: Tensor (n, ...).
        sums: (outputs, labels) -> (Σ of the losses, Σ of their weights).
    """

    def __init__(self, model: nn.Module, inputs: Any, labels: Tensor, sums: Sums) -> None:
        self.model = plain_copy(model)
        self.inputs, self.labels, self.sums = inputs, labels, sums
        self.n = len(labels)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.parameters = trainable or list(self.model.parameters())
        for p in self.parameters:
            p.requires_grad_()
        with torch.no_grad():
            self.outputs(0, self.n)  # embeddings with max_norm renormalise the rows that are used
        self.start = [p.detach().clone() for p in self.parameters]

    def outputs(self, start: int, stop: int) -> Any:
        """The model's outputs for examples start to stop."""
        inputs = pytree.tree_map(lambda t: t[start:stop], self.inputs)
        with plain_kernels():
            if isinstance(inputs, dict):
                return self.model(**inputs)
            return self.model(*inputs) if isinstance(inputs, tuple) else self.model(inputs)

    def loss(self, start: int, stop: int) -> tuple[Tensor, float]:
        """The loss of a group and its weight; (0, 0) if the group counts nothing."""
        total, weight = self.sums(self.outputs(start, stop), self.labels[start:stop])
        return (total / weight if weight else total * 0), weight

    def gradient(self, start: int, stop: int, at: Tensor | None = None) -> Tensor:
        """The gradient of a group's loss at w, or at w + `at`."""
        with self.moved(at), plain_kernels():
            return self._flat(self._derivatives(self.loss(start, stop)[0]))

    @contextmanager
    def moved(self, by: Tensor | None) -> Iterator[None]:
        """The weights moved in place, and put back."""
        try:
            self._assign(by)
            yield
        finally:
            self._assign(None)

    def m_sharpness(self, m: int, rho: float) -> float:
        """Σ W_S [L_S(w + ρ g / ‖g‖) − L_S(w)] / Σ W_S over groups S of m consecutive examples."""
        total = weights = 0.0
        for start, stop in groups(self.n, m):
            step = ascent(self.gradient(start, stop), rho)
            with torch.no_grad():
                before, weight = self.loss(start, stop)
                with self.moved(step):
                    after, _ = self.loss(start, stop)
            total += weight * float(after - before)
            weights += weight
        return total / weights

    def m_sam_gradient(self, m: int, rho: float) -> Tensor:
        """Σ W_S ∇L_S(w + ρ g / ‖g‖) / Σ W_S over groups S of m consecutive examples."""
        total, weights = 0.0, 0.0
        for start, stop in groups(self.n, m):
            step = ascent(self.gradient(start, stop), rho)
            weight = self.loss(start, stop)[1]
            total = total + weight * self.gradient(start, stop, step)
            weights += weight
        return total / weights

    def hessian_product(self, v: Tensor) -> Tensor:
        """∇ (∇L · v), by backward through the gradient."""
        with self.moved(None), plain_kernels():
            slopes = self._derivatives(self.loss(0, self.n)[0], create_graph=True)
            inner = sum(
                (a * b).sum() for a, b in zip(map(real, slopes), self._split(v), strict=True)
            )
            return self._flat(self._derivatives(inner))

    def hessian_differences(self, v: Tensor) -> Tensor:
        """The same by central differences of the gradient; constants stay where they are."""
        v = v * self.variable()
        with without_max_norm(self.model):
            return differences(lambda t: self.gradient(0, self.n, t * v))

    def gauss_newton_product(self, v: Tensor) -> Tensor:
        """Jᵀ ∇²ℓ J v, J v by central differences of the outputs."""
        pushed = self._pushed(v)
        with self.moved(None), plain_kernels():
            leaves, spec = pytree.tree_flatten(self.outputs(0, self.n))
            points = [t.detach().requires_grad_() for t in leaves]
            total, weight = self.sums(pytree.tree_unflatten(points, spec), self.labels)
            slopes = gradients(total / weight, points, create_graph=True)
            inner = sum((a * b).sum() for a, b in zip(slopes, pushed, strict=True))
            curved = gradients(inner, points)
            pulled = sum((a * b).sum() for a, b in zip(leaves, curved, strict=True))
            return self._flat(self._derivatives(pulled))

    def fisher_product(self, v: Tensor) -> Tensor:
        """1/N Σ g_n (g_n · v), the g_n of single examples scaled so that their mean is ∇L."""
        weight = self.loss(0, self.n)[1]
        total = torch.zeros_like(v)
        for i in range(self.n):
            share = self.loss(i, i + 1)[1]
            g = self.gradient(i, i + 1) * share * self.n / weight
            total += g * (g @ v) / self.n
        return total

    def variable(self) -> Tensor:
        """1 where the loss depends on a coordinate, 0 for rows of padding: torch's convention."""
        free = {id(p): torch.ones_like(real(p)) for p in self.parameters}
        for module in self.model.modules():
            padding = getattr(module, "padding_idx", None)
            if padding is not None and id(module.weight) in free:
                free[id(module.weight)][padding] = 0.0
        return torch.cat([free[id(p)].flatten() for p in self.parameters])

    def _pushed(self, v: Tensor) -> list[Tensor]:
        v = v * self.variable()
        shapes = [t.shape for t in pytree.tree_leaves(self.outputs(0, self.n))]

        def outputs(t: float) -> Tensor:
            with torch.no_grad(), self.moved(t * v):
                leaves = pytree.tree_leaves(self.outputs(0, self.n))
                return torch.cat([leaf.flatten() for leaf in leaves])

        with without_max_norm(self.model):
            parts = differences(outputs).split([s.numel() for s in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _assign(self, by: Tensor | None) -> None:
        steps = [None] * len(self.start) if by is None else self._split(by)
        with torch.no_grad():
            for p, start, step in zip(self.parameters, self.start, steps, strict=True):
                p.copy_(start)
                if step is not None:
                    real(p).add_(step)

    def _derivatives(self, value: Any, create_graph: bool = False) -> list[Tensor]:
        return gradients(value, self.parameters, create_graph)

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([real(t).detach().flatten() for t in tensors])

    def _split(self, v: Tensor) -> list[Tensor]:
        parts = v.split([real(p).numel() for p in self.parameters])
        return [part.view(real(p).shape) for part, p in zip(parts, self.parameters, strict=True)]


def gradients(value: Any, of: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """Plain derivatives, 0 where the value does not depend on a tensor."""
    if not (isinstance(value, Tensor) and value.requires_grad):
        return [torch.zeros_like(p) for p in of]
    found = torch.autograd.grad(value, of, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, of, strict=True)]


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of reals, along a trailing axis of 2."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def groups(n: int, m: int) -> list[tuple[int, int]]:
    """Where groups of m consecutive examples start and stop; the last may be smaller."""
    return list(pairwise([*range(0, n, m), n]))


def ascent(gradient: Tensor, rho: float) -> Tensor:
    """ρ g / ‖g‖, or 0."""
    length = gradient.norm()
    return rho * gradient / length if length > 0 else torch.zeros_like(gradient)


def differences(function: Callable[[float], Tensor]) -> Tensor:
    """The derivative at 0 by Richardson's central differences, steps halved until two agree."""

    def central(h: float) -> Tensor:
        return (function(h) - function(-h)) / (2 * h)

    h, before, best = 1e-3, None, (1e-6, None)
    for _ in range(14):
        found = (4 * central(h / 2) - central(h)) / 3
        if before is not None:
            error = float((found - before).norm()) / max(float(found.norm()), 1e-12)
            best = min(best, (error, found), key=lambda pair: pair[0])
            if error <= 1e-8:
                break
        before, h = found, h / 2
    assert best[1] is not None, "the differences do not settle: a kink at the weights?"
    return best[1]


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy that computes the same without caches, checkpoints or sparse gradients."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "plain"):
            module.plain = True
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False
    return other


@contextmanager
def without_max_norm(model: nn.Module) -> Iterator[None]:
    """Rows that have been renormalised move freely: the renormalisation has no derivative."""
    kinds = nn.Embedding | nn.EmbeddingBag
    layers = [(m, m.max_norm) for m in model.modules() if isinstance(m, kinds)]
    for layer, _ in layers:
        layer.max_norm = None
    try:
        yield
    finally:
        for layer, max_norm in layers:
            layer.max_norm = max_norm


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Attention by plain matrix products."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def has_double_backward(model: nn.Module) -> bool:
    """Whether torch's second derivatives by backward exist and are right."""
    for module in model.modules():
        if isinstance(module, nn.EmbeddingBag):
            return False
        if is_parametrized(module, "weight") and "_WeightNorm" in {
            type(p).__name__ for p in module.parametrizations["weight"]
        }:
            return False
    return True
