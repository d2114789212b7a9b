"""Chunks of examples: what they gave when they were recorded first, and whether they still do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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


def recorded(start: int, stop: int, examples: Examples, product: Product | None) -> Chunk:
    """A chunk of these examples; its loss and weight are read later, with those of all others."""
    return Chunk(start, stop, math.nan, math.nan, checksum(examples), product)


def read_losses(chunks: Sequence[Chunk], linears: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Fill in means and weights, which are on the device: the host waits for them once.

    Raises:
        ModelError: If a loss is not finite.
    """
    for chunk, mean, weight in zip(chunks, *_read(zip(*linears, strict=True)), strict=True):
        chunk.mean, chunk.weight = mean, weight
        if not math.isfinite(mean):
            raise ModelError(
                f"the loss of examples {chunk.start} to {chunk.stop - 1} is {mean}: expected a "
                "finite number"
            )


def check_unchanged(chunk: Chunk, examples: Examples) -> None:
    """Raise DataError if a chunk's examples are others than when it was recorded first."""
    if checksum(examples) != chunk.fingerprint:
        raise DataError(
            f"examples {chunk.start} to {chunk.stop - 1} have changed since the operator was made: "
            "give it a copy of the data, or make a new operator"
        )


def check_repeated(chunks: Sequence[Chunk], means: Sequence[Tensor]) -> None:
    """Raise ModelError if a chunk's loss is another than when it was recorded first."""
    if not means:
        return
    rounding = 1e3 * torch.finfo(means[0].dtype).eps
    for chunk, mean in zip(chunks, *_read([means]), strict=True):
        if not math.isclose(mean, chunk.mean, rel_tol=rounding, abs_tol=rounding):
            raise ModelError(
                f"at the same weights the loss of examples {chunk.start} to {chunk.stop - 1} is "
                f"{mean:.6g}, it was {chunk.mean:.6g}: the model computes something else than "
                "when the operator was made (its mode or its attributes have changed)"
            )


def _read(columns: Iterable[Sequence[Tensor]]) -> list[list[float]]:
    """Scalars of a device, in one transfer."""
    found: list[list[float]] = torch.stack(
        [torch.stack([t.double() for t in column]) for column in columns]
    ).tolist()
    return found
