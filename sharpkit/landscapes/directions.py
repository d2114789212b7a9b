"""The directions of the field: random ones with filter normalisation, eigenvectors, components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from sharpkit.contract.examples import Examples
from sharpkit.contract.loading import as_data
from sharpkit.contract.losses import MeanLoss
from sharpkit.curvature.eigenvalues import top_eigenvalues
from sharpkit.curvature.hessian import HessianOperator
from sharpkit.errors import ArgumentError
from sharpkit.landscapes.filters import Role, roles, unit_norms
from sharpkit.landscapes.states import Tensors
from sharpkit.landscapes.subspace import (
    Subspace,
    cosine_of,
    difference,
    inner,
    length,
    require_apart,
    working,
)

Normalise: TypeAlias = Literal["filter", "layer"]


def random_subspace(
    model: nn.Module,
    origin: Tensors,
    dimensions: int,
    seed: int,
    normalise: Normalise,
    biases: bool,
    norms: bool,
) -> Subspace:
    """Gaussian directions whose filters (or layers) are as long as the model's own.

    Raises:
        ArgumentError: If no parameter moves.
    """
    known = roles(model)
    moving = {"filters"} | ({"bias"} if biases else set()) | ({"norm"} if norms else set())
    generator = torch.Generator().manual_seed(seed)
    basis = [
        _random_direction(origin, known, normalise, moving, generator) for _ in range(dimensions)
    ]
    lengths = tuple(map(length, basis))
    if not all(lengths):
        raise ArgumentError(
            "no parameter moves: all are biases or of normalisation layers, or 0; pass "
            "biases=True or norms=True"
        )
    held = [
        name for name, moves in (("biases", biases), ("normalisation layers", norms)) if not moves
    ]
    text = (
        f"random directions (seed {seed}), each {normalise} as long as the model's own"
        + (f"; {' and '.join(held)} do not move" if held else "")
        + (f"; cosine between them {cosine_of(basis):.2g}" if dimensions == 2 else "")
    )
    labels = tuple(f"random direction {k + 1}" for k in range(dimensions))
    return Subspace(origin, basis, labels, lengths, text, np.eye(dimensions))


def _random_direction(
    origin: Tensors,
    known: Mapping[str, Role],
    normalise: Normalise,
    moving: set[str],
    generator: torch.Generator,
) -> Tensors:
    """Drawn on the CPU in float64, in the order of the parameters, also of those that stay."""
    direction = {}
    for name, w in origin.items():
        drawn = torch.randn(w.shape, generator=generator, dtype=torch.float64)
        if known[name].kind not in moving:
            direction[name] = torch.zeros_like(working(w))
            continue
        role = known[name] if normalise == "filter" else Role("bias")  # the whole tensor
        own = w.detach().cpu()
        direction[name] = (drawn * (unit_norms(own, role) / unit_norms(drawn, role))).to(working(w))
    return direction


def eigenvector_subspace(
    model: nn.Module,
    origin: Tensors,
    examples: Examples,
    loss: MeanLoss,
    dimensions: int,
    seed: int,
    progress: bool,
) -> Subspace:
    """The eigenvectors of the largest eigenvalues of the Hessian of the loss, of norm 1."""
    operator = HessianOperator(
        model, as_data(examples), loss=loss, parameters=list(origin), seed=None, progress=progress
    )
    with operator:
        top = top_eigenvalues(operator, dimensions, seed=seed, progress=progress)
        basis = [_same_sign(operator.split(top.vectors[:, k])) for k in range(dimensions)]
    values = tuple(float(v) for v in top.values)
    shown = " and ".join(f"{v:.4g}" for v in values)
    return Subspace(
        origin,
        basis,
        tuple(f"eigenvector {k + 1} (λ = {v:.3g})" for k, v in enumerate(values)),
        tuple(map(length, basis)),
        f"eigenvectors of the Hessian of this loss; of norm 1, eigenvalues {shown} (residuals up "
        f"to {top.residual_norms.max():.1g})",
        np.eye(dimensions),
        eigenvalues=values,
    )


def component_subspace(origin: Tensors, states: Sequence[Tensors], dimensions: int) -> Subspace:
    """The principal components of checkpoints, of norm 1, through the model's weights.

    The k x k matrix of inner products of the centred checkpoints has the same singular values.

    Raises:
        ArgumentError: If the checkpoints span fewer dimensions.
    """
    count = len(states)
    gram = np.zeros((count, count))
    for name in origin:
        rows = _centred([state[name] for state in states])
        gram += (rows @ rows.T).cpu().numpy()
    values, vectors = np.linalg.eigh(gram)
    values, vectors = np.clip(values[::-1], 0.0, None), vectors[:, ::-1]
    if count < dimensions + 1 or not values[dimensions - 1] > 1e-12 * values[0]:
        raise ArgumentError(
            f"the {count} checkpoints of the trajectory span fewer than {dimensions} dimensions: "
            f"give more, or ask for {'dimensions=1' if dimensions == 2 else 'another direction'}"
        )
    basis = [dict[str, Tensor]() for _ in range(dimensions)]
    for name, w in origin.items():
        rows = _centred([state[name] for state in states])
        for k in range(dimensions):
            turn = torch.from_numpy(vectors[:, k] / values[k] ** 0.5).to(rows.device)
            basis[k][name] = (turn @ rows).view(w.shape).to(working(w))
    basis = [_same_sign(b) for b in basis]
    shares = tuple(float(v) for v in values[:dimensions] / values.sum())
    shown = " and ".join(f"{100 * s:.1f} %" for s in shares)
    return Subspace(
        origin,
        basis,
        tuple(f"component {k + 1} ({100 * s:.1f} % of variance)" for k, s in enumerate(shares)),
        tuple(map(length, basis)),
        f"principal components of {count} checkpoints; of norm 1, through the model's weights; "
        f"share of the checkpoints' variance {shown}",
        np.eye(dimensions),
        shares=shares,
    )


def model_subspace(
    origin: Tensors, others: Sequence[Tensors], dimensions: int, buffers: list[Tensors]
) -> Subspace:
    """The line to another model, the plane through two others, or a path through all of them.

    In a plane the coordinates are distances: x towards the first model, y across.
    """
    basis = [difference(other, origin) for other in others]
    lengths = [length(b) for b in basis]
    for k, norm in enumerate(lengths):
        if norm == 0.0:
            raise ArgumentError(
                f"the {'other model' if len(others) == 1 else f'model {k + 1} of `to`'} has the "
                "same weights as the model: there is no line between them"
            )
    names = [
        "model",
        *(f"other {k + 1}" if len(others) > 1 else "other" for k in range(len(others))),
    ]
    options: dict[str, Any] = {"origin": origin, "basis": basis, "buffers": buffers}
    if dimensions == 2:
        require_apart(basis, "to")
        a, b = basis
        x = inner(a, b) / lengths[0]
        y = length({n: t - x / lengths[0] * working(a[n]) for n, t in b.items()})
        corners = np.array([[lengths[0], 0.0], [x, y]])  # of both models, by their coordinates
        return Subspace(
            **options,
            labels=("distance towards other 1", "distance across"),
            norms=(1.0, 1.0),
            text="the plane through three models; coordinates are distances in weight space",
            matrix=np.linalg.inv(corners),
            marks=dict(zip(names, [(0.0, 0.0), *map(tuple, corners.tolist())], strict=True)),
        )
    steps = [
        lengths[0],
        *(length(difference(c, b)) for b, c in pairwise(others)),
    ]
    shown = ", ".join(f"{step:.4g}" for step in steps)
    line = len(others) == 1
    return Subspace(
        **options,
        labels=("t (0 = model, 1 = other)" if line else "t, from model to model",),
        norms=(lengths[0],) if line else (float("nan"),),
        text=f"the line between two models, {shown} apart"
        if line
        else f"the path through {len(others) + 1} models, which are {shown} apart",
        matrix=np.eye(1) if line else None,
        marks={name: (float(k),) for k, name in enumerate(names)},
    )


def _centred(tensors: Sequence[Tensor]) -> Tensor:
    rows = torch.stack([t.double().flatten() for t in tensors])  # (checkpoints, entries)
    return rows - rows.mean(0)


def _same_sign(direction: Tensors) -> Tensors:
    """The direction or its negative, such that its largest entry is positive."""
    tops = [t.flatten()[t.abs().argmax()] for t in direction.values() if t.numel()]
    top = max((float(t) for t in tops), key=abs)
    return direction if top > 0 else {name: -t for name, t in direction.items()}
