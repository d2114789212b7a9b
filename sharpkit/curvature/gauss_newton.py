"""The generalised Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sharpkit.curvature.operator import owning_edge
from sharpkit.curvature.pulled_back import PulledBackOperator
from sharpkit.curvature.softmax import OutputMatrix, SoftmaxCurvature, softmax_loss


class GaussNewtonOperator(PulledBackOperator):
    """The generalised Gauss-Newton matrix of the mean loss, as an operator on vectors.

    With J_n the Jacobian of the outputs f(x_n; w) and the Hessian of the loss in the outputs,

        G = 1/N Σ_n J_nᵀ [∇²_f ℓ(f(x_n; w), y_n)] J_n,

    in which N stands for the sum of weights if the loss has weights of its own.

    It is the Hessian of the model linearised at w: positive semidefinite where the loss is convex
    in the outputs, and equal to the Hessian where f is linear in w. Arguments, errors and cost are
    those of `HessianOperator`. By finite differences J v is that of the outputs at w ± h v and
    w ± 2h v, four forward passes, and Jᵀ (M u) an ordinary backward pass; a ReLU that switches
    between them is a kink of the outputs, of little effect.

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

    def _output_matrix(
        self, outputs: Tensor, labels: Tensor, loss: Callable[[Tensor], Tensor]
    ) -> OutputMatrix:
        softmax = softmax_loss(self._problem.loss)
        both = softmax is not None and softmax.weight is not None and softmax.smoothing
        if softmax is not None and not both and not labels.is_floating_point():
            matrix = SoftmaxCurvature(softmax, outputs, labels)
            return matrix, (matrix.p,)
        with torch.enable_grad():
            mean = loss(outputs)
            slope: Tensor | None = None
            if mean.requires_grad:
                (slope,) = torch.autograd.grad(mean, outputs, create_graph=True)
        if slope is None or not slope.requires_grad:  # linear in the outputs
            return torch.zeros_like, ()
        edge = owning_edge(slope)

        def multiply(u: Tensor) -> Tensor:
            return torch.autograd.grad(
                [edge], [outputs], [u], retain_graph=True, materialize_grads=True
            )[0]

        return multiply, ()
