"""The diagonal of a matrix from random products, with a standard error of every entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sharpkit.contract.precision import measuring_precision
from sharpkit.curvature.lanczos import require_resolved
from sharpkit.curvature.leave_one_out import xdiag
from sharpkit.curvature.linear_map import Symmetric, as_linear_map, team_of
from sharpkit.curvature.multiply import Multiply, identity_rows
from sharpkit.display import readable
from sharpkit.errors import ArgumentError
from sharpkit.progress import progress_bar

if TYPE_CHECKING:
    import pandas as pd

_LEAST = 4  # products of two test vectors, so that there is a standard error


@readable(lambda d: f"of {len(d.values)} rows by {d.method}, {d.products} products")
@dataclass(frozen=True)
class Diagonal:
    """The diagonal of a matrix with its standard errors, and how it was found.

    `operator.split(values)` is one tensor per parameter, of the parameter's shape.

    Attributes:
        values: The estimates, shape (P,), in the operator's dtype and on its device.
        std_errors: Their standard errors, shape (P,); 0 where they are exact.
        products: Products with the operator that were used.
        method: "xdiag" or "exact".
        sizes: How many entries each parameter has, by name, in the order of the entries; a matrix
            without parameters is "all".
    """

    values: Tensor
    std_errors: Tensor
    products: int
    method: str
    sizes: Mapping[str, int]

    def frame(self) -> pd.DataFrame:
        """One row per parameter: parameter, size, and of its entries mean, min, max, and the root
        mean square of their standard errors, rms_std_error."""
        import pandas as pd

        sizes = list(self.sizes.values())
        parts = zip(
            self.sizes, torch.split(self.values, sizes), torch.split(self.std_errors, sizes),
            strict=True,
        )  # fmt: skip
        return pd.DataFrame(
            {
                "parameter": name,
                "size": len(values),
                "mean": float(values.double().mean()),
                "min": float(values.min()),
                "max": float(values.max()),
                "rms_std_error": float(errors.double().norm()) / len(errors) ** 0.5,
            }
            for name, values, errors in parts
        )


@measuring_precision()
def diagonal(
    operator: Symmetric, *, products: int = 90, seed: int = 0, progress: bool = True
) -> Diagonal:
    """The diagonal of a symmetric matrix, with a standard error of every entry.

    XDiag: half of the products finds an orthonormal Q of the range of A, half gives diag(Q Qᵀ A),
    and random signs ω estimate what is left, ω ∘ (I − QQᵀ) A ω; each ω in turn is left out of Q, so
    that every estimate is unbiased, and their spread is the error. Entries far below the others are
    known the worst: compare them with their errors. With `products` >= P the columns of the
    identity are multiplied: exact. Memory: products x 5/2 P.

    Args:
        operator: A curvature operator, a symmetric tensor of shape (P, P), or anything with
            shape, dtype, device and matmat.
        products: Products to spend, at least 4; an odd one is not spent.
        seed: Of the random signs.
        progress: Show a progress bar if it takes longer than two seconds.

    Returns:
        Diagonal: values and std_errors of shape (P,), products and method.

    Raises:
        ArgumentError: For too few products, or not enough memory.
        ModelError: If a product is NaN or infinite, or too small for its dtype.

    Source:
        Epperly, Tropp and Webber, "XTrace: making the most of every sample in stochastic trace
        estimation", SIAM J. Matrix Anal. Appl. 2024, section 4.

    Example:
        >>> diagonal(torch.tensor([[1.0, 2.0], [2.0, 3.0]]), products=4).values
        tensor([1., 3.])
        >>> model = torch.nn.Linear(9, 10)
        >>> from sharpkit.curvature import GaussNewtonOperator
        >>> matrix = GaussNewtonOperator(model, (torch.randn(8, 9), torch.arange(8)))
        >>> matrix.split(diagonal(matrix, products=20).values)["weight"].shape
        torch.Size([10, 9])
    """
    a = as_linear_map(operator)
    size = a.shape[0]
    if products < _LEAST:
        raise ArgumentError(f"products must be at least {_LEAST}, got {products}")
    exact = products >= size
    spent = size if exact else products // 2 * 2
    with progress_bar(
        desc="diagonal",
        unit="product",
        leave=False,
        delay=2,
        total=spent,
        progress=progress and team_of(a).rank == 0,
    ) as bar:
        multiply = Multiply(a, bar)
        values, errors = _exact(multiply) if exact else _estimated(multiply, spent // 2, seed)
    require_resolved(multiply.longest, a)
    shapes = getattr(operator, "parameters", None) or {}
    sizes = {name: shape.numel() for name, shape in shapes.items()} or {"all": size}
    return Diagonal(values, errors, spent, "exact" if exact else "xdiag", sizes)


def _exact(multiply: Multiply) -> tuple[Tensor, Tensor]:
    entries = [form for rows in identity_rows(multiply.operator) for form in multiply.forms(rows)]
    values = torch.tensor(entries, dtype=torch.float64)
    values = values.to(multiply.operator.dtype).to(multiply.operator.device)
    return values, torch.zeros_like(values)


def _estimated(multiply: Multiply, count: int, seed: int) -> tuple[Tensor, Tensor]:
    mean, error, power = xdiag(multiply, count, seed)
    return mean * power, error * power
