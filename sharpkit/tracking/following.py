"""The largest eigenvalue of a matrix that changes a little between one measurement and the next.

Lanczos begins where the last measurement ended, at its eigenvector with a share of the second one:
a few products are then enough, and a second eigenvalue that overtakes the first is in sight. So is
one that was small a few steps ago, by a share of the gradient: what rises fast has a part in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sharpkit.contract.precision import measuring_precision
from sharpkit.curvature.lanczos import fresh_direction, near_one, orthogonal_part, require_resolved
from sharpkit.curvature.linear_map import LinearMap, multiply_rows, random_rows

WARM = 5  # products after which a warm start is looked at, and mostly accepted
TOLERANCE = 0.02  # of the residual, relative to the eigenvalue
_COLD_TOLERANCE = 1e-3  # a random start has to find the eigenvector first
_LIMIT = 60  # products after which it is given up, and said
_SHARE = 0.1  # of the second eigenvector in a start
_TOWARD = 0.3  # of the direction in which a new eigenvector may have a part


@dataclass(frozen=True)
class Followed:
    """The largest eigenvalue, and where the next measurement begins.

    Attributes:
        value: The Rayleigh quotient of `vector`: never above λmax but for rounding.
        residual: ‖A v − λ v‖; an eigenvalue lies within this of the value.
        vector: Unit vector, shape (P,).
        second: The next Ritz vector, shape (P,); zeros if there is none.
        products: Products that were used.
    """

    value: float
    residual: float
    vector: Tensor
    second: Tensor
    products: int

    @property
    def converged(self) -> bool:
        """Whether the residual is within `TOLERANCE` of the value."""
        return self.residual <= TOLERANCE * abs(self.value)


@measuring_precision()
def follow(
    matrix: LinearMap,
    last: Followed | None = None,
    *,
    toward: Tensor | None = None,
    seed: int = 0,
) -> Followed:
    """The largest eigenvalue (with its sign), from the eigenvector of an earlier matrix.

    Lanczos with full reorthogonalisation from v + 0.1 u + 0.3 g / ‖g‖, with v and u the first two
    Ritz vectors of `last` and g `toward`, or from a random vector. After 5 products the residual
    β |s|, with β the last coefficient and s the last entry of the eigenvector of T, is compared
    with 2 % of the value; where the eigenvector has turned further than that, it goes on, to 60
    products at most.

    The residual tells that an eigenvalue is near, not that it is the largest: one whose eigenvector
    has hardly a part in the start stays unseen until it has.

    Args:
        matrix: Symmetric, with shape, dtype, device and matmat.
        last: What was found before; None for a random start, which takes some 10 to 30 products.
        toward: A direction in which new eigenvectors have a part, such as the gradient of the
            loss, shape (P,), of any length; None for none. It is not used in a random start.
        seed: Of the random start.

    Returns:
        Followed: value, residual, vectors and products.

    Raises:
        ModelError: If a product is NaN or infinite, or too small for its dtype.

    Source:
        Parlett, "The Symmetric Eigenvalue Problem", section 13.2 (residuals of Ritz vectors).

    Example:
        >>> from sharpkit.curvature.linear_map import as_linear_map
        >>> first = follow(as_linear_map(torch.diag(torch.arange(20.0))))
        >>> round(first.value, 3)
        19.0
        >>> again = follow(as_linear_map(torch.diag(torch.arange(20.0) + 0.1)), first)
        >>> round(again.value, 3), again.products
        (19.1, 5)
    """
    from scipy.linalg import eigh_tridiagonal

    size = matrix.shape[0]
    tolerance = _COLD_TOLERANCE if last is None else TOLERANCE
    room = min(_LIMIT, size)
    basis = torch.empty(room, size, dtype=matrix.dtype, device=matrix.device)
    start = random_rows(1, matrix, seed)[0] if last is None else _start(last, toward)
    start = start.to(matrix.device, matrix.dtype)
    current = start / start.norm()
    diagonal, beside = np.zeros(room), np.zeros(room)
    scale = 0.0
    for j in range(room):
        basis[j] = current
        known = basis[: j + 1].unsqueeze(0)
        product, powers = near_one(multiply_rows(matrix, current.unsqueeze(0)))
        diagonal[j] = float((product[0] @ current).double()) * powers[0]
        rest = orthogonal_part(product, known)
        beside[j] = float(rest.norm().double()) * powers[0]
        scale = max(scale, abs(diagonal[j]) + beside[j])
        ended = beside[j] <= 10 * torch.finfo(matrix.dtype).eps * scale
        if ended:
            beside[j] = 0.0
        used = j + 1
        if used >= min(WARM, room):
            values, vectors = eigh_tridiagonal(diagonal[:used], beside[:j])  # ascending
            residual = float(abs(beside[j] * vectors[-1, -1]))
            if residual <= tolerance * abs(values[-1]):
                break
        if used < room:
            current = fresh_direction(matrix, known, seed + j) if ended else (rest / rest.norm())[0]
    require_resolved(scale, matrix)
    turn = torch.from_numpy(np.ascontiguousarray(vectors[:, -2:].T)).to(basis)
    rows = turn @ basis[:used]
    rows /= rows.norm(dim=1, keepdim=True)
    second = rows[0] if used > 1 else torch.zeros_like(rows[0])
    return Followed(float(values[-1]), residual, rows[-1], second, used)


def _start(last: Followed, toward: Tensor | None) -> Tensor:
    """Where a measurement begins after another."""
    start: Tensor = last.vector + _SHARE * last.second
    if toward is None:
        return start
    unit = near_one(toward.detach().to(start).unsqueeze(0))[0][0]
    length = unit.norm()
    if not (torch.isfinite(length) and length > 0):
        return start
    # along v, or it may cancel it
    unit = unit / length * torch.where(unit @ last.vector < 0, -1.0, 1.0)
    return start.add(unit, alpha=_TOWARD)
