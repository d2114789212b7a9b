"""Curvature as measures of a zoo's models: callables (model, data, *, seed) -> value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from sharpkit.curvature.eigenvalues import top_eigenvalues
from sharpkit.curvature.hessian import HessianOperator
from sharpkit.curvature.trace import trace
from sharpkit.errors import ModelError
from sharpkit.functional import Data, frozen
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


def _with_hessian(model: nn.Module, data: Data, compute: Callable[[HessianOperator], T]) -> T:
    """Compute from the Hessian over all examples and parameters, in eval mode."""
    with frozen(model):
        hessian = HessianOperator(model, data, parameters="*", seed=0, progress=False)
        with hessian:
            return compute(hessian)
