"""What the arguments of a landscape ask for: which subspace, and how much of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import Tensor, nn

from sharpkit.errors import ArgumentError
from sharpkit.landscapes.directions import (
    Normalise,
    component_subspace,
    eigenvector_subspace,
    model_subspace,
    random_subspace,
)
from sharpkit.landscapes.grid import around
from sharpkit.landscapes.measured import Opened
from sharpkit.landscapes.states import (
    State,
    Tensors,
    as_states,
    read_buffers,
    read_weights,
    require_same_integers,
)
from sharpkit.landscapes.subspace import Subspace, given_subspace

Kinds: TypeAlias = Literal["random", "eigenvectors", "trajectory"]
Directions: TypeAlias = "Kinds | Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None"

_POINTS = {1: 61, 2: 25}
_SEGMENT = 25  # points of each segment of a path
_EXTENT = {"random": 1.0, "eigenvectors": 0.5, "given": 1.0}
_LINE = (-0.25, 1.25)


@dataclass(frozen=True)
class Request:
    """What was asked for, after a check of all that needs no model.

    Attributes:
        kind: "random", "eigenvectors", "trajectory", "given" or "to".
        dimensions: 1 or 2.
        given: Directions of the user's own.
        others: Models that the axes go to.
        checkpoints: Of a trajectory; None without one.
        normalise: Of random directions.
        biases: Whether they move biases.
        norms: Whether they move normalisation layers.
        seed: Of random directions and of the eigenvalue solver.
    """

    kind: str
    dimensions: int
    given: Sequence[Mapping[str, Tensor]]
    others: Sequence[State]
    checkpoints: Sequence[State] | None
    normalise: Normalise
    biases: bool
    norms: bool
    seed: int

    @property
    def default_points(self) -> int:
        """Points along an axis."""
        if self.dimensions == 1 and len(self.others) > 1:
            return _SEGMENT * len(self.others) + 1
        return _POINTS[self.dimensions]

    def subspace(
        self,
        model: nn.Module,
        what: Opened,
        states: Sequence[Tensors],
        *,
        buffers: bool,
        progress: bool,
    ) -> Subspace:
        """The subspace, of a model that has been opened; `states` are the checkpoints' weights."""
        origin, axes = what.origin, self.dimensions
        if self.kind == "to":
            return between(what, self.others, axes, buffers=buffers)
        if self.kind == "random":
            return random_subspace(
                model, origin, axes, self.seed, self.normalise, self.biases, self.norms
            )
        if self.kind == "eigenvectors":
            return eigenvector_subspace(
                model, origin, what.examples, what.loss, axes, self.seed, progress
            )
        if self.kind == "trajectory":
            return component_subspace(origin, states, axes)
        return given_subspace(origin, self.given)

    def default_extent(
        self, subspace: Subspace, places: Sequence[tuple[float, ...]]
    ) -> list[tuple[float, float]]:
        """Where the axes end; `places` are those of the checkpoints."""
        if subspace.matrix is None:
            return [(0.0, float(len(subspace.basis)))]
        if self.kind == "to" and self.dimensions == 1:
            return [_LINE]
        if places or self.kind == "to":
            return around([(0.0,) * self.dimensions, *subspace.marks.values(), *places])
        return [(-_EXTENT[self.kind], _EXTENT[self.kind])] * self.dimensions


def read_request(
    directions: Directions,
    to: State | Iterable[State] | None,
    trajectory: Iterable[State] | None,
    dimensions: int | None,
    normalise: Normalise,
    biases: bool,
    norms: bool,
    seed: int,
) -> Request:
    """The request that these arguments make; ArgumentError if they exclude each other."""
    others = [] if to is None else as_states(to, "to")
    path = None if trajectory is None else as_states(trajectory, "trajectory")
    if normalise not in get_args(Normalise):
        raise ArgumentError(f'normalise must be "filter" or "layer", got {normalise!r}')
    kind, axes = _kind(directions, others, path, dimensions)
    given = _as_mappings(directions) if kind == "given" else []
    return Request(kind, axes, given, others, path, normalise, biases, norms, seed)


def _kind(
    directions: Directions,
    others: Sequence[State],
    path: Sequence[State] | None,
    dimensions: int | None,
) -> tuple[str, int]:
    """What the axes are made of, and how many there are."""
    if dimensions not in (None, 1, 2):
        raise ArgumentError(f"dimensions must be 1 or 2, got {dimensions!r}")
    if others:
        if directions is not None:
            raise ArgumentError("give either `to` or `directions`: both say where the axes go")
        if dimensions == 2 and len(others) != 2:
            raise ArgumentError(
                f"to: a plane goes through the model and two others, got {len(others)}; for a path "
                "through all of them ask for dimensions=1"
            )
        return "to", dimensions or (2 if len(others) == 2 else 1)
    if directions is None:
        directions = "random" if path is None else "trajectory"
    if not isinstance(directions, str):
        given = len(_as_mappings(directions))
        if dimensions not in (None, given):
            raise ArgumentError(f"directions: got {given}, expected {dimensions} as dimensions say")
        return "given", given
    if directions not in get_args(Kinds):
        raise ArgumentError(
            f"unknown directions {directions!r}: expected one of {', '.join(get_args(Kinds))}, or "
            "mappings of parameter names to tensors"
        )
    if directions == "trajectory" and path is None:
        raise ArgumentError('directions="trajectory" needs the checkpoints: pass trajectory=[...]')
    return directions, dimensions or 2


def _as_mappings(directions: Directions) -> list[Mapping[str, Tensor]]:
    items = [directions] if isinstance(directions, Mapping) else list(directions or ())
    for item in items:
        if not isinstance(item, Mapping):
            raise ArgumentError(
                f"directions: found {type(item).__name__}, expected mappings of parameter names to "
                "tensors"
            )
    return items  # type: ignore[return-value]


def weights_of(what: Opened, state: State, name: str) -> Tensors:
    """What moves, in another model."""
    return read_weights(state, what.function, what.origin, name)


def between(
    what: Opened,
    others: Sequence[State],
    dimensions: int,
    *,
    buffers: bool,
    called: str = "",
) -> Subspace:
    """The line, plane or path; with the means of running statistics if `buffers`.

    `called` is what a single other model is called in messages.
    """
    names = [called or f"model {k + 1} of `to`" for k in range(len(others))]
    weights = [weights_of(what, s, name) for s, name in zip(others, names, strict=True)]
    found: list[Tensors] = []
    if buffers:
        for state, name in zip(others, names, strict=True):
            require_same_integers(state, what.function, name)
        found = [read_buffers(what.function.model, what.function, "model")]
        found += [read_buffers(s, what.function, k) for s, k in zip(others, names, strict=True)]
        found = [] if not found[0] else [{k: t.clone() for k, t in f.items()} for f in found]
    return model_subspace(what.origin, weights, dimensions, found)
