"""Chunks of examples: what they gave when they were recorded first, and whether they still do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpkit.contract.checksum import checksum
from sharpkit.contract.examples import Examples
from sharpkit.curvature.second_derivatives import Product
from sharpkit.errors import DataError, ModelError


@dataclass(frozen=True)
class Linearised:
    """A chunk of examples, linearised at the weights: its loss, gradient and matrix."""

    mean: Tensor  # of the loss, scalar, detached
    weight: Tensor  # of the mean among those of other chunks, float64 scalar
    gradient: Sequence[Tensor | None]  # per parameter, None where it is not used
    product: Product


@dataclass
class Chunk:
    """What examples start to stop gave, and their product if its graph is kept."""

    start: int
    stop: int
    mean: float
    weight: float
    fingerprint: int
    product: Product | None


def recorded(start: int, stop: int, examples: Examples, linear: Linearised, keep: bool) -> Chunk:
    """A chunk of these examples.

    Raises:
        ModelError: If their loss is not finite.
    """
    mean = float(linear.mean)
    if not math.isfinite(mean):
        raise ModelError(
            f"the loss of examples {start} to {stop - 1} is {mean}: expected a finite number"
        )
    product = linear.product if keep else None
    return Chunk(start, stop, mean, float(linear.weight), checksum(examples), product)


def check_unchanged(chunk: Chunk, examples: Examples) -> None:
    """Raise DataError if a chunk's examples are others than when it was recorded first."""
    if checksum(examples) != chunk.fingerprint:
        raise DataError(
            f"examples {chunk.start} to {chunk.stop - 1} have changed since the operator was made: "
            "give it a copy of the data, or make a new operator"
        )


def check_repeated(chunk: Chunk, mean: Tensor) -> None:
    """Raise ModelError if a chunk's loss is another than when it was recorded first."""
    rounding = 1e3 * torch.finfo(mean.dtype).eps
    if not math.isclose(float(mean), chunk.mean, rel_tol=rounding, abs_tol=rounding):
        raise ModelError(
            f"at the same weights the loss of examples {chunk.start} to {chunk.stop - 1} is "
            f"{float(mean):.6g}, it was {chunk.mean:.6g}: the model computes something else than "
            "when the operator was made (its mode or its attributes have changed)"
        )
