"""Curvature as measures of a zoo's models: callables (model, data, *, seed) -> value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from torch import nn

from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data
from sharpkit.curvature.eigenvalues import top_eigenvalues
from sharpkit.curvature.hessian import HessianOperator
from sharpkit.curvature.quadrature import spectral_density
from sharpkit.curvature.trace import trace
from sharpkit.errors import ModelError
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
        return _with_hessian(
            model,
            data,
            lambda h: float(
                top_eigenvalues(h, 1, tol=self.tol, seed=seed, progress=False).values[0]
            ),
        )


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
        values = _with_hessian(
            model,
            data,
            lambda h: top_eigenvalues(h, self.rank, tol=self.tol, seed=seed, progress=False).values,
        )
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
        Estimate(value=2.0, std_error=0.0)
    """

    products: int = 90
    name: str = field(default="hessian_trace", init=False)

    def __call__(self, model: nn.Module, data: Data, *, seed: int) -> Estimate:
        """The trace for one model; `seed` is that of the probes."""
        found = _with_hessian(model, data, lambda h: trace(h, products=self.products, seed=seed))
        return Estimate(found.value, found.std_error)


@dataclass(frozen=True)
class HessianRank:
    """The effective rank of the Hessian: how many directions carry its eigenvalues.

        exp(−Σ p_i log p_i),   p_i = |λ_i| / Σ |λ_j|

    From the nodes and weights of stochastic Lanczos quadrature. Invariant under scaling the loss.

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
        >>> abs(value - 1) < 4 * error  # the eigenvalues are 2 and 0
        True
    """

    steps: int = 40
    probes: int = 2
    name: str = field(default="hessian_rank", init=False)

    def __call__(self, model: nn.Module, data: Data, *, seed: int) -> Estimate:
        """The effective rank for one model; `seed` is that of the probes.

        Raises:
            ModelError: If the Hessian is zero.
        """

        from scipy.special import xlogy

        def compute(hessian: HessianOperator) -> Estimate:
            steps = min(self.steps, hessian.shape[0])
            density = spectral_density(
                hessian, steps=steps, probes=self.probes, seed=seed, progress=False
            )
            size = np.abs(density.nodes)
            total = density.size * (density.weights * size).sum(1)
            entropy = density.size * (density.weights * xlogy(size, size)).sum(1)
            mean = float(total.mean())
            if not mean > 0:
                raise ModelError("the Hessian is zero: it has no effective rank")
            ratio = float(entropy.mean()) / mean
            rank = math.exp(math.log(mean) - ratio)
            # to first order in the errors of the two means
            change = rank * ((1 + ratio) * total - entropy) / mean
            error = change.std(ddof=1) / self.probes**0.5 if self.probes > 1 else math.nan
            return Estimate(rank, float(error))

        return _with_hessian(model, data, compute)


def _with_hessian(model: nn.Module, data: Data, compute: Callable[[HessianOperator], T]) -> T:
    """Compute from the Hessian over all examples, in eval mode."""
    with frozen(model):
        hessian = HessianOperator(model, data, seed=0, progress=False)
        with hessian:
            return compute(hessian)
