"""XTrace and XDiag: every random vector is tested against the range that the others found.

k test vectors ω_i give Y = A Ω = Q R, and k further products Z = A Q. Without its i-th column, Y
spans what Q spans but for one direction: that of Q s_i, where s_i is column i of R⁻ᵀ, normalised.
So all k leave-one-out projections I − Q (I − s_i s_iᵀ) Qᵀ come from one factorisation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sharpkit.curvature.linear_map import on_every_rank, random_rows
from sharpkit.curvature.memory import require_memory
from sharpkit.curvature.multiply import Multiply

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


class Sketch(NamedTuple):
    """One factorisation, rows as vectors: k of them in P dimensions."""

    omega: Tensor  # test vectors, (k, P)
    q: Tensor  # orthonormal, (k, P)
    z: Tensor  # A Q near 1, (k, P): each row times its power is the product
    z_powers: Array  # (k,)
    r: Array  # A Ω = Q R, (k, k)
    s: Array  # column i is orthogonal to all columns of R but the i-th, (k, k)


def sketch(multiply: Multiply, count: int, seed: int, kind: Literal["sign", "normal"]) -> Sketch:
    """The range of A that `count` random vectors find, and its product; 2 · count products."""
    a = multiply.operator
    on_every_rank(
        a,
        lambda: require_memory(
            5 * count * a.shape[0] * a.dtype.itemsize,
            a.device,
            f"{count} test vectors, their range and its products",
            "ask for fewer products",
        ),
    )
    omega = random_rows(count, a, seed, kind)
    if kind == "normal":
        omega = omega * (a.shape[0] ** 0.5 / omega.norm(dim=1, keepdim=True))
    y, powers = multiply.stacked(omega)
    q, r = torch.linalg.qr(y.T)
    del y
    near = r.double().cpu().numpy()
    z, z_powers = multiply.stacked(q.T)
    return Sketch(omega, q.T, z, z_powers, near * powers, _left_out(near))


def xtrace(multiply: Multiply, count: int, seed: int) -> tuple[float, float]:
    """XTrace of `count` test vectors and its standard error; 2 · count products.

    XTrace is the mean over i of tr_i = tr(Q_iᵀ A Q_i) + ν_iᵀ A ν_i, with ν_i the part of ω_i
    outside of Q_i at the length that a vector there has on average: on a sphere only its
    direction is random. The tr_i share most of Q, so their spread is too small an error where
    eigenvalues decay fast; this one is the jackknife's, from XTrace of all test vectors but one,
    which on average is never too small. All of it is algebra in the coordinates of Q.

    Source:
        Epperly, Tropp and Webber 2024, equations (2.3) and (2.5); Epperly and Tropp, "Efficient
        error and variance estimation for randomized matrix computations", SIAM J. Sci. Comput.
        2024, section 2, for the jackknife.
    """
    omega, q, z, z_powers, r, _ = sketch(multiply, count, seed, "normal")
    w = (q @ omega.T).double().cpu().numpy()  # coordinates of the test vectors
    lengths = torch.linalg.vector_norm(omega, dim=1, dtype=torch.float64).cpu().numpy()
    unit = float(z_powers.max())  # a power of two: no digit depends on the scale of A
    h, r = (q @ z.T).double().cpu().numpy() * (z_powers / unit), r / unit  # Qᵀ A Q, Qᵀ A Ω
    size = omega.shape[1]
    value = _xtrace(h, w, r, lengths, size)
    without = [
        _xtrace(h, w[:, rest], r[:, rest], lengths[rest], size)
        for rest in (np.delete(np.arange(count), i) for i in range(count))
    ]
    spread = float(np.var(without))
    return unit * value, unit * (spread * (count - 1)) ** 0.5


def _xtrace(h: Array, w: Array, r: Array, lengths: Array, size: int) -> float:
    """XTrace from Qᵀ A Q, Qᵀ Ω and Qᵀ A Ω, for a Q that may span more than A Ω."""
    count = r.shape[1]
    powers = np.abs(r).max(axis=0)
    u, near = np.linalg.qr(r / np.where(powers > 0, powers, 1.0))
    h, w, r, s = u.T @ h @ u, u.T @ w, u.T @ r, _left_out(near)
    x = w - s * (s * w).sum(axis=0)  # coordinates of the parts of Ω in Q_i
    inside = np.trace(h) - np.einsum("ji,jk,ki->i", s, h, s)
    forms = (w * r).sum(0) - 2 * (x * r).sum(0) + np.einsum("ji,jk,ki->i", x, h, x)
    left = lengths**2 - (x**2).sum(axis=0)
    return float((inside + forms * (size - count + 1) / left).mean())


def xdiag(multiply: Multiply, count: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """Mean and standard error of the k estimates of the diagonal, near 1, and their power.

    d_i = diag(Q_i Q_iᵀ A) + ω_i ∘ (I − Q_i Q_iᵀ) A ω_i for random signs ω_i; 2k products. For a
    flat spectrum what d_i and d_j share, a term in ω_i and ω_j, doubles the variance of their
    mean; where eigenvalues decay they share little. The error has that factor always: it is
    right for the one and up to √2 too large for the other.

    Source:
        Epperly, Tropp and Webber 2024, section 4.
    """
    omega, q, z, z_powers, r, s = sketch(multiply, count, seed, "sign")
    power = float(z_powers.max())
    z = z * torch.from_numpy(z_powers / power).to(z).unsqueeze(1)
    turn = torch.from_numpy(s.T.copy()).to(q)
    lost, image = turn @ q, turn @ z  # (k, P): the direction that Q_i lacks, and its product
    parts = torch.from_numpy((s * (r / power)).sum(axis=0)).to(q).unsqueeze(1)
    each = lost * (omega * parts - image)  # what estimate i adds to diag(Q Qᵀ A)
    mean = (q * z).sum(0) + each.mean(0)
    return mean, each.std(0, correction=1) * (2 / count) ** 0.5, power


def _left_out(r: Array) -> Array:
    """Columns of R⁻ᵀ, normalised; where R is singular, directions that Y does not have."""
    u, sigma, vt = np.linalg.svd(r)
    floor = np.finfo(np.float64).eps * float(sigma.max()) or 1.0
    s = u @ (vt / np.maximum(sigma, floor)[:, None])
    return np.asarray(s / np.linalg.norm(s, axis=0))
