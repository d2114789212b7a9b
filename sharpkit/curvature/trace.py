"""Trace and Frobenius norm from random products, with error estimates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sharpkit.contract.precision import measuring_precision
from sharpkit.curvature.lanczos import require_resolved
from sharpkit.curvature.leave_one_out import xtrace
from sharpkit.curvature.linear_map import (
    LinearMap,
    Symmetric,
    as_linear_map,
    on_every_rank,
    product_error,
    random_rows,
    team_of,
)
from sharpkit.curvature.memory import require_memory
from sharpkit.curvature.multiply import BLOCK, Multiply, identity_rows
from sharpkit.display import one_row, readable
from sharpkit.errors import ArgumentError
from sharpkit.progress import progress_bar

if TYPE_CHECKING:
    import pandas as pd

_LEAST = {"hutch++": 6, "xtrace": 4, "hutchinson": 1}  # products


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
        method: "hutchinson", "hutch++", "xtrace" or "exact".
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
    method: Literal["hutch++", "xtrace", "hutchinson"] = "hutch++",
    products: int = 90,
    seed: int = 0,
    progress: bool = True,
) -> Estimated:
    """The trace of a symmetric matrix, with its standard error.

    Hutchinson: the mean of zᵀ A z over vectors z of random signs. Hutch++: a third of the products
    finds an orthonormal Q of the range of A, a third gives tr(Qᵀ A Q) exactly, and Hutchinson
    covers what is left, (I − QQᵀ) A (I − QQᵀ), with the last third; for a spectrum with outliers
    the error is far smaller. XTrace: half of the products finds the range of A, half multiplies it,
    and every vector in turn is the one that Hutchinson takes what the others left from; the mean
    is as good or better, most of all where eigenvalues decay. With `products` >= P the diagonal
    is summed: exact. Memory: a third of the products, times 3 P, for Hutch++; half, times 4 P,
    for XTrace.

    Args:
        operator: A curvature operator, a symmetric tensor of shape (P, P), or anything with
            shape, dtype, device and matmat.
        method: "hutch++", "xtrace" or "hutchinson".
        products: Products to spend, at least 1 ("hutchinson"), 6 ("hutch++") or 4 ("xtrace", which
            takes an even number).
        seed: Of the random vectors.
        progress: Show a progress bar if it takes longer than two seconds.

    Returns:
        Estimated: value, std_error, products and method.

    Raises:
        ArgumentError: For too few products, an unknown method, or not enough memory.
        ModelError: If a product is NaN or infinite, or too small for its dtype.

    Source:
        Hutchinson 1990; Meyer, Musco, Musco and Woodruff, "Hutch++", SOSA 2021, algorithm 1;
        Epperly, Tropp and Webber, "XTrace", SIAM J. Matrix Anal. Appl. 2024, sections 2 and 3.

    Example:
        >>> import torch
        >>> trace(torch.diag(torch.tensor([1.0, 2.0, 3.0]))).value
        6.0
    """
    a = as_linear_map(operator)
    if method not in _LEAST:
        names = ", ".join(f'"{name}"' for name in _LEAST)
        raise ArgumentError(f"method must be one of {names}, got {method!r}")
    if products < _LEAST[method]:
        raise ArgumentError(
            f"products must be at least {_LEAST[method]} for {method}, got {products}"
        )
    with progress_bar(
        desc="trace", unit="product", leave=False, delay=2,
        progress=progress and team_of(a).rank == 0,
        total=min(products, a.shape[0]),
    ) as bar:  # fmt: skip
        multiply = Multiply(a, bar)
        found = _trace(multiply, method, products, seed)
    require_resolved(multiply.longest, a)
    return found


def _trace(multiply: Multiply, method: str, products: int, seed: int) -> Estimated:
    a = multiply.operator
    size = a.shape[0]
    if products >= size:
        diagonal = (form for rows in identity_rows(a) for form in multiply.forms(rows))
        return Estimated(sum(diagonal), _of_columns(a), size, "exact")
    if method == "hutchinson":
        values = _quadratic_forms(multiply, products, seed, None)
        return Estimated(*_mean(values), products, method)
    if method == "xtrace":
        return Estimated(*xtrace(multiply, products // 2, seed), products // 2 * 2, method)
    rank = products // 3
    on_every_rank(
        a,
        lambda: require_memory(
            3 * rank * size * a.dtype.itemsize,
            a.device,
            f"a basis of {rank} vectors for Hutch++",
            "ask for fewer products, or method='hutchinson'",
        ),
    )
    sketch = random_rows(rank, a, seed, "sign")
    image = torch.cat([multiply(block)[0] for block in torch.split(sketch, BLOCK)])
    q = torch.linalg.qr(image.T).Q  # (P, rank)
    exact = sum(form for block in torch.split(q.T, BLOCK) for form in multiply.forms(block))
    rest = products - 2 * rank
    mean, error = _mean(_quadratic_forms(multiply, rest, seed + 1, q))
    return Estimated(exact + mean, error, products, method)


@measuring_precision()
def frobenius_norm(
    operator: Symmetric, *, products: int = 30, seed: int = 0, progress: bool = True
) -> Estimated:
    """The Frobenius norm ‖A‖_F = √(E ‖A z‖²) over random signs z, with its standard error.

    Args:
        operator: As for `trace`.
        products: Products to spend, at least 1; with P or more the columns are used: exact.
        seed: Of the random signs.
        progress: Show a progress bar if it takes longer than two seconds.

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
    blocks = (
        identity_rows(a)
        if exact
        else iter(torch.split(random_rows(products, a, seed, "sign"), BLOCK))
    )
    with progress_bar(
        desc="norm", unit="product", leave=False, delay=2,
        progress=progress and team_of(a).rank == 0,
        total=min(products, size),
    ) as bar:  # fmt: skip
        multiply = Multiply(a, bar)
        lengths = [length for rows in blocks for length in multiply.lengths(rows)]
    require_resolved(multiply.longest, a)
    if exact:
        return Estimated(math.hypot(*lengths), _of_columns(a), size, "exact")
    top = multiply.longest or 1.0
    mean, error = _mean([(length / top) ** 2 for length in lengths])
    norm = math.sqrt(mean)
    error = error / (2 * norm) if norm else error
    return Estimated(top * norm, top * error, products, "hutchinson")


def _quadratic_forms(multiply: Multiply, count: int, seed: int, q: Tensor | None) -> list[float]:
    """zᵀ A z for random signs z, after the projection away from the columns of q."""
    forms: list[float] = []
    for rows in torch.split(random_rows(count, multiply.operator, seed, "sign"), BLOCK):
        if q is not None:
            rows = rows - (rows @ q) @ q.T
        forms += multiply.forms(rows)
    return forms


def _of_columns(a: LinearMap) -> float:
    """The error of a sum over P products, each with an error of its own."""
    return math.sqrt(a.shape[0]) * product_error(a)


def _mean(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    t = torch.tensor(values, dtype=torch.float64)
    if len(values) < 2:
        return float(t.mean()), math.nan
    top = float(t.abs().max()) or 1.0  # squares of the values themselves may underflow
    return float(t.mean()), top * float((t / top).std(correction=1)) / math.sqrt(len(values))
