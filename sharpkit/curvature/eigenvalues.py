"""Extreme eigenvalues and eigenvectors by thick-restart Lanczos.

A basis of m vectors is filled by Lanczos steps; then its best Ritz vectors are kept, together
with the last residual, and the rest is filled again. All products are orthogonalised fully and
the projected matrix is computed, not assumed, so restarts and random directions need no special
recurrence. The basis of a small matrix holds the whole space and is never restarted: when it is
full, the eigenvalues are exact.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from sharpkit.contract.precision import measuring_precision
from sharpkit.curvature.copies import copies_ruled_out
from sharpkit.curvature.lanczos import (
    fresh_direction,
    near_one,
    orthogonal_part,
    orthogonalise,
    require_resolved,
)
from sharpkit.curvature.linear_map import (
    LinearMap,
    Symmetric,
    as_linear_map,
    multiply_rows,
    on_every_rank,
    product_error,
    random_rows,
    team_of,
)
from sharpkit.curvature.memory import require_memory
from sharpkit.display import readable
from sharpkit.errors import ArgumentError
from sharpkit.progress import progress_bar

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

Which = Literal["LA", "SA", "LM"]
_SMALL = 2000  # a matrix whose whole space is a cheap basis
_LOOK = 5  # products between looks at the residuals, or a tenth of the basis if that is more
_CHECK_STEPS = 12  # products spent on looking for further copies of a repeated eigenvalue, at least
_APART = 0.01  # residual of the next eigenvalue, in its distance to those whose copies are sought


@readable(
    lambda e: (
        f"{len(e.values)} eigenvalues of a matrix of {e.vectors.shape[0]} rows, "
        f"{'converged' if e.converged else 'NOT converged'}, {e.products} products"
    )
)
@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues in the order asked for, with what vouches for them.

    Attributes:
        values: Shape (k,); "LA" descending, "SA" ascending, "LM" descending in magnitude.
        vectors: Orthonormal eigenvectors as columns, shape (P, k), on the operator's device.
        residual_norms: ‖A v − λ v‖, shape (k,): an eigenvalue lies within this of each value. Of
            products by finite differences, plus the largest estimate of their error.
        converged: Whether every residual is within the tolerance, or the error of a product.
        products: Products with the operator that were used.
    """

    values: Array
    vectors: Tensor
    residual_norms: Array
    converged: bool
    products: int

    def frame(self) -> pd.DataFrame:
        """One row per eigenvalue: rank (from 1), eigenvalue, residual_norm, products."""
        import pandas as pd

        return pd.DataFrame(
            {
                "rank": np.arange(1, len(self.values) + 1),
                "eigenvalue": self.values,
                "residual_norm": self.residual_norms,
                "products": self.products,
            }
        )


@measuring_precision()
def top_eigenvalues(
    operator: Symmetric,
    k: int = 5,
    *,
    which: Which = "LA",
    tol: float | None = None,
    seed: int = 0,
    subspace: int | None = None,
    max_products: int | None = None,
    progress: bool = True,
) -> Eigenpairs:
    """The k extreme eigenvalues with eigenvectors and residual norms.

    Thick-restart Lanczos with full reorthogonalisation on the operator's own device. A residual
    norm r bounds the error of an eigenvalue by r, and by r² / gap. One start vector finds one copy
    of a repeated eigenvalue, so for k > 1 it then goes on from a random direction until further
    copies are found or ruled out: a dozen products where eigenvalues are apart, more where they
    lie close together. Memory: subspace x P. With
    a subspace of P, the default up to P = 2000, it ends after at most P + k products, converged,
    wherever the eigenvalues lie. The scale of the matrix does not matter.

    Args:
        operator: A curvature operator, a symmetric tensor of shape (P, P), or anything with
            shape, dtype, device and matmat.
        k: How many, 1 to P.
        which: "LA" the largest, "SA" the smallest (most negative), "LM" the largest in magnitude.
        tol: Residual norm to reach, relative to the largest |λ|; None for 1e-8 in float64 and
            2e-5 in float32.
        seed: Of the start vector.
        subspace: Basis vectors, more than k, at most P; None for P if that is at most 2000, else
            for the larger of 40 and 2k + 10.
        max_products: Give up after so many, with a warning; None for 50 subspaces.
        progress: Show a progress bar if it takes longer than two seconds.

    Returns:
        Eigenpairs: values, vectors, residual_norms, converged and products.

    Raises:
        ArgumentError: For k, which, tol or subspace out of range, or a basis that does not fit.
        ModelError: If a product is NaN or infinite, or too small for its dtype.

    Source:
        Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems",
        SIAM J. Matrix Anal. Appl. 2000; for copies see `copies_ruled_out`.

    Example:
        >>> import torch
        >>> top = top_eigenvalues(torch.diag(torch.tensor([3.0, -7.0, 1.0, 2.0])), 2)
        >>> top.values.round(4)
        array([3., 2.])
        >>> top_eigenvalues(torch.diag(torch.tensor([3.0, -7.0, 1.0])), 1, which="LM").values
        array([-7.])
    """
    a = as_linear_map(operator)
    size = a.shape[0]
    if not 1 <= k <= size:
        raise ArgumentError(f"k = {k}: expected 1 to {size}, the size of the matrix")
    if which not in ("LA", "SA", "LM"):
        raise ArgumentError(f'which must be "LA", "SA" or "LM", got {which!r}')
    if tol is not None and not tol > 0:
        raise ArgumentError(f"tol must be positive, got {tol}")
    if subspace is not None and subspace <= k and subspace < size:
        raise ArgumentError(f"subspace must be more than k = {k}, got {subspace}")
    if max_products is not None and max_products < 1:
        raise ArgumentError(f"max_products must be at least 1, got {max_products}")
    room = min(size, subspace or (size if size <= _SMALL else max(40, 2 * k + 10)))
    on_every_rank(
        a,
        lambda: require_memory(
            (2 * room + 4) * size * a.dtype.itemsize,
            a.device,
            f"a basis of {room} vectors and its restart",
            "pass a smaller subspace",
        ),
    )
    tol = tol or (1e-8 if a.dtype == torch.float64 else 2e-5)
    search = _Search(
        a, room, which, seed, max_products or 50 * room, progress and team_of(a).rank == 0
    )
    settled = search.run(k, tol)
    found = search.finish(k, tol)
    if not found.converged:
        warnings.warn(
            f"top_eigenvalues: after {found.products} products a residual is "
            f"{found.residual_norms.max():.2g}, above {tol:.2g} of the largest eigenvalue; "
            "allow more products, a larger subspace or a looser tol",
            stacklevel=2,
        )
    elif not settled:
        warnings.warn(
            f"top_eigenvalues: {found.products} products were too few to rule out that an "
            "eigenvalue found occurs more often: allow more products",
            stacklevel=2,
        )
    return found


class _Search:
    """A basis Q (rows) and its projected matrix H = Q A Qᵀ, grown and restarted.

    The first `used` rows have been multiplied; the rows up to `filled` are the directions their
    products point to outside of them, so that H[used:filled, :used] is all that is left over.
    """

    def __init__(
        self, a: LinearMap, room: int, which: Which, seed: int, limit: int, progress: bool
    ) -> None:
        self.a, self.room, self.which, self.seed, self.limit = a, room, which, seed, limit
        self.whole = room == a.shape[0]
        rows = room if self.whole else room + 1
        self.q = torch.zeros(rows, a.shape[0], dtype=a.dtype, device=a.device)
        self.h = np.zeros((rows, rows))
        self.used, self.filled = 0, 1
        self.products = 0
        self.direction: int | None = None  # the row from which further copies are looked for
        start = random_rows(1, a, seed)[0]
        self.q[0] = start / start.norm()
        self.bar = progress_bar(
            desc="eigenvalues", unit="product", leave=False, delay=2, progress=progress
        )

    def run(self, k: int, tol: float) -> bool:
        """Grow and restart until k pairs converge and survive the check, or products run out.

        Returns whether there are no more copies of what was found.
        """
        checked: Array | None = None
        steps = _LOOK
        while True:
            self.grow(min(self.room, self.used + steps))
            steps = max(_LOOK, self.used // 10)
            if self.used < k and self.products < self.limit:
                continue
            values, vectors = self.ritz()
            bound = 2 * tol * max(float(np.abs(values).max()), np.finfo(np.float64).tiny)
            left = self.left_over(vectors[:, : k + 1])
            exact = bool((left[:k] <= bound / 2).all())
            same = checked is not None and bool((np.abs(values[:k] - checked) <= bound).all())
            gaps = np.abs(self.key(values) - self.key(values[:k])[-1])
            before = values[:k][gaps[:k] > bound]  # a copy of the last would change nothing
            settled = self.used == self.a.shape[0] or (
                exact and (not len(before) or (same and self.ruled_out(before, vectors, left, k)))
            )
            if settled or self.products >= self.limit:
                self.bar.close()
                return settled
            if not (exact and same):  # else it goes on from the same random direction
                checked = values[:k].copy() if exact and checked is None else None
                if checked is not None:
                    self.look_elsewhere(values, vectors, k)
                    steps = _CHECK_STEPS * (self.filled - self.used)
                    continue
            if self.used == self.room:
                self.restart(values, vectors, k + (self.room - k) // 2)

    def left_over(self, vectors: Array) -> Array:
        """How much of the products of Ritz vectors lies outside the basis: their residuals."""
        part = self.h[self.used : self.filled, : self.used] @ vectors
        return np.asarray(np.linalg.norm(part, axis=0))

    def ruled_out(self, before: Array, vectors: Array, left: Array, k: int) -> bool:
        """Whether the random direction has met every copy of the values before the last.

        After a restart that direction is no longer known; then the best of what it found must
        stand, and be clearly apart.
        """
        if self.direction is None:
            following = self.ritz()[0][k : k + 1]
            gap = float((self.key(following) - self.key(before).max())[0])
            return bool(left[k] <= _APART * gap)
        found = np.zeros((self.filled, k))
        found[: self.used] = vectors[:, :k]
        h, size = self.h[: self.filled, : self.filled], self.a.shape[0]
        return copies_ruled_out(h, self.used, self.direction, found, before, size)

    def grow(self, target: int) -> None:
        """Multiply basis vectors until `target` of them are, or products run out."""
        while self.used < target and (self.products < self.limit or self.used == 0):
            j, known = self.used, self.q[: self.filled]
            w, power = self.multiply(self.q[j])
            column = (known @ w).double().cpu().numpy()
            w = orthogonal_part(w.unsqueeze(0), known.unsqueeze(0))[0]
            rest = float(w.norm())
            self.h[: self.filled, j] = self.h[j, : self.filled] = column * power
            self.used += 1
            size = self.a.shape[0]
            if rest > 10 * torch.finfo(self.a.dtype).eps * (float(np.abs(column).sum()) + rest):
                if self.filled < size:
                    self.append(w / rest)
                    self.h[self.filled - 1, j] = self.h[j, self.filled - 1] = rest * power
            elif self.used == self.filled < size:
                self.append(self.random())

    def append(self, row: Tensor) -> None:
        """A further direction, a unit vector orthogonal to the others."""
        self.q[self.filled] = row
        self.h[self.filled, :] = self.h[:, self.filled] = 0.0
        self.filled += 1

    def multiply(self, row: Tensor) -> tuple[Tensor, float]:
        """One product, counted, as a vector near 1 and a power of two."""
        self.products += 1
        self.bar.update()
        scaled, powers = near_one(multiply_rows(self.a, row.unsqueeze(0)))
        return scaled[0], float(powers[0])

    def random(self) -> Tensor:
        """A random unit vector orthogonal to all directions."""
        known = self.q[: self.filled].unsqueeze(0)
        return fresh_direction(self.a, known, self.seed + 7919 * (self.products + 1))

    def ritz(self) -> tuple[Array, Array]:
        """Ritz values in the order asked for, and their coordinates in the basis (columns)."""
        values, vectors = np.linalg.eigh(self.h[: self.used, : self.used])
        order = np.argsort(self.key(values), kind="stable")
        return values[order], vectors[:, order]

    def key(self, values: Array) -> Array:
        """What is smaller for values that are asked for first."""
        return {"LA": -values, "SA": values, "LM": -np.abs(values)}[self.which]

    def restart(self, values: Array, vectors: Array, keep: int) -> None:
        """Keep the best Ritz vectors, and the directions their products point to."""
        self.direction = None
        keep = min(keep, self.used, self.room - 1)
        directions = self.q[self.used : self.filled].clone()
        left = self.h[self.used : self.filled, : self.used] @ vectors[:, :keep]
        turn = torch.from_numpy(np.ascontiguousarray(vectors[:, :keep].T))
        self.q[:keep] = turn.to(self.q.device, self.q.dtype) @ self.q[: self.used]
        self.h[:] = 0.0
        self.h[:keep, :keep] = np.diag(values[:keep])
        self.used = self.filled = keep
        for row, coupling in zip(directions, left, strict=True):
            known = self.q[: self.filled].unsqueeze(0)
            row = orthogonalise(row.unsqueeze(0), known)[0]
            self.append(row / row.norm())
            self.h[self.filled - 1, :keep] = self.h[:keep, self.filled - 1] = coupling

    def look_elsewhere(self, values: Array, vectors: Array, k: int) -> None:
        """Go on from a random direction, to meet further copies of repeated eigenvalues."""
        if not self.whole:
            self.restart(values, vectors, k)
            self.filled = self.used  # what is left over of k converged pairs is within tolerance
        if self.filled == self.a.shape[0]:
            return
        self.append(self.random())
        first, last = self.used, self.filled - 1  # it is next
        self.direction = first
        self.q[[first, last]] = self.q[[last, first]]
        self.h[[first, last]] = self.h[[last, first]]
        self.h[:, [first, last]] = self.h[:, [last, first]]

    def finish(self, k: int, tol: float) -> Eigenpairs:
        """Eigenpairs of the whole basis, with residuals from k further products."""
        values, vectors = self.ritz()
        scale = float(np.abs(values).max())
        require_resolved(scale, self.a)
        k = min(k, self.used)
        turn = torch.from_numpy(np.ascontiguousarray(vectors[:, :k].T))
        rows = turn.to(self.q.device, self.q.dtype) @ self.q[: self.used]
        rows /= rows.norm(dim=1, keepdim=True)
        pairs = [self.vouch(row) for row in rows]
        residuals = np.array([residual for _, residual in pairs])
        # rounding of the basis change is not a lack of convergence
        bound = max(2 * tol, 100 * torch.finfo(self.a.dtype).eps) * scale
        error = product_error(self.a)
        return Eigenpairs(
            values=np.array([value for value, _ in pairs]),
            vectors=rows.T,
            residual_norms=residuals + error,
            converged=bool((residuals <= bound + error).all()),
            products=self.products,
        )

    def vouch(self, row: Tensor) -> tuple[float, float]:
        """Rayleigh quotient and residual norm of a unit vector, from its product."""
        product, power = self.multiply(row)
        value = (row * product).sum()
        residual = (product - value * row).norm()
        return float(value) * power, float(residual) * power
