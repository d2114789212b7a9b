"""The Fisher information, true and empirical."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from sharpkit.contract.distributed_data import DistributedData
from sharpkit.contract.loading import Data
from sharpkit.contract.losses import Loss
from sharpkit.contract.parameters import Parameters
from sharpkit.curvature.problem import Problem
from sharpkit.curvature.pulled_back import PulledBackOperator
from sharpkit.curvature.second_derivatives import Method
from sharpkit.curvature.softmax import OutputMatrix, SoftmaxCurvature, softmax_loss
from sharpkit.errors import ArgumentError


class FisherOperator(PulledBackOperator):
    """The Fisher information of the model's predictive distribution, as an operator on vectors.

    With g_n(y) = N/W ∇_w [the sum that the loss adds up for example n], for a loss that is a
    negative log-likelihood and W the sum of its weights (N for a plain mean),

        kind="true":       F = 1/N Σ_n J_nᵀ [N/W Σ_t diag(p_nt) − p_nt p_ntᵀ] J_n,
        kind="empirical":  F = 1/N Σ_n g_n(y_n) g_n(y_n)ᵀ.

    The true matrix is the exact expectation, not sampled: for "cross_entropy" over the classes at
    every labelled position t, and for "mse" over a Gaussian of unit variance, where diag(p) − p pᵀ
    is the identity; both then equal the Gauss-Newton matrix. The empirical matrix is defined for
    every loss: the mean of g_n is the gradient of the loss, and F the (uncentred) covariance of the
    gradient noise.

    Args:
        model: As for `HessianOperator`; so are all arguments that are not named here.
        kind: "true" or "empirical".
        loss: "cross_entropy", "mse", or CrossEntropyLoss() without class weights or smoothing; for
            "empirical" any.

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
        data: Data | DistributedData,
        *,
        kind: Literal["true", "empirical"] = "true",
        loss: Loss = "cross_entropy",
        parameters: Parameters = None,
        n: int | None = None,
        seed: int | None = None,
        chunk: int | Literal["auto"] = "auto",
        memory_budget: int | None = None,
        compile: bool = False,
        method: Method = "auto",
        tolerance: float | None = None,
        progress: bool = True,
    ) -> None:
        if kind not in ("true", "empirical"):
            raise ArgumentError(f'kind must be "true" or "empirical", got {kind!r}')
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
            compile=compile,
            method=method,
            tolerance=tolerance,
            progress=progress,
        )

    def _check(self, problem: Problem) -> None:
        super()._check(problem)
        if self.kind == "empirical" or problem.loss.given == "mse":
            return
        labels = problem.probe.examples.labels
        softmax = softmax_loss(problem.loss)
        if softmax is None or not softmax.plain or labels.is_floating_point():
            raise ArgumentError(
                'kind="true" needs the likelihood of the loss: expected "cross_entropy", "mse", or '
                "CrossEntropyLoss() with integer labels and without class weights or smoothing, "
                f'got {problem.loss.given!r}; kind="empirical" takes any loss'
            )

    def _share(self, weight: float) -> float:
        # the slopes of a chunk's mean are those of its sums over its weight
        return (
            self.n * (weight / self._total) ** 2
            if self.kind == "empirical"
            else super()._share(weight)
        )

    def _output_matrix(
        self, outputs: Tensor, labels: Tensor, loss: Callable[[Tensor], Tensor]
    ) -> OutputMatrix:
        if self.kind == "empirical":
            with torch.enable_grad():
                slope = torch.autograd.grad(loss(outputs), outputs)[0].flatten(1)
            return lambda u: _rank_one(slope, u), (slope,)
        softmax = softmax_loss(self._problem.loss)
        if softmax is None:  # half the squared error
            return lambda u: u / outputs.shape[0], ()
        matrix = SoftmaxCurvature(softmax, outputs, labels)
        return matrix, (matrix.p,)


def _rank_one(slope: Tensor, u: Tensor) -> Tensor:
    """Each row c of `slope`, shape (n, outputs), times its inner product with the row of u."""
    inner = (slope * u.flatten(1)).sum(1, keepdim=True)
    return (slope * inner).reshape(u.shape)
