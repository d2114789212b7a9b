"""The loss landscape: the public function."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import nn

from sharpkit.contract.loading import Data
from sharpkit.contract.losses import Loss
from sharpkit.contract.parameters import Parameters, left_out
from sharpkit.contract.precision import current_precision
from sharpkit.errors import ModelError
from sharpkit.groupwise.fallback import Engine
from sharpkit.landscapes.batch_norm import layers_with_statistics
from sharpkit.landscapes.directions import Normalise
from sharpkit.landscapes.grid import Extent, Points, axis, read_extent, read_points
from sharpkit.landscapes.measured import BatchNorm, How, Opened, evaluate, opened
from sharpkit.landscapes.passes import Terms
from sharpkit.landscapes.request import Directions, read_request, weights_of
from sharpkit.landscapes.result import AXES, Landscape, grid_points
from sharpkit.landscapes.states import State
from sharpkit.landscapes.subspace import Subspace
from sharpkit.measures.passes import weighted_mean

if TYPE_CHECKING:
    import pandas as pd


def landscape(
    model: nn.Module,
    data: Data,
    *,
    directions: Directions = None,
    to: State | Iterable[State] | None = None,
    trajectory: Iterable[State] | None = None,
    dimensions: Literal[1, 2] | None = None,
    points: Points | None = None,
    extent: Extent | None = None,
    normalise: Normalise = "filter",
    biases: bool = False,
    norms: bool = False,
    loss: Loss = "cross_entropy",
    n: int | None = None,
    seed: int = 0,
    parameters: Parameters = None,
    batch_norm: BatchNorm = "stored",
    chunk: int | Literal["auto"] = "auto",
    engine: Engine = "auto",
    progress: bool = True,
) -> Landscape:
    """The loss and accuracy on a line or plane of weights, around a model or between models.

    At the points x, y of a grid, with directions d and e in the space of all weights,

        L(x, y) = 1/n Σ_i ℓ(f(·; w + x d + y e), example i).

    Random directions are Gaussian, and each filter d_f is scaled to the model's own,
    d_f ← d_f ‖w_f‖ / ‖d_f‖, so that a network and the same function with rescaled ReLU layers have
    one picture. A filter is all that leads to one output unit: a row of a linear layer, a kernel of
    a convolution (of a transposed one over the inputs of its group), the vector of a token; in a
    layer of your own, what its first axis counts. The model is evaluated in eval mode, in full
    precision, and left exactly as found. A point costs one forward pass over the examples.

    A plane shows two of many directions: what looks convex there need not be, and pictures of two
    models have no common scale but through these norms.

    Args:
        model: Any module, as for `m_sharpness`.
        data: As for `m_sharpness`; the same examples at every point.
        directions: "random"; "eigenvectors", of the Hessian's largest eigenvalues, of norm 1;
            "trajectory", the principal components of the checkpoints in `trajectory`, of norm 1; or
            one or two mappings of parameter names to tensors. None for the trajectory's if it is
            given, else random ones.
        to: Another model or state dict: the line from the model (t = 0) to it (t = 1). Two: the
            plane through all three, or with dimensions=1 the path from one to the next, as for
            more. It takes the place of `directions`.
        trajectory: Checkpoints (models or state dicts) whose places, and distances from the plane,
            are noted.
        dimensions: 1 or 2; None for 2, and for a line where `to` is one model.
        points: Along each axis; None for 61 on a line, 25 x 25 in a plane (26 per segment of a
            path).
        extent: Where the axes end: e for (−e, e), a pair, or a pair for each axis; None for 1 along
            random directions, 0.5 along eigenvectors, (−0.25, 1.25) on a line to a model, and a box
            around the trajectory or the models of a plane.
        normalise: Of random directions: "filter", or "layer" to scale each weight as a whole.
        biases: Whether random directions move biases, each vector scaled as one filter.
        norms: The same for the parameters of normalisation layers.
        loss: As for `m_sharpness`.
        n: Number of examples; None for all.
        seed: Of the random directions, of the choice of n examples, of the eigenvalue solver. Draws
            do not depend on device, chunk or engine.
        parameters: What may move: names, glob patterns or modules; None for those that require
            gradients (all if none does), with `to` for all.
        batch_norm: "stored": running statistics as they are, and between models their means by the
            same coefficients (beyond the models, by the nearest ones that are not negative).
            "recomputed": at each point the means over batches of at most 256 of the examples, at
            the cost of a second pass.
        chunk: Examples at a time; the loss changes by rounding only.
        engine: "loop", one point after the other; "vectorized", several side by side; "auto" takes
            the second on a GPU that the examples of one point do not fill.
        progress: Show a bar if it takes longer than two seconds.

    Returns:
        Landscape: loss, std_error and accuracy on the grid; `.description`, `.frame()`, `.plot()`.

    Raises:
        ArgumentError: For an argument out of range, or arguments that exclude each other.
        DataError: As `m_sharpness`.
        ModelError: As `m_sharpness`; if another model has other layers; or if the loss is finite at
            no point. Single points that are not finite stay, as inf or NaN.

    Source:
        Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, sections 4 and 7
        (filter normalisation, trajectories); Goodfellow et al., ICLR 2015 (lines between models);
        Garipov et al., NeurIPS 2018 (planes through three).

    Example:
        A loss that is quadratic in the weights, on the line from w = 0 to w = 2:

        >>> import torch
        >>> def linear(w):
        ...     model = nn.Linear(1, 1, bias=False)
        ...     model.weight.data = torch.tensor([[w]])
        ...     return model
        >>> found = landscape(linear(0.0), (torch.ones(1, 1), torch.zeros(1, 1)), loss="mse",
        ...                   to=linear(2.0), points=3, extent=(0, 1))
        >>> found.loss  # w² / 2
        array([0. , 0.5, 2. ])
    """
    began = time.perf_counter()
    how = How(batch_norm, chunk, engine, progress)
    how.check(model)
    request = read_request(directions, to, trajectory, dimensions, normalise, biases, norms, seed)
    axes = request.dimensions
    counts = read_points(points, axes, request.default_points)
    ends = read_extent(extent, axes)
    whole = parameters is None
    path = request.checkpoints
    with opened(
        model, data, loss, n, seed, "*" if request.others and whole else parameters
    ) as what:
        states = [weights_of(what, s, f"checkpoint {k}") for k, s in enumerate(path or [])]
        subspace = request.subspace(model, what, states, buffers=whole, progress=progress)
        places = [subspace.project(state) for state in states]
        ends = ends or request.default_extent(subspace, [place for place, _ in places])
        subspace.require_within(ends)
        coordinates = tuple(
            axis(low, high, count, subspace.marks, k)
            for k, ((low, high), count) in enumerate(zip(ends, counts, strict=True))
        )
        coefficients = subspace.coefficients(grid_points(coordinates))
        found, used = evaluate(what, subspace, coefficients, how, summary)
        moved = subspace.moving()
        outside = left_out(model, moved)
        count = len(what.examples)
    table = np.array(found, dtype=np.float64)  # (points, 3)
    if not np.isfinite(table[:, 0]).any():
        raise ModelError("the loss is finite at no point of the grid: take a smaller extent")
    shape = tuple(len(values) for values in coordinates)
    values, errors, rights = (table[:, k].reshape(shape) for k in range(3))
    return Landscape(
        coordinates=coordinates,
        loss=values,
        std_error=errors,
        accuracy=None if np.isnan(rights).all() else rights,
        labels=subspace.labels,
        norms=subspace.norms,
        eigenvalues=subspace.eigenvalues,
        variance_shares=subspace.shares,
        marks=subspace.marks or {"model": (0.0,) * axes},
        trajectory=_trajectory(places, axes) if path is not None else None,
        description=_described(subspace, what, batch_norm, count, seed, outside, moved),
        n=count,
        parameters=_entries(what, moved),
        left_out=outside,
        engine=used,
        precision=current_precision(),
        seconds=time.perf_counter() - began,
    )


def summary(terms: Terms) -> tuple[float, float, float]:
    """Mean loss, its standard error, and accuracy (NaN where it has no meaning)."""
    loss = weighted_mean(terms.sums, terms.weights)
    right = float("nan") if terms.right is None else float(terms.right.nanmean())
    return loss.value, loss.std_error, right


def _trajectory(places: Sequence[tuple[tuple[float, ...], float]], dimensions: int) -> pd.DataFrame:
    import pandas as pd

    rows = [
        {"step": k, **dict(zip(AXES, place, strict=False)), "distance": distance}
        for k, (place, distance) in enumerate(places)
    ]
    return pd.DataFrame(rows, columns=["step", *AXES[:dimensions], "distance"])


def _described(
    subspace: Subspace,
    what: Opened,
    batch_norm: str,
    count: int,
    seed: int,
    outside: Sequence[str],
    moved: Sequence[str],
) -> str:
    """How this was drawn."""
    given = what.loss.given
    name = given if isinstance(given, str) else getattr(given, "__name__", type(given).__name__)
    one = "norm of one unit " + ", ".join(f"{v:.4g}" for v in subspace.norms)
    parts = [
        subspace.text,
        f"{_entries(what, moved)} parameters move"
        + (f", {len(outside)} tensors do not" if outside else ""),
        f"loss {name} over {count} examples (seed {seed}), eval mode",
    ]
    if not any(np.isnan(subspace.norms)):
        parts.insert(1, one)
    if layers_with_statistics(what.function.model):
        parts.append(
            "BatchNorm statistics recomputed at each point"
            if batch_norm == "recomputed"
            else "BatchNorm statistics stored"
            + (", between models their means" if subspace.buffers else ", those of the model")
        )
    return "; ".join(parts)


def _entries(what: Opened, names: Sequence[str]) -> int:
    return sum(what.origin[name].numel() for name in names)
