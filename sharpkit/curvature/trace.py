"""Trace and Frobenius norm from random products, with error estimates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sharpkit.contract.precision import measuring_precision
from sharpkit.curvature.lanczos import near_one, require_resolved
from sharpkit.curvature.linear_map import (
    LinearMap,
    Symmetric,
    as_linear_map,
    multiply_rows,
    product_error,
    random_rows,
)
from sharpkit.curvature.memory import require_memory
from sharpkit.display import one_row, readable
from sharpkit.errors import ArgumentError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

_BLOCK = 16  # vectors per call of matmat


@readable(
    lambda e: f"{e.value:.6g} ± {e.std_error:.2g} by {e.method}, {e.products} products", brief=True
)
@dataclass(frozen=True)
class Estimated:
    """A number with its standard error, and how it was found.

    A measure returns an `Estimate` instead (of `sharpkit.measures`), the two numbers alone.

    Attributes:
        value: The estimate.
        std_error: Its standard error; NaN from a single probe. Where it is exact, 0, and with
            products by finite differences √P times the largest estimate of their error.
        products: Products with the operator that were used.
        method: "hutchinson", "hutch++" or "exact".
    """

    value: float
    std_error: float
    products: int
    method: str

    def frame(self) -> pd.DataFrame:
        """One row, with the attributes as columns."""
        return one_row(self)


@measuring_precision()
def trace(
    operator: Symmetric,
    *,
    method: Literal["hutch++", "hutchinson"] = "hutch++",
    products: int = 90,
    seed: int = 0,
) -> Estimated:
    """The trace of a symmetric matrix, with its standard error.

    Hutchinson: the mean of zᵀ A z over vectors z of random signs. Hutch++: a third of the products
    finds an orthonormal Q of the range of A, a third gives tr(Qᵀ A Q) exactly, and Hutchinson
    covers what is left, (I − QQᵀ) A (I − QQᵀ), with the last third; for a spectrum with outliers
    the error is far smaller. With `products` >= P the diagonal is summed: exact.

    Args:
        operator: A curvature operator, a symmetric tensor of shape (P, P), or anything with
            shape, dtype, device and matmat.
        method: "hutch++" or "hutchinson".
        products: Products to spend, at least 1 ("hutchinson") or 6 ("hutch++").
        seed: Of the random signs.

    Returns:
        Estimated: value, std_error, products and method.

    Raises:
        ArgumentError: For too few products, an unknown method, or not enough memory.
        ModelError: If a product is NaN or infinite, or too small for its dtype.

    Source:
        Hutchinson 1990; Meyer, Musco, Musco and Woodruff, "Hutch++", SOSA 2021, algorithm 1.

    Example:
        >>> import torch
        >>> trace(torch.diag(torch.tensor([1.0, 2.0, 3.0]))).value
        6.0
    """
    a = as_linear_map(operator)
    least = 6 if method == "hutch++" else 1
    if method not in ("hutch++", "hutchinson"):
        raise ArgumentError(f'method must be "hutch++" or "hutchinson", got {method!r}')
    if products < least:
        raise ArgumentError(f"products must be at least {least} for {method}, got {products}")
    multiply = _Multiply(a)
    found = _trace(multiply, method, products, seed)
    require_resolved(multiply.longest, a)
    return found


def _trace(multiply: _Multiply, method: str, products: int, seed: int) -> Estimated:
    a = multiply.operator
    size = a.shape[0]
    if products >= size:
        diagonal = (form for rows in _identity(a) for form in multiply.forms(rows))
        return Estimated(sum(diagonal), _of_columns(a), size, "exact")
    if method == "hutchinson":
        values = _quadratic_forms(multiply, products, seed, None)
        return Estimated(*_mean(values), products, method)
    rank = products // 3
    require_memory(
        3 * rank * size * a.dtype.itemsize,
        a.device,
        f"a basis of {rank} vectors for Hutch++",
        "ask for fewer products, or method='hutchinson'",
    )
    sketch = random_rows(rank, a, seed, "sign")
    image = torch.cat([multiply(block)[0] for block in torch.split(sketch, _BLOCK)])
    q = torch.linalg.qr(image.T).Q  # (P, rank)
    exact = sum(form for block in torch.split(q.T, _BLOCK) for form in multiply.forms(block))
    rest = products - 2 * rank
    mean, error = _mean(_quadratic_forms(multiply, rest, seed + 1, q))
    return Estimated(exact + mean, error, products, method)


@measuring_precision()
def frobenius_norm(operator: Symmetric, *, products: int = 30, seed: int = 0) -> Estimated:
    """The Frobenius norm ‖A‖_F = √(E ‖A z‖²) over random signs z, with its standard error.

    Args:
        operator: As for `trace`.
        products: Products to spend, at least 1; with P or more the columns are used: exact.
        seed: Of the random signs.

    Returns:
        Estimated: value, std_error (to first order), products and method.

    Raises:
        ArgumentError: For fewer than one product.
        ModelError: If a product is NaN or infinite, or too small for its dtype.

    Source:
        Hutchinson's estimator for A².

    Example:
        >>> import torch
        >>> frobenius_norm(torch.diag(torch.tensor([3.0, 4.0]))).value
        5.0
    """
    a = as_linear_map(operator)
    if products < 1:
        raise ArgumentError(f"products must be at least 1, got {products}")
    size = a.shape[0]
    exact = products >= size
    blocks = _identity(a) if exact else torch.split(random_rows(products, a, seed, "sign"), _BLOCK)
    multiply = _Multiply(a)
    lengths = [length for rows in blocks for length in multiply.lengths(rows)]
    require_resolved(multiply.longest, a)
    if exact:
        return Estimated(math.hypot(*lengths), _of_columns(a), size, "exact")
    top = multiply.longest or 1.0
    mean, error = _mean([(length / top) ** 2 for length in lengths])
    norm = math.sqrt(mean)
    error = error / (2 * norm) if norm else error
    return Estimated(top * norm, top * error, products, "hutchinson")


class _Multiply:
    """Products with rows (k, P), whatever the scale of the matrix."""

    def __init__(self, operator: LinearMap) -> None:
        self.operator = operator
        self.longest = 0.0  # the largest norm of a product

    def __call__(self, rows: Tensor) -> tuple[Tensor, Array]:
        """The products near 1, and the factors that bring them back."""
        products, powers = near_one(multiply_rows(self.operator, rows))
        self.longest = max(self.longest, *_norms(products, powers))
        return products, powers

    def forms(self, rows: Tensor) -> list[float]:
        """zᵀ A z of every row."""
        products, powers = self(rows)
        forms: list[float] = ((rows * products).double().sum(1).cpu().numpy() * powers).tolist()
        return forms

    def lengths(self, rows: Tensor) -> list[float]:
        """‖A z‖ of every row."""
        return _norms(*self(rows))


def _norms(rows: Tensor, powers: Array) -> list[float]:
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).cpu().numpy()
    lengths: list[float] = (norms * powers).tolist()
    return lengths


def _quadratic_forms(multiply: _Multiply, count: int, seed: int, q: Tensor | None) -> list[float]:
    """zᵀ A z for random signs z, after the projection away from the columns of q."""
    forms: list[float] = []
    for rows in torch.split(random_rows(count, multiply.operator, seed, "sign"), _BLOCK):
        if q is not None:
            rows = rows - (rows @ q) @ q.T
        forms += multiply.forms(rows)
    return forms


def _of_columns(a: LinearMap) -> float:
    """The error of a sum over P products, each with an error of its own."""
    return math.sqrt(a.shape[0]) * product_error(a)


def _identity(a: LinearMap) -> list[Tensor]:
    size = a.shape[0]
    blocks = []
    for start in range(0, size, _BLOCK):
        rows = torch.zeros(min(_BLOCK, size - start), size, dtype=a.dtype, device=a.device)
        rows[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = 1.0
        blocks.append(rows)
    return blocks


def _mean(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    t = torch.tensor(values, dtype=torch.float64)
    if len(values) < 2:
        return float(t.mean()), math.nan
    top = float(t.abs().max()) or 1.0  # squares of the values themselves may underflow
    return float(t.mean()), top * float((t / top).std(correction=1)) / math.sqrt(len(values))
