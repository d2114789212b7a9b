"""The Gauss-Newton matrix and the Fisher information: curvature of the outputs, pulled back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from sharpkit.contract.examples import Data, Examples
from sharpkit.contract.losses import Loss
from sharpkit.contract.parameters import Parameters
from sharpkit.curvature.operator import CurvatureOperator, Linearised, owning_edge
from sharpkit.errors import ArgumentError


class _PulledBack(CurvatureOperator):
    """Jᵀ M J for the Jacobian J of a chunk's outputs and a matrix M on the outputs."""

    @abstractmethod
    def _output_matrix(self, outputs: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
        """The map u -> M u for outputs of shape (n, ...), which are a leaf requiring gradients."""

    def _reverse(self, chunk: Examples) -> Linearised:
        leaves = self._leaves
        with torch.enable_grad():
            outputs = self._problem.outputs(leaves, chunk.inputs)
            loss, gradient = self._loss_and_gradient(outputs, chunk.labels)
            if not outputs.requires_grad:
                return Linearised(loss, gradient, lambda vector: [None] * len(leaves))
            # Jᵀu is linear in u, so its gradient along v is J v: the double-backward trick
            dummy = torch.zeros_like(outputs, requires_grad=True)
            pulled = torch.autograd.grad(
                outputs, leaves, dummy, create_graph=True, allow_unused=True
            )
        where = [i for i, p in enumerate(pulled) if p is not None and p.requires_grad]
        edges = [owning_edge(p) for p in pulled if p is not None and p.requires_grad]
        top = owning_edge(outputs)
        matrix = self._output_matrix(outputs.detach().requires_grad_(), chunk.labels)

        def product(vector: Sequence[Tensor]) -> Sequence[Tensor | None]:
            (pushed,) = torch.autograd.grad(
                edges, [dummy], [vector[i] for i in where], retain_graph=True
            )
            return torch.autograd.grad(
                [top], leaves, [matrix(pushed)], retain_graph=True, allow_unused=True
            )

        return Linearised(loss, gradient, product)

    def _forward(self, chunk: Examples) -> Linearised:
        leaves = self._leaves
        with torch.enable_grad():
            outputs = self._problem.outputs(leaves, chunk.inputs)
            loss, gradient = self._loss_and_gradient(outputs, chunk.labels)
        point = tuple(w.detach() for w in leaves)
        matrix = self._output_matrix(outputs.detach().requires_grad_(), chunk.labels)

        def outputs_at(weights: tuple[Tensor, ...]) -> Tensor:
            return self._problem.outputs(weights, chunk.inputs)

        def product(vector: Sequence[Tensor]) -> Sequence[Tensor | None]:
            pushed: Tensor = torch.func.jvp(outputs_at, (point,), (tuple(vector),))[1]
            with torch.enable_grad():
                again = self._problem.outputs(leaves, chunk.inputs)
            return torch.autograd.grad(again, leaves, matrix(pushed.detach()), allow_unused=True)

        return Linearised(loss, gradient, product)

    def _loss_and_gradient(
        self, outputs: Tensor, labels: Tensor
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        loss = self._problem.loss_fn(outputs, labels).reshape(())
        if not loss.requires_grad:
            return loss.detach(), [None] * len(self._leaves)
        gradient = torch.autograd.grad(loss, self._leaves, retain_graph=True, allow_unused=True)
        return loss.detach(), gradient


class GaussNewtonOperator(_PulledBack):
    """The generalised Gauss-Newton matrix of the mean loss, as an operator on vectors.

    With J_n the Jacobian of the outputs f(x_n; w) and the Hessian of the loss in the outputs,

        G = 1/N Σ_n J_nᵀ [∇²_f ℓ(f(x_n; w), y_n)] J_n.

    It is the Hessian of the model linearised at w: positive semidefinite where the loss is convex
    in the outputs, and equal to the Hessian where f is linear in w. Arguments, errors and cost are
    those of `HessianOperator`.

    Source:
        Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent",
        Neural Computation 2002.

    Example:
        For logistic regression G = H; here each of two classes has probability 1/2, so the block
        is p(1 − p) x xᵀ = x xᵀ / 4:

        >>> import torch
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> GaussNewtonOperator(model, (torch.tensor([[2.0]]), torch.tensor([0]))).to_dense()
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """

    def _output_matrix(self, outputs: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
        with torch.enable_grad():
            loss = self._problem.loss_fn(outputs, labels).reshape(())
            slope: Tensor | None = None
            if loss.requires_grad:
                (slope,) = torch.autograd.grad(loss, outputs, create_graph=True)
        if slope is None or not slope.requires_grad:  # linear in the outputs
            return torch.zeros_like
        edge = owning_edge(slope)

        def multiply(u: Tensor) -> Tensor:
            return torch.autograd.grad(
                [edge], [outputs], [u], retain_graph=True, materialize_grads=True
            )[0]

        return multiply


class FisherOperator(_PulledBack):
    """The Fisher information of the model's predictive distribution, as an operator on vectors.

    With g_n(y) = ∇_w ℓ(f(x_n; w), y) for a loss that is a negative log-likelihood,

        kind="true":       F = 1/N Σ_n E_{y ~ p(· | x_n, w)} g_n(y) g_n(y)ᵀ,
        kind="empirical":  F = 1/N Σ_n g_n(y_n) g_n(y_n)ᵀ.

    The expectation is exact, not sampled: for "cross_entropy" over the classes, and for "mse" over
    a Gaussian of unit variance; both then equal the Gauss-Newton matrix. The empirical matrix is
    defined for every loss that is a mean over examples: it is the (uncentred) covariance of the
    gradient noise.

    Args:
        model: As for `HessianOperator`; so are all arguments that are not named here.
        data: As for `HessianOperator`.
        kind: "true" or "empirical".
        loss: "cross_entropy" or "mse"; for "empirical" also a callable.
        parameters: As for `HessianOperator`.
        n: As for `HessianOperator`.
        seed: As for `HessianOperator`.
        chunk: As for `HessianOperator`.
        memory_budget: As for `HessianOperator`.
        progress: As for `HessianOperator`.

    Raises:
        ArgumentError: For kind="true" with a loss whose likelihood is unknown; and as
            `HessianOperator`.

    Source:
        Kunstner et al., "Limitations of the empirical Fisher approximation", NeurIPS 2019.

    Example:
        Half squared error of one example with prediction 0 and label 3: g = −3x, F = 9 x xᵀ.

        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> data = torch.tensor([[2.0]]), torch.tensor([[3.0]])
        >>> FisherOperator(model, data, kind="empirical", loss="mse").to_dense()
        tensor([[36.]])
        >>> FisherOperator(model, data, kind="true", loss="mse").to_dense()
        tensor([[4.]])
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        *,
        kind: Literal["true", "empirical"] = "true",
        loss: Loss = "cross_entropy",
        parameters: Parameters = None,
        n: int | None = None,
        seed: int | None = None,
        chunk: int | Literal["auto"] = "auto",
        memory_budget: int | None = None,
        progress: bool = True,
    ) -> None:
        if kind not in ("true", "empirical"):
            raise ArgumentError(f'kind must be "true" or "empirical", got {kind!r}')
        if kind == "true" and loss not in ("cross_entropy", "mse"):
            raise ArgumentError(
                'kind="true" needs the likelihood of the loss: expected "cross_entropy" or "mse", '
                f'got {loss!r}; kind="empirical" takes any loss'
            )
        self.kind = kind
        super().__init__(
            model,
            data,
            loss=loss,
            parameters=parameters,
            n=n,
            seed=seed,
            chunk=chunk,
            memory_budget=memory_budget,
            progress=progress,
        )

    def _output_matrix(self, outputs: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
        n = outputs.shape[0]
        if self.kind == "empirical":
            with torch.enable_grad():
                loss = self._problem.loss_fn(outputs, labels).reshape(())
            # the mean over n examples divides each example's own gradient by n
            slope = n * torch.autograd.grad(loss, outputs)[0].flatten(1)
            return lambda u: _rank_one(slope, u) / n
        if self._problem.loss == "mse":
            return lambda u: u / n
        p = outputs.detach().softmax(-1)
        return lambda u: p * (u - (p * u).sum(-1, keepdim=True)) / n


def _rank_one(slope: Tensor, u: Tensor) -> Tensor:
    """Each row c of `slope`, shape (n, outputs), times its inner product with the row of u."""
    inner = (slope * u.flatten(1)).sum(1, keepdim=True)
    return (slope * inner).reshape(u.shape)
