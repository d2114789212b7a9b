"""Landscapes of models in files, from what a command line says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from sharpkit.device import check_device
from sharpkit.errors import ArgumentError
from sharpkit.landscapes import Barrier, Landscape, barrier, landscape
from sharpkit.landscapes.grid import Extent, Points
from sharpkit.runs.choosing import checkpoint_models


def landscape_of_files(
    models: Sequence[str],
    trajectory: Sequence[str],
    *,
    build: str | None,
    data: str | None,
    device: str,
    **options: Any,
) -> Landscape:
    """The landscape around the first model, or between all of them; see `sharpkit.landscape`.

    Args:
        models: Weight files, or runs of `sharpkit train`.
        trajectory: More of them, whose places are noted.
        build: "module:callable" that builds the model.
        data: An .npz file.
        device: Where it is computed.
        options: Of `landscape`.

    Raises:
        SharpkitError: As `checkpoint_models` and `landscape`.
    """
    check_device(device)
    (first, *others), train = _loaded(models, build, data, device)
    path = _loaded(trajectory, build, data, device)[0] if trajectory else None
    return landscape(first, train, to=others or None, trajectory=path, **options)


def barrier_of_files(
    models: Sequence[str], *, build: str | None, data: str | None, device: str, **options: Any
) -> Barrier:
    """The barrier between two models in files; the options are those of `sharpkit.barrier`."""
    check_device(device)
    (a, b), train = _loaded(models, build, data, device)
    return barrier(a, b, train, **options)


def _loaded(
    paths: Sequence[str], build: str | None, data: str | None, device: str
) -> tuple[list[nn.Module], Any]:
    if len(set(paths)) < len(paths):
        raise ArgumentError("a model is named twice: there is no line between a model and itself")
    loaders, train = checkpoint_models(paths, build, data)
    return [load().to(device) for load in loaders.values()], train


def points_of(numbers: Sequence[int] | None) -> Points | None:
    """Points along each axis, from one number or two.

    Example:
        >>> points_of([51]), points_of([51, 31])
        (51, (51, 31))
    """
    if numbers is None or len(numbers) == 1:
        return None if numbers is None else numbers[0]
    return tuple(numbers)  # type: ignore[return-value]


def extent_of(numbers: Sequence[float] | None) -> Extent | None:
    """Where the axes end, from one number, two for all axes, or two for each.

    Example:
        >>> extent_of([0.5]), extent_of([-1, 2]), extent_of([-1, 1, 0, 3])
        (0.5, (-1, 2), ((-1, 1), (0, 3)))
    """
    if numbers is None or len(numbers) == 1:
        return None if numbers is None else numbers[0]
    if len(numbers) == 2:
        return numbers[0], numbers[1]
    if len(numbers) != 4:
        raise ArgumentError(f"--extent has {len(numbers)} numbers: expected 1, 2 or 4")
    return (numbers[0], numbers[1]), (numbers[2], numbers[3])
