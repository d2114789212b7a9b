"""Curvature of the outputs, pulled back to the weights: Jᵀ M J for their Jacobian J."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sharpkit.contract.examples import Examples
from sharpkit.curvature.chunks import Linearised
from sharpkit.curvature.differences import STEPS, extrapolated, moved
from sharpkit.curvature.operator import CurvatureOperator, owning_edge
from sharpkit.curvature.problem import Problem
from sharpkit.curvature.second_derivatives import Moved, Tensors
from sharpkit.curvature.softmax import OutputMatrix
from sharpkit.errors import ModelError

_Rebuild = Callable[[Tensor], Any]  # the outputs as the model gave them, of one tensor


class PulledBackOperator(CurvatureOperator):
    """Jᵀ M J for the Jacobian J of a chunk's outputs and a matrix M on the outputs."""

    @abstractmethod
    def _output_matrix(
        self, outputs: Tensor, labels: Tensor, loss: Callable[[Tensor], Tensor]
    ) -> OutputMatrix:
        """The map u -> M u for outputs of shape (n, ...), which are a leaf requiring gradients.

        `loss` is the mean loss of a chunk as a function of such outputs.
        """

    def _check(self, problem: Problem) -> None:
        if problem.function.habits.loss_sees_weights:
            raise ModelError(
                f"the loss depends on the weights also at fixed outputs (a regulariser?), but "
                f"{type(self).__name__} is curvature of the outputs only: leave that term out, or "
                "take HessianOperator"
            )

    def _reverse(self, chunk: Examples) -> Linearised:
        problem, leaves = self._problem, self._problem.leaves
        with torch.enable_grad():
            outputs, rebuild = self._outputs(chunk)
            mean, weight, gradient = self._loss_and_gradient(rebuild(outputs), chunk.labels)
            if not outputs.requires_grad:
                return Linearised(mean, weight, gradient, lambda vector: [None] * len(leaves))
            # Jᵀu is linear in u, so its gradient along v is J v: the double-backward trick
            dummy = outputs.new_zeros(()).expand(outputs.shape).detach().requires_grad_()
            pulled = problem.real(
                torch.autograd.grad(outputs, leaves, dummy, create_graph=True, allow_unused=True)
            )
        where = [i for i, p in enumerate(pulled) if p is not None and p.requires_grad]
        edges = [owning_edge(p) for p in pulled if p is not None and p.requires_grad]
        top = owning_edge(outputs)
        matrix, kept = self._matrix(outputs, rebuild, chunk)

        def product(vector: Sequence[Tensor]) -> Sequence[Tensor | None]:
            (pushed,) = torch.autograd.grad(
                edges, [dummy], [vector[i] for i in where], retain_graph=True
            )
            found = torch.autograd.grad(
                [top], leaves, [matrix(pushed)], retain_graph=True, allow_unused=True
            )
            return problem.real(found)

        return Linearised(mean, weight, gradient, product, kept)

    def _forward(self, chunk: Examples) -> Linearised:
        problem, leaves = self._problem, self._problem.leaves
        with torch.enable_grad():
            outputs, rebuild = self._outputs(chunk)
            mean, weight, gradient = self._loss_and_gradient(rebuild(outputs), chunk.labels)
        point = tuple(w.detach() for w in leaves)
        matrix = self._matrix(outputs, rebuild, chunk)[0]

        def outputs_at(weights: tuple[Tensor, ...]) -> Tensor:
            return problem.run(lambda: self._outputs(chunk)[0], weights)

        def product(vector: Sequence[Tensor]) -> Sequence[Tensor | None]:
            pushed: Tensor = torch.func.jvp(outputs_at, (point,), (tuple(vector),))[1]
            return self._pull(leaves, chunk, matrix(pushed.detach()))

        return Linearised(mean, weight, gradient, product)

    def _by_differences(self, at: Moved, chunk: Examples, step: float) -> Sequence[Tensor]:
        def outputs(_: Sequence[Tensor]) -> Tensor:
            with self._problem.function.evaluating():
                return self._outputs(chunk)[0].detach()

        pushed = (at(step, outputs) - at(-step, outputs)) / (2 * step)

        def pulled(leaves: Sequence[Tensor]) -> list[Tensor]:
            out, rebuild = self._outputs(chunk)
            u = self._matrix(out, rebuild, chunk)[0](pushed)
            return [t.detach() for t in self._problem.filled(self._pull(leaves, chunk, u))]

        result: list[Tensor] = at(0.0, pulled)
        return result

    def _difference(self, vector: Tensors, step: float) -> Sequence[Tensors]:
        sums = [[torch.zeros_like(w) for w in self._problem.weights.values()] for _ in range(3)]
        for chunk in self._recording.chunks:
            pulled = self._chunk_difference(vector, step, self._recording.examples(chunk))
            for total, part in zip(sums, pulled, strict=True):
                torch._foreach_add_(total, part, alpha=self._share(chunk.weight))
        return sums

    def _chunk_difference(
        self, vector: Tensors, step: float, chunk: Examples
    ) -> list[list[Tensor]]:
        """Jᵀ M u for u = J v and for both terms of its error, by differences of the outputs."""
        problem = self._problem
        weights = list(problem.weights.values())

        def outputs(_: Tensors) -> list[Tensor]:
            with problem.function.evaluating():
                return [self._outputs(chunk)[0].detach()]

        values = [problem.at(moved(weights, vector, place * step), outputs) for place in STEPS]
        with torch.enable_grad():
            out, rebuild = self._outputs(chunk)
        if not out.requires_grad:
            return [problem.filled([None] * len(weights))] * 3
        matrix = self._matrix(out, rebuild, chunk)[0]
        pulled = []
        for (u,) in extrapolated(values, [out.detach()], step):
            found = torch.autograd.grad(
                out, problem.leaves, matrix(u), retain_graph=True, allow_unused=True
            )
            pulled.append([t.detach() for t in problem.filled(problem.real(found))])
        return pulled

    def _pull(
        self, leaves: Sequence[Tensor], chunk: Examples, u: Tensor
    ) -> Sequence[Tensor | None]:
        """Jᵀ u at leaves that the model holds."""
        with torch.enable_grad():
            outputs = self._outputs(chunk)[0]
        if not outputs.requires_grad:
            return [None] * len(leaves)
        return self._problem.real(torch.autograd.grad(outputs, leaves, u, allow_unused=True))

    def _outputs(self, chunk: Examples) -> tuple[Tensor, _Rebuild]:
        return _as_one(self._problem.function.outputs(chunk.inputs))

    def _matrix(self, outputs: Tensor, rebuild: _Rebuild, chunk: Examples) -> OutputMatrix:
        def loss(outputs: Tensor) -> Tensor:
            return self._problem.loss(rebuild(outputs), chunk.labels)

        return self._output_matrix(outputs.detach().requires_grad_(), chunk.labels, loss)

    def _loss_and_gradient(
        self, outputs: Any, labels: Tensor
    ) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
        mean, weight = self._problem.loss.terms(outputs, labels)
        leaves = self._problem.leaves
        if not mean.requires_grad:
            return mean.detach(), weight, [None] * len(leaves)
        found = torch.autograd.grad(mean, leaves, retain_graph=True, allow_unused=True)
        return mean.detach(), weight, self._problem.real(found)


def _as_one(outputs: Any) -> tuple[Tensor, _Rebuild]:
    """All outputs with derivatives in one tensor of shape (n, ...), and the way back."""
    if isinstance(outputs, Tensor) and outputs.is_floating_point():
        return outputs, lambda flat: flat
    given, structure = pytree.tree_flatten(outputs)
    places = [
        i
        for i, t in enumerate(given)
        if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())
    ]
    real = [torch.view_as_real(t) if t.is_complex() else t for t in (given[i] for i in places)]

    def rebuild(flat: Tensor) -> Any:
        parts = list(given)
        pieces = torch.split(flat, [t[:1].numel() for t in real], 1)
        for i, t, piece in zip(places, real, pieces, strict=True):
            part = piece.reshape(t.shape).to(t.dtype)
            parts[i] = torch.view_as_complex(part) if given[i].is_complex() else part
        return pytree.tree_unflatten(parts, structure)

    return torch.cat([t.flatten(1) for t in real], 1), rebuild
