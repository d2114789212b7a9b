"""What the algorithms here need of a matrix: its shape and its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from sharpkit.contract.ranks import ALONE, Team
from sharpkit.errors import ArgumentError, ModelError

T = TypeVar("T")

_STREAM = 0x5BEC7  # sets this module's random numbers apart from others of the same seed


@runtime_checkable
class LinearMap(Protocol):
    """A symmetric matrix given by its products; every curvature operator is one."""

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64."""
        ...

    @property
    def device(self) -> torch.device:
        """Where vectors live."""
        ...

    def matmat(self, vectors: Tensor) -> Tensor:
        """(P, k) -> (P, k)."""
        ...


Symmetric: TypeAlias = LinearMap | Tensor


class DenseMap:
    """A symmetric tensor of shape (P, P) as a `LinearMap`."""

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.numel():
            raise ArgumentError(f"expected a square matrix, got shape {tuple(matrix.shape)}")
        if matrix.dtype not in (torch.float32, torch.float64):
            raise ArgumentError(f"expected a float32 or float64 matrix, got {matrix.dtype}")
        if not bool(torch.isfinite(matrix).all()):
            raise ArgumentError("the matrix has NaN or infinite entries")
        scale = float(matrix.abs().max())
        if float((matrix - matrix.T).abs().max()) > 1e3 * torch.finfo(matrix.dtype).eps * scale:
            raise ArgumentError("the matrix is not symmetric: pass (A + A.T) / 2 if you mean that")
        self._matrix = matrix.detach()
        self.shape = (matrix.shape[0], matrix.shape[0])
        self.dtype, self.device = matrix.dtype, matrix.device

    def matmat(self, vectors: Tensor) -> Tensor:
        """(P, k) -> (P, k)."""
        return self._matrix @ vectors


def as_linear_map(operator: Symmetric) -> LinearMap:
    """The operator itself, or a dense symmetric tensor wrapped.

    Raises:
        ArgumentError: If it is neither.

    Example:
        >>> as_linear_map(torch.eye(3)).shape
        (3, 3)
    """
    if isinstance(operator, Tensor):
        return DenseMap(operator)
    if not isinstance(operator, LinearMap):
        raise ArgumentError(
            "expected a curvature operator, a symmetric tensor, or an object with shape, dtype, "
            f"device and matmat; got {type(operator).__name__}"
        )
    return operator


def multiply_rows(operator: LinearMap, rows: Tensor) -> Tensor:
    """The products with k vectors given as rows, (k, P) -> (k, P).

    Raises:
        ArgumentError: If the products have another shape or dtype.
        ModelError: If a product is NaN or infinite.
    """
    products = operator.matmat(rows.T).T
    if products.shape != rows.shape or products.dtype != rows.dtype:
        raise ArgumentError(
            f"matmat of {type(operator).__name__} gave {tuple(products.T.shape)} {products.dtype} "
            f"for {tuple(rows.T.shape)} {rows.dtype}: expected the same"
        )
    if not bool(torch.isfinite(products).all()):
        raise ModelError(
            "a product with the operator is NaN or infinite: the loss has no finite second "
            "derivative at these weights, or it overflows in this precision"
        )
    return products


def product_error(operator: LinearMap) -> float:
    """The largest error, in norm, of a product with a unit vector; 0 but for finite differences.

    Example:
        >>> product_error(DenseMap(torch.eye(2)))
        0.0
    """
    return float(getattr(operator, "product_error", 0.0))


def on_every_rank(operator: LinearMap, compute: Callable[[], T]) -> list[T]:
    """What the processes of an operator find each, such as how much memory they have.

    What follows from it must be the same on all of them.

    Example:
        >>> on_every_rank(DenseMap(torch.eye(2)), lambda: 3)
        [3]
    """
    return team_of(operator).gathered(compute)


def team_of(operator: LinearMap) -> Team:
    """The processes that make products of an operator together; this one alone for most."""
    team: Team = getattr(operator, "team", ALONE)
    return team


def random_rows(count: int, operator: LinearMap, seed: int, kind: str = "normal") -> Tensor:
    """Seeded random vectors as rows, shape (count, P); the same numbers on every device.

    The stream differs from that of `torch.manual_seed(seed)`: weights or data drawn there would
    otherwise be the very numbers of the probes, and the estimates biased. The kind is "normal", or
    "sign" for independent ±1.
    """
    mixed = int(np.random.SeedSequence([_STREAM, abs(seed), seed < 0]).generate_state(2)[0])
    generator = torch.Generator().manual_seed(mixed)
    shape = (count, operator.shape[0])
    if kind == "sign":
        rows = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1
    else:
        rows = torch.randn(shape, generator=generator, dtype=torch.float64)
    return rows.to(operator.dtype).to(operator.device)
