"""Whether a random direction has met every copy of the eigenvalues that are known.

A Krylov space holds one direction of each eigenspace, whatever its dimension: one start vector
finds one copy of a repeated eigenvalue. A second random vector, orthogonal to what was found, has a
part in the missing copies. What its own Krylov space says bounds that part: for the orthonormal
polynomials p_j of the vector's spectral measure, its squared share in an eigenspace of μ is at most
1 / Σ_j p_j(μ)². A bound far below what a random vector has in any direction rules the copy out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

_RISK = 1e-3  # of a random vector whose part in a missing copy is smaller than the bound
_UNKNOWN = 1e-5  # part of a Krylov vector whose product is not known, above rounding: it ends there
_ENOUGH = 1e200  # sums of squares beyond say nothing more


def copies_ruled_out(
    h: Array, used: int, start: int, found: Array, values: Array, size: int
) -> bool:
    """Whether no further copy of `values` exists, at a risk of 1 in 1000.

    Args:
        h: The projected matrix Qᵀ A Q, shape (filled, filled).
        used: How many rows of Q have been multiplied.
        start: Which one is the random direction.
        found: Coordinates of the eigenvectors that are known, shape (filled, k), orthonormal.
        values: The eigenvalues to rule out, shape (c,).
        size: P, the dimensions that the random direction was drawn in.

    Source:
        van Dorsselaer, Hochstenbach and van der Vorst, "Computing probabilistic bounds for extreme
        eigenvalues of symmetric matrices with the Lanczos method", SIAM J. Matrix Anal. Appl.
        2001, for bounds from the overlap of a random start; the sum is Christoffel's function.

    Example:
        >>> h = np.diag([5.0, 1.0, 1.0, 1.0])  # 5 is known; 1 is all that the direction sees
        >>> copies_ruled_out(h, 4, 1, np.eye(4)[:, :1], np.array([5.0]), 4)
        True
        >>> copies_ruled_out(h, 4, 1, np.eye(4)[:, :1], np.array([1.0]), 4)
        False
    """
    # a random unit vector of p dimensions has less than δ of a direction at odds of δ √(2 p / π)
    least = _RISK**2 * np.pi / 2
    return bool((overlap_bounds(h, used, start, found, values) * size <= least).all())


def overlap_bounds(h: Array, used: int, start: int, found: Array, values: Array) -> Array:
    """Upper bounds of the squared parts of the start vector in the eigenspaces of `values`."""
    scale = float(np.abs(h).max()) or 1.0
    h, values = h / scale, np.asarray(values) / scale
    q = np.zeros(len(h))
    q[start] = 1.0
    q -= found @ (found.T @ q)
    q /= np.linalg.norm(q)
    basis = [q]
    before, now = np.zeros(values.shape), np.ones(values.shape)  # p_j at the values
    total, beta = np.ones(values.shape), 0.0
    while len(basis) < len(h) and np.linalg.norm(q[used:]) <= _UNKNOWN:
        w = h[:, :used] @ q[:used]
        alpha = float(w @ q)
        for known in (found, np.array(basis).T) * 2:  # twice is enough
            w -= known @ (known.T @ w)
        last, beta = beta, float(np.linalg.norm(w))
        step = max(beta, np.finfo(np.float64).eps)  # 0 where the Krylov space ends
        before, now = now, ((values - alpha) * now - last * before) / step
        total += now**2
        if beta <= 1e-10 or (total > _ENOUGH).any():
            break
        q = w / beta
        basis.append(q)
    return np.asarray(1 / total)
