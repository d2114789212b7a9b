"""Curvature as measures of a zoo's models: callables (model, data, *, seed) -> value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data
from sharpkit.curvature.eigenvalues import top_eigenvalues
from sharpkit.curvature.gauss_newton import GaussNewtonOperator
from sharpkit.curvature.hessian import HessianOperator
from sharpkit.curvature.lanczos import Tridiagonal, lanczos
from sharpkit.curvature.linear_map import as_linear_map, random_rows
from sharpkit.curvature.operator import CurvatureOperator
from sharpkit.curvature.quadrature import probes_at_once
from sharpkit.curvature.trace import trace
from sharpkit.errors import ArgumentError, ModelError
from sharpkit.measures.measure import Estimate

T = TypeVar("T")


@dataclass(frozen=True)
class MaxEigenvalue:
    """λmax, the largest eigenvalue of the Hessian of the mean training loss.

    Args:
        tol: Residual norm to reach, relative to the largest |λ|; None for the dtype's default.

    Source:
        Keskar et al., ICLR 2017; see `sharpkit.top_eigenvalues`.

    Example:
        >>> import torch
        >>> model = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> round(MaxEigenvalue()(model, (torch.tensor([[2.0]]), torch.tensor([0])), seed=0), 4)
        2.0
    """

    tol: float | None = None
    name: str = field(default="max_eigenvalue", init=False)

    def __call__(self, model: nn.Module, data: Data, *, seed: int) -> float:
        """λmax of one model; `seed` is that of the start vector."""
        return float(_top(model, data, 1, self.tol, seed)[0])


@dataclass(frozen=True)
class EigenvalueRatio:
    """λmax / λ5, how far the largest eigenvalue of the Hessian stands out.

    Args:
        rank: The eigenvalue to compare with, 2 or more.
        tol: Residual norm to reach, relative to the largest |λ|; None for the dtype's default.

    Source:
        Jastrzębski et al., ICLR 2020; Foret et al., ICLR 2021, Figure 3, left.

    Example:
        >>> EigenvalueRatio().name
        'eigenvalue_ratio'
    """

    rank: int = 5
    tol: float | None = None
    name: str = field(default="eigenvalue_ratio", init=False)

    def __call__(self, model: nn.Module, data: Data, *, seed: int) -> float:
        """λmax / λ_rank of one model; `seed` is that of the start vector.

        Raises:
            ModelError: If the eigenvalue of that rank is not positive.
        """
        values = _top(model, data, self.rank, self.tol, seed)
        if not values[-1] > 0:
            raise ModelError(
                f"eigenvalue {self.rank} of the Hessian is {values[-1]:.3g}: "
                "the ratio needs a positive one"
            )
        return float(values[0] / values[-1])


@dataclass(frozen=True)
class HessianTrace:
    """The trace of the Hessian of the mean training loss, by Hutch++.

    Args:
        products: Hessian-vector products to spend.

    Source:
        Meyer et al., SOSA 2021; see `sharpkit.trace`.

    Example:
        >>> import torch
        >>> model = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> data = torch.tensor([[2.0]]), torch.tensor([0])
        >>> HessianTrace()(model, data, seed=0)  # exact: there are only two parameters
        Estimate: 2 ± 0
    """

    products: int = 90
    name: str = field(default="hessian_trace", init=False)

    def __call__(self, model: nn.Module, data: Data, *, seed: int) -> Estimate:
        """The trace for one model; `seed` is that of the probes."""
        found = _with_operator(
            model, data, lambda h: trace(h, products=self.products, seed=seed, progress=False)
        )
        return Estimate(found.value, found.std_error)


@dataclass(frozen=True)
class HessianRank:
    """The effective rank of the Hessian: how many directions carry its eigenvalues.

        exp(−Σ p_i log p_i),   p_i = |λ_i| / Σ |λ_j|

    From the nodes and weights of stochastic Lanczos quadrature. Invariant under scaling the loss.
    Its standard error has two parts, added as squares: that over probes, and the change that a
    quarter of the Lanczos steps makes, since |λ| log |λ| is no polynomial and most eigenvalues lie
    near its kink. With k probes the first has k − 1 degrees of freedom: two standard errors cover
    82 % with three probes, not 95 %.

    Args:
        steps: Lanczos steps of each probe.
        probes: Random start vectors.

    Source:
        Roy and Vetterli, EUSIPCO 2007; see `sharpkit.spectral_density`.

    Example:
        >>> import torch
        >>> model = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> data = torch.tensor([[2.0]]), torch.tensor([0])
        >>> value, error = HessianRank(probes=20)(model, data, seed=0)
        >>> abs(value - 1) < 4 * error + 1e-6  # the eigenvalues are 2 and 0
        True
    """

    steps: int = 60
    probes: int = 3
    name: str = field(default="hessian_rank", init=False)

    def __call__(self, model: nn.Module, data: Data, *, seed: int) -> Estimate:
        """The effective rank for one model; `seed` is that of the probes.

        Raises:
            ModelError: If the Hessian is zero.
        """

        def compute(hessian: CurvatureOperator) -> Estimate:
            steps = min(self.steps, hessian.shape[0])
            parts = _lanczos_runs(hessian, steps, self.probes, seed)
            whole = _rank_and_error(parts, steps, hessian.shape[0])
            shorter = _rank_and_error(parts, max(1, 3 * steps // 4), hessian.shape[0])
            return Estimate(whole.value, math.hypot(whole.std_error, whole.value - shorter.value))

        return _with_operator(model, data, compute)


def _top(model: nn.Module, data: Data, k: int, tol: float | None, seed: int) -> np.ndarray:
    def compute(h: CurvatureOperator) -> np.ndarray:
        return top_eigenvalues(h, k, tol=tol, seed=seed, progress=False).values

    return _with_operator(model, data, compute)


def _rank_and_error(parts: list[Tridiagonal], steps: int, size: int) -> Estimate:
    """The effective rank from the first steps of each probe, and its error over probes."""
    from scipy.special import xlogy

    total = size * _sums(parts, steps, np.abs)
    entropy = size * _sums(parts, steps, lambda nodes: xlogy(np.abs(nodes), np.abs(nodes)))
    mean = float(total.mean())
    if not mean > 0:
        raise ModelError("the Hessian is zero: it has no effective rank")
    ratio = float(entropy.mean()) / mean
    rank = math.exp(math.log(mean) - ratio)
    # to first order in the errors of the two means
    change = rank * ((1 + ratio) * total - entropy) / mean
    error = change.std(ddof=1) / len(total) ** 0.5 if len(total) > 1 else math.nan
    return Estimate(rank, float(error))


@dataclass(frozen=True)
class SoftRank:
    """The soft rank of the Gauss-Newton matrix: how many directions the data hold fast.

        tr G (G + λ I)⁻¹ = Σ γ_i / (γ_i + λ)

    γ_i are the eigenvalues of the Gauss-Newton matrix of the mean training loss, which for the
    cross-entropy is the Fisher matrix, and equals the Hessian up to the errors of the predictions;
    unlike the Hessian's, none is negative, where the sum would have a pole. An eigenvalue far above
    λ counts 1, one far below nothing: between 0 and the number of parameters. By stochastic Lanczos
    quadrature; the standard error as in `HessianRank`. Cost: steps x probes products. Invariant
    under permuting units, and under scaling the loss together with λ.

    Args:
        damping: λ, in units of the loss per squared weight; the paper's is the weight decay of
            training. Compare models at one λ.
        steps: Lanczos steps of each probe.
        probes: Random start vectors.

    Source:
        Shoham, Mor-Yosef and Avron, "Flatness After All?" (2506.17809), the definition of
        rank_λ(H) = tr H (H + λ I)⁻¹.

    Example:
        >>> import torch
        >>> model = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> data = torch.tensor([[2.0]]), torch.tensor([0])
        >>> value, error = SoftRank(damping=2.0, probes=50)(model, data, seed=0)
        >>> abs(value - 0.5) < 4 * error  # the eigenvalues are 2 and 0
        True
    """

    damping: float = 1e-3
    steps: int = 40
    probes: int = 3
    name: str = field(default="soft_rank", init=False)

    def __call__(self, model: nn.Module, data: Data, *, seed: int) -> Estimate:
        """The soft rank for one model; `seed` is that of the probes.

        Raises:
            ArgumentError: If the damping is not positive.
        """
        if not self.damping > 0:
            raise ArgumentError(f"damping must be positive, got {self.damping}")

        def share(nodes: np.ndarray) -> np.ndarray:
            positive: np.ndarray = np.maximum(nodes, 0.0)  # below 0 by rounding only
            return positive / (positive + self.damping)

        def compute(matrix: CurvatureOperator) -> Estimate:
            size = matrix.shape[0]
            steps = min(self.steps, size)
            parts = _lanczos_runs(matrix, steps, self.probes, seed)
            values = size * _sums(parts, steps, share)
            error = float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else math.nan
            change = float(values.mean()) - size * float(
                _sums(parts, max(1, 3 * steps // 4), share).mean()
            )
            return Estimate(float(values.mean()), math.hypot(error, change))

        return _with_operator(model, data, compute, GaussNewtonOperator)


def _lanczos_runs(
    operator: CurvatureOperator, steps: int, probes: int, seed: int
) -> list[Tridiagonal]:
    """Lanczos runs from random start vectors, as many together as the memory has room for."""
    starts = random_rows(probes, as_linear_map(operator), seed)
    size, storage = operator.shape[0], (starts.dtype, starts.device)
    return [
        lanczos(operator, steps=steps, probes=block.T, seed=seed)
        for block in torch.split(starts, probes_at_once(size, steps, int(probes), *storage))
    ]


def _sums(
    parts: list[Tridiagonal], steps: int, function: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Quadrature of a function of the eigenvalues after the first steps of each run, (probes,)."""
    found = []
    for run in parts:
        first = Tridiagonal(
            run.diagonal[:, :steps], run.off_diagonal[:, : steps - 1], None, run.breakdowns
        )
        nodes, weights = first.quadrature()
        found.append((weights * function(nodes)).sum(1))
    return np.concatenate(found)


def _with_operator(
    model: nn.Module,
    data: Data,
    compute: Callable[[CurvatureOperator], T],
    kind: type[CurvatureOperator] = HessianOperator,
) -> T:
    """Compute from a matrix over all examples, in eval mode."""
    with frozen(model), kind(model, data, seed=0, progress=False) as matrix:
        return compute(matrix)
