"""Lanczos with full reorthogonalisation, for several start vectors at once.

Each start vector q_1 spans a Krylov space; in an orthonormal basis Q of it the matrix is
tridiagonal, Qᵀ A Q = T. In floating point the three-term recurrence loses orthogonality and
returns copies of converged eigenvalues; Gram-Schmidt against all earlier vectors, a second time
where the first one cancels digits, keeps Q orthonormal to rounding ("twice is enough").

Every product is brought near 1 by a power of two, which is exact, before anything is computed with
it: whether squares and dot products leave the dtype does not depend on the scale of the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sharpkit.contract.precision import measuring_precision
from sharpkit.contract.ranks import ALONE, Team
from sharpkit.curvature.linear_map import (
    LinearMap,
    Symmetric,
    as_linear_map,
    multiply_rows,
    on_every_rank,
    random_rows,
    team_of,
)
from sharpkit.curvature.memory import require_memory
from sharpkit.display import readable
from sharpkit.errors import ArgumentError, ModelError
from sharpkit.progress import progress_bar

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray


_COARSE_PASSES = 8  # of Gram-Schmidt, at most, with a basis in less precision than the vectors


@readable(lambda t: f"{t.diagonal.shape[0]} start vectors, {t.diagonal.shape[1]} steps", brief=True)
@dataclass(frozen=True)
class Tridiagonal:
    """The tridiagonal matrices of k start vectors, and the bases that belong to them.

    Attributes:
        diagonal: Shape (k, steps), float64.
        off_diagonal: Shape (k, steps − 1), float64; 0 where a Krylov space ended.
        basis: Orthonormal vectors, shape (k, steps, P), in the basis dtype; None if not wanted.
        breakdowns: How often the Krylov space of each start vector ended, shape (k,).
    """

    diagonal: NDArray[np.float64]
    off_diagonal: NDArray[np.float64]
    basis: Tensor | None
    breakdowns: NDArray[np.int64]

    def quadrature(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Nodes (Ritz values, ascending) and weights of each start vector, both (k, steps).

        For every polynomial p of degree below 2 · steps, Σ_i weight_i p(node_i) = q_1ᵀ p(A) q_1:
        Gauss quadrature of the spectrum as the start vector sees it. Weights sum to 1.

        Source:
            Golub and Meurant, "Matrices, Moments and Quadrature", 1994.
        """
        from scipy.linalg import eigh_tridiagonal

        pairs = [
            eigh_tridiagonal(diagonal, off)
            for diagonal, off in zip(self.diagonal, self.off_diagonal, strict=True)
        ]
        nodes = np.array([values for values, _ in pairs])
        weights = np.array([vectors[0] ** 2 for _, vectors in pairs])
        return nodes, weights / weights.sum(axis=1, keepdims=True)

    def frame(self) -> pd.DataFrame:
        """One row per start vector and step: probe, step, diagonal, off_diagonal (to the next)."""
        import pandas as pd

        probes, steps = self.diagonal.shape
        ends = np.full((probes, 1), np.nan)  # the last step has no next
        return pd.DataFrame(
            {
                "probe": np.repeat(np.arange(probes), steps),
                "step": np.tile(np.arange(steps), probes),
                "diagonal": self.diagonal.ravel(),
                "off_diagonal": np.hstack([self.off_diagonal, ends]).ravel(),
            }
        )


@measuring_precision()
def lanczos(
    operator: Symmetric,
    *,
    steps: int,
    probes: int | Tensor = 1,
    seed: int = 0,
    basis_dtype: torch.dtype | None = None,
    basis_device: torch.device | str | None = None,
    shard_basis: bool = False,
    keep_basis: bool = False,
    progress: bool = False,
) -> Tridiagonal:
    """Reduce a symmetric matrix to tridiagonal form from one or several start vectors.

    All probes advance together: a step is one `matmat`. Where a Krylov space ends (the next
    vector is rounding noise), the run goes on from a random vector orthogonal to all earlier
    ones; the coupling is 0, so that Gauss weights are unaffected and repeated eigenvalues are
    found as often as they occur. Memory: steps x probes x P numbers, checked first.

    The basis is needed to keep new vectors orthogonal to it, and may be stored with less precision
    or elsewhere. On matrices of known spectrum, stored in float32 it moves the extreme nodes and
    the distribution of all (Wasserstein distance) by less than 1e-6 ‖A‖; in bfloat16 by less than
    2e-3 ‖A‖ and 4e-4 ‖A‖. No eigenvalue is found twice.

    Args:
        operator: A curvature operator, a symmetric tensor of shape (P, P), or anything with
            shape, dtype, device and matmat.
        steps: Basis vectors per probe, 1 to P.
        probes: Number of Gaussian start vectors, or the start vectors as columns, shape (P, k).
        seed: Of the start vectors.
        basis_dtype: Storage of the basis; None for that of the operator.
        basis_device: Where the basis is, such as "cpu"; None for the operator's device.
        shard_basis: Of an operator with `DistributedData`, each process stores P over their number
            of every vector; two to four all-reduces more in each step, half of them of P numbers.
        keep_basis: Return the basis.
        progress: Show a progress bar if it takes longer than two seconds.

    Returns:
        Tridiagonal: diagonals, basis on request, and the number of breakdowns.

    Raises:
        ArgumentError: For steps or probes out of range, a basis that does not fit the memory, or
            one that is both sharded and kept.
        ModelError: If a product is NaN or infinite, or too small for its dtype.

    Source:
        Lanczos 1950; Parlett, "The Symmetric Eigenvalue Problem", section 6.9 (twice is enough).

    Example:
        >>> import torch
        >>> nodes, _ = lanczos(torch.diag(torch.tensor([1.0, 2.0, 5.0])), steps=3).quadrature()
        >>> nodes.round(4)
        array([[1., 2., 5.]])
    """
    a = as_linear_map(operator)
    size = a.shape[0]
    if not 1 <= steps <= size:
        raise ArgumentError(f"steps = {steps}: expected 1 to {size}, the size of the matrix")
    if shard_basis and keep_basis:
        raise ArgumentError("a sharded basis is not returned: leave out shard_basis or keep_basis")
    start = _start(a, probes, seed)
    count = len(start)
    stored = Stored(team_of(a), size) if shard_basis else Stored(ALONE, size)
    dtype = basis_dtype or a.dtype
    device = torch.device(basis_device or a.device)
    on_every_rank(a, lambda: require_basis(size, steps, count, dtype, device, stored.team.world))
    basis = torch.zeros(count, steps, stored.count, dtype=dtype, device=device)
    diagonal, off = np.zeros((count, steps)), np.zeros((count, max(steps - 1, 0)))
    breakdowns = np.zeros(count, dtype=np.int64)
    previous = current = start / start.norm(dim=1, keepdim=True)  # (probes, P)
    scale = np.zeros(count)
    for j in progress_bar(
        iterable=range(steps),
        desc="Lanczos",
        unit="step",
        leave=False,
        delay=2,
        progress=progress and team_of(a).rank == 0,
    ):
        basis[:, j] = current[:, stored.columns]
        w, powers = near_one(multiply_rows(a, current))
        alpha = (w * current).sum(1)
        diagonal[:, j] = alpha.double().cpu().numpy() * powers
        if j == steps - 1:
            break
        w -= alpha.unsqueeze(1) * current
        if j:
            w -= torch.from_numpy(off[:, j - 1] / powers).to(w).unsqueeze(1) * previous
        known = basis[:, : j + 1]
        w = orthogonal_part(w, known, stored)
        beta = w.norm(dim=1).double().cpu().numpy() * powers
        scale = np.maximum(scale, np.abs(diagonal[:, j]) + beta)
        ended = beta <= 10 * torch.finfo(a.dtype).eps * scale
        for i in np.flatnonzero(ended):
            drawn = seed + 7919 * (j + 1) + int(i)
            w[i] = fresh_direction(a, known[i : i + 1], drawn, stored)
        breakdowns += ended
        off[:, j] = np.where(ended, 0.0, beta)
        previous, current = current, w / w.norm(dim=1, keepdim=True)
    for largest in np.maximum(scale, np.abs(diagonal).max(axis=1)):
        require_resolved(float(largest), a)
    return Tridiagonal(diagonal, off, basis if keep_basis else None, breakdowns)


@dataclass(frozen=True)
class Stored:
    """Which columns of a basis this process stores: all, or its share of them."""

    team: Team
    size: int

    @property
    def columns(self) -> slice:
        """Where they are."""
        return self.team.share(self.size)

    @property
    def count(self) -> int:
        """How many."""
        return len(range(self.size)[self.columns])

    def added(self, part: Tensor, rows: Tensor, columns: slice | None = None) -> Tensor:
        """The sum over processes, in the dtype of rows; each has all columns, or some of rows."""
        if self.team.world == 1:
            return part
        shape = part.shape if columns is None else rows.shape

        def add(out: Tensor) -> None:
            out.view(shape)[:, columns or slice(None)] += part.to(rows.device, rows.dtype)

        summed = self.team.summed(shape.numel(), rows, add, same=rows[:0]).view(shape)
        return summed.to(part.device, part.dtype)


def basis_bytes(size: int, steps: int, probes: int, dtype: torch.dtype, ranks: int = 1) -> int:
    """Memory of the basis, of which one of `ranks` processes has a share, and of one step.

    Example:
        >>> basis_bytes(1000, 80, 4, torch.float32)
        1376000
        >>> basis_bytes(1000, 80, 4, torch.float32, ranks=4)
        416000
    """
    return (steps * -(-size // ranks) + 6 * size) * probes * dtype.itemsize


def require_basis(
    size: int, steps: int, probes: int, dtype: torch.dtype, device: torch.device, ranks: int = 1
) -> None:
    """Raise ArgumentError with the numbers if a basis, or its share, does not fit."""
    require_memory(
        basis_bytes(size, steps, probes, dtype, ranks),
        device,
        f"the basis of {steps} steps x {probes} probes x {size} parameters",
        "ask for fewer steps or probes, or another basis_dtype or basis_device",
    )


def near_one(rows: Tensor) -> tuple[Tensor, NDArray[np.float64]]:
    """Rows (k, P) times powers of two that bring their largest entries near 1, and the way back.

    row = scaled · factor, for finite rows of any scale.

    Example:
        >>> near_one(torch.tensor([[3.0, -40.0], [0.0, 0.0]]))
        (tensor([[ 0.0469, -0.6250],
                [ 0.0000,  0.0000]]), array([64.,  1.]))
    """
    top = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1).double().cpu().numpy()
    limit = -np.log2(torch.finfo(rows.dtype).tiny)  # the inverse must be in range as well
    powers = np.exp2(np.clip(np.frexp(top)[1], -limit, limit))
    return rows * torch.from_numpy(1 / powers).to(rows).unsqueeze(1), powers


def require_resolved(scale: float, operator: LinearMap) -> None:
    """Raise if products of this size lose digits at the small end of their dtype.

    Entries below the smallest normal number may be cut to 0. Over P of them that must stay within
    1e-5 of the product's norm.

    Raises:
        ModelError: If it does not.

    Example:
        >>> from sharpkit.curvature.linear_map import as_linear_map
        >>> require_resolved(1e-37, as_linear_map(torch.eye(3)))
        Traceback (most recent call last):
        ...
        sharpkit.errors.ModelError: the products with the operator are about 1e-37, ...
    """
    tiny = torch.finfo(operator.dtype).tiny
    if 0 < scale < 1e5 * tiny * operator.shape[0] ** 0.5:
        raise ModelError(
            f"the products with the operator are about {scale:.2g}, too near the smallest number "
            f"of {str(operator.dtype).removeprefix('torch.')} ({tiny:.2g}) to be exact: multiply "
            "the loss by a large factor, or compute in float64"
        )


def orthogonal_part(rows: Tensor, basis: Tensor, stored: Stored | None = None) -> Tensor:
    """Rows (k, P) made orthogonal to the bases (k, j, P) to rounding.

    A row that loses more than a third of its norm in one pass keeps errors of the size of what
    was taken away, and gets a second one, which is always enough; and further ones where the
    basis is stored with less precision, so that each pass takes away less.
    """
    coarse = torch.finfo(basis.dtype).eps > torch.finfo(rows.dtype).eps
    before, found = rows.norm(dim=1), orthogonalise(rows, basis, stored)
    for _ in range(_COARSE_PASSES if coarse else 1):
        after = found.norm(dim=1)
        again = torch.nonzero(after < 0.7 * before).flatten().tolist()
        if not again:
            break
        for i in again:
            found[i : i + 1] = orthogonalise(found[i : i + 1], basis[i : i + 1], stored)
        before = after
    return found


def orthogonalise(rows: Tensor, basis: Tensor, stored: Stored | None = None) -> Tensor:
    """One pass of Gram-Schmidt: rows (k, P) minus their parts in the bases (k, j, P).

    Of a sharded basis each process gives its columns, (k, j, its share of P).
    """
    stored = stored or Stored(ALONE, rows.shape[1])
    local = rows[:, stored.columns].to(basis.device, basis.dtype)
    # one at a time: a batched product would copy the bases, which are slices
    inner = torch.stack([q @ row for q, row in zip(basis, local, strict=True)])
    inner = stored.added(inner, rows)
    parts = torch.stack([q.T @ row for q, row in zip(basis, inner, strict=True)])
    return rows - stored.added(parts, rows, stored.columns).to(rows.device, rows.dtype)


def fresh_direction(
    operator: LinearMap, basis: Tensor, seed: int, stored: Stored | None = None
) -> Tensor:
    """A random unit vector of shape (P,) orthogonal to a basis of shape (1, j, P)."""
    row = random_rows(1, operator, seed)
    for _ in range(3):
        row = orthogonalise(row / row.norm(), basis, stored)
    unit: Tensor = row / row.norm()
    return unit[0]


def _start(operator: LinearMap, probes: int | Tensor, seed: int) -> Tensor:
    """The start vectors as rows, shape (k, P)."""
    size = operator.shape[0]
    if not isinstance(probes, Tensor):
        if probes < 1:
            raise ArgumentError(f"probes must be at least 1, got {probes}")
        return random_rows(probes, operator, seed)
    if probes.ndim != 2 or probes.shape[0] != size or probes.shape[1] < 1:
        raise ArgumentError(
            f"expected start vectors of shape ({size}, k), got {tuple(probes.shape)}"
        )
    rows = probes.T.to(operator.device, operator.dtype)
    if not bool((torch.isfinite(rows).all(1) & (rows != 0).any(1)).all()):
        raise ArgumentError("a start vector is zero, NaN or infinite")
    return near_one(rows)[0]
