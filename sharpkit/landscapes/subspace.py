"""Where the weights go: an origin, what is added to it, and how that was chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharpkit.errors import ArgumentError
from sharpkit.landscapes.states import Tensors

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Subspace:
    """Weights w + Σ_k c_k b_k, where the coefficients c follow from one or two coordinates.

    Attributes:
        origin: The model's own weights w.
        basis: Tensors b_k by name, as the origin.
        labels: What each axis is, for figures.
        norms: Length in weight space of one unit of each coordinate.
        text: How the axes were chosen, as a sentence.
        matrix: Coefficients from coordinates, shape (dimensions, K); None for a path, whose one
            coordinate runs from model to model.
        marks: Named points, such as other models, by their coordinates.
        buffers: Of the model and of those at the ends of b_k, where the points between have
            means of them; empty where all points have the model's.
        eigenvalues: Of the Hessian, along its eigenvectors.
        shares: Of a trajectory's variance, along its principal components.
    """

    origin: Tensors
    basis: list[Tensors]
    labels: tuple[str, ...]
    norms: tuple[float, ...]
    text: str
    matrix: Array | None
    marks: dict[str, tuple[float, ...]] = field(default_factory=dict)
    buffers: list[Tensors] = field(default_factory=list)
    eigenvalues: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()

    def coefficients(self, points: Array) -> Array:
        """Shape (n, K), of points by their coordinates, shape (n, dimensions)."""
        if self.matrix is not None:
            found: Array = points @ self.matrix
            return found
        corners = np.arange(1, len(self.basis) + 1)
        hats: Array = np.maximum(0.0, 1.0 - np.abs(points - corners))
        return hats

    def require_within(self, ends: Sequence[tuple[float, float]]) -> None:
        """Raise ArgumentError if these ends of the axes leave a path."""
        last = len(self.basis)
        if self.matrix is None and not 0 <= ends[0][0] < ends[0][1] <= last:
            raise ArgumentError(
                f"extent = {ends[0]}: a path through {last + 1} models runs from 0 to {last}"
            )

    def moving(self) -> list[str]:
        """The names of the parameters that are not the same everywhere."""
        return [name for name in self.origin if any(bool(b[name].any()) for b in self.basis)]

    def buffers_at(self, coefficients: Array) -> Tensors:
        """The mean of the buffers by barycentric coefficients, none of them taken below 0.

        Beyond the models a variance would otherwise become negative.
        """
        if not self.buffers:
            return {}
        shares = np.clip([1.0 - coefficients.sum(), *coefficients], 0.0, None)
        shares /= shares.sum()
        total = {name: float(shares[0]) * t for name, t in self.buffers[0].items()}
        for share, own in zip(shares[1:], self.buffers[1:], strict=True):
            for name in total:
                total[name] += float(share) * own[name]
        return total

    def project(self, weights: Tensors) -> tuple[tuple[float, ...], float]:
        """The coordinates of the nearest point in the plane (or line), and the distance to it."""
        if self.matrix is None:
            raise ArgumentError(
                "a trajectory has no place on a path through several models: give one model as "
                "`to`, or two for a plane"
            )
        offset = difference(weights, self.origin)
        gram = np.array([[inner(a, b) for b in self.basis] for a in self.basis])
        along = np.array([inner(b, offset) for b in self.basis])
        solved = np.linalg.solve(gram, along)
        left = inner(offset, offset) - float(along @ solved)
        coordinates = np.linalg.solve(self.matrix.T, solved)
        return tuple(float(x) for x in coordinates), max(left, 0.0) ** 0.5


def inner(a: Tensors, b: Tensors) -> float:
    """The inner product of two sets of tensors, summed in float64."""
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def length(a: Tensors) -> float:
    """The 2-norm of a set of tensors."""
    return math.sqrt(inner(a, a))


def difference(a: Tensors, b: Tensors) -> Tensors:
    """a − b, at least in float32."""
    return {name: working(t) - working(b[name]) for name, t in a.items()}


def working(tensor: Tensor) -> Tensor:
    """A tensor in the precision that points are computed in: float32 for halves, else its own."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def given_subspace(origin: Tensors, directions: Sequence[Mapping[str, Tensor]]) -> Subspace:
    """Along directions of the user's own: tensors by the names of the parameters they move.

    Raises:
        ArgumentError: If there are none or more than two, or one does not fit the model.
    """
    if not 1 <= len(directions) <= 2:
        raise ArgumentError(f"directions: got {len(directions)}, expected one or two")
    basis = [_own_direction(origin, d, k) for k, d in enumerate(directions)]
    norms = tuple(map(length, basis))
    if len(basis) == 2:
        require_apart(basis, "directions")
    return Subspace(
        origin,
        basis,
        tuple(f"direction {k + 1} (norm {norm:.3g})" for k, norm in enumerate(norms)),
        norms,
        "directions that were given",
        np.eye(len(basis)),
    )


def _own_direction(origin: Tensors, given: Mapping[str, Tensor], k: int) -> Tensors:
    unknown = [name for name in given if name not in origin]
    if unknown:
        raise ArgumentError(
            f"directions: {unknown[0]!r} is no parameter that moves; those are {', '.join(origin)}"
        )
    basis = {name: torch.zeros_like(working(w)) for name, w in origin.items()}
    for name, t in given.items():
        if not isinstance(t, Tensor) or t.shape != origin[name].shape:
            found = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ArgumentError(
                f"directions: {name!r} is {found}, expected a tensor of shape "
                f"{tuple(origin[name].shape)}"
            )
        basis[name] = t.detach().to(basis[name])
    if not 0 < length(basis) < float("inf"):
        raise ArgumentError(f"directions: the norm of direction {k + 1} is {length(basis)}")
    return basis


def require_apart(basis: Sequence[Tensors], what: str) -> None:
    """Raise ArgumentError unless two directions span a plane."""
    a, b = basis
    cosine = inner(a, b) / (length(a) * length(b))
    if 1.0 - abs(cosine) < 1e-10:
        raise ArgumentError(f"{what}: both lie on one line; ask for dimensions=1")


def cosine_of(basis: Sequence[Tensors]) -> float:
    """The cosine of the angle between two directions."""
    return inner(*basis) / (length(basis[0]) * length(basis[1]))
