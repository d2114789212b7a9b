"""Products of curvature matrices by central differences, with an estimate of their error.

For a function F of the weights (the gradient, or the outputs), D(h) = [F(w + hv) − F(w − hv)] / 2h
is its derivative along v but for h² F''' / 6 and for rounding, σ / h, if F has an error of σ. Their
sum is least at the step

    h* = (3 σ / ‖F'''‖)^(1/3),

which for σ = ε‖F‖ and an F that changes over distances of the size of the weights is ε^(1/3) of the
weights: 0.005 in float32, 6e-6 in float64. There it begins. Of two steps, h and 2h, Richardson's
R = D(h) + [D(h) − D(2h)] / 3 has no h² either, and both bring along what is needed to judge it:

    E² = ‖0.3 Δ⁴F / h‖² + ‖1.2 [D(h) − D(2h)]‖².

The fourth difference Δ⁴F = F(2h) − 4F(h) + 6F(0) − 4F(−h) + F(−2h) is √70 σ where each of its terms
is off by σ, and R then by 0.95 σ / h. A jump J of F between 0 and h makes it 3J, and R is off by
0.58 J / h. A kink of F at τh, a jump K of its slope, makes it (3τ − 2) K h, the second term τK / 4,
and R is off by (0.5 − 0.58 τ) K. The factors are such that E is more than that. For a smooth F both
terms are far more than what is left in R, of order h⁴.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from sharpkit.errors import ArgumentError, ModelError

Tensors: TypeAlias = Sequence[Tensor]
# step -> the product, and both terms of the estimate of its error
Attempt: TypeAlias = Callable[[float], Sequence[Tensors]]

STEPS = (-2.0, -1.0, 1.0, 2.0)  # where F is computed, in units of the step
TOLERANCES = {torch.float32: 1e-2, torch.float64: 1e-6}  # relative errors
_FACTOR = 8.0  # between the steps that are tried
_TRIES = 5  # steps at most, with the first, before larger ones
_FARTHEST = 0.05  # how far a step may move the weights, of their size
_SPIKE = 10.0  # the largest entry of a vector may be so many times the mean one
_LEAST = 0.1  # of the largest scale of weights: zero biases have none of their own


@dataclass(frozen=True)
class Difference:
    """A product by differences.

    Attributes:
        product: One tensor per parameter.
        error: The estimate of the norm of its error.
        relative: The same relative to the norm of the product, or to that of a random vector as
            long, if that is more.
        step: The step h.
    """

    product: Tensors
    error: float
    relative: float
    step: float


@dataclass
class Differences:
    """Products of an operator by differences, and how good they were.

    Attributes:
        weights: One tensor per parameter.
        tolerance: Relative error that a product may have.
        scale: ‖A u‖ of a random unit vector u; 0 before it is known.
        errors: The estimated errors of the last products.
        largest: The largest error so far of the product with a unit vector.
    """

    weights: Tensors
    tolerance: float
    scale: float = 0.0
    errors: tuple[float, ...] = ()
    largest: float = 0.0

    def add(
        self,
        attempt: Callable[[Tensors, float], Sequence[Tensors]],
        vectors: Sequence[Tensors],
        totals: Sequence[Tensors],
    ) -> None:
        """Add the product with each vector to its total, in place."""
        errors = []
        for vector, total in zip(vectors, totals, strict=True):
            found = within_tolerance(
                partial(attempt, vector), self.weights, vector, self.tolerance, self.scale
            )
            torch._foreach_add_(list(total), list(found.product))
            errors.append(found.error)
            if found.error:
                self.largest = max(self.largest, found.error / float(norm_of(vector)))
        self.errors = tuple(errors)


def probe(size: int) -> Tensor:
    """A seeded random unit vector of shape (P,), in float64.

    Example:
        >>> round(float(probe(9).norm()), 6)
        1.0
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(size, generator=generator, dtype=torch.float64)
    unit: Tensor = drawn / drawn.norm()
    return unit


def first_step(weights: Tensors, vector: Tensors) -> float:
    """The step h at which h·v moves the weights by ε^(1/3) of their size.

    The size is that of each parameter tensor, root mean square, and the largest ratio counts. 0 for
    a vector of zeros.

    Raises:
        ArgumentError: If the vector is NaN or infinite.

    Example:
        >>> w, v = torch.ones(4, dtype=torch.float64), torch.full((4,), 2.0, dtype=torch.float64)
        >>> f"{first_step([w], [v]):.1e}"
        '3.0e-06'
    """
    filled = [(w, v) for w, v in zip(weights, vector, strict=True) if w.numel()]
    given, along = (list(tensors) for tensors in zip(*filled, strict=True))
    roots = [math.sqrt(w.numel()) for w in given]
    sizes, moves, peaks = torch.stack(
        [
            torch.stack(torch._foreach_norm(tensors, order, dtype=torch.float64))
            for tensors, order in ((given, 2), (along, 2), (along, math.inf))
        ]
    ).tolist()
    rms = [size / root for size, root in zip(sizes, roots, strict=True)]
    least = max(_LEAST * max(rms), 1e-3)
    ratio = max(
        max(move / root, peak / _SPIKE) / max(size, least)
        for move, peak, root, size in zip(moves, peaks, roots, rms, strict=True)
    )
    if not math.isfinite(ratio):
        raise ArgumentError("the vector has NaN or infinite entries: expected finite numbers")
    return _relative_step(weights[0].dtype) / ratio if ratio else 0.0


def extrapolated(
    values: Sequence[Tensors], centre: Tensors, step: float
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Derivatives R, and the two terms of E, the estimate of their error.

    Args:
        values: F at `STEPS`, in units of the step, as tensors of any shapes.
        centre: F at 0.
        step: The step h.

    Returns:
        R, 0.3 Δ⁴F / h and 1.2 [D(h) − D(2h)], each as tensors of the shapes given.

    Source:
        Nocedal and Wright, "Numerical Optimization", 2006, section 8.1, for the central difference
        and its step; Richardson 1911 for the extrapolation.

    Example:
        >>> f = lambda h: [torch.tensor([math.exp(h)], dtype=torch.float64)]
        >>> [r], *terms = extrapolated([f(0.01 * s) for s in STEPS], f(0), 0.01)
        >>> f"{r.item():.9f}, off by {math.hypot(*(t[0].item() for t in terms)):.0e} at most"
        '1.000000000, off by 6e-05 at most'
    """
    sub, add, mul = torch._foreach_sub, torch._foreach_add, torch._foreach_mul
    below2, below, above, above2 = (list(v) for v in values)
    near = mul(sub(above, below), 1 / (2 * step))
    change = sub(near, mul(sub(above2, below2), 1 / (4 * step)))
    derivative = add(near, change, alpha=1 / 3)
    # differences of neighbours first: they are exact
    middle = list(centre)
    outer = sub(sub(above2, above), sub(below, below2))
    fourth = sub(outer, mul(sub(sub(above, middle), sub(middle, below)), 3.0))
    return list(derivative), list(mul(fourth, 0.3 / step)), list(mul(change, 1.2))


def moved(weights: Tensors, vector: Tensors, step: float) -> list[Tensor]:
    """The weights plus `step` times the vector, as new tensors."""
    return list(torch._foreach_add([w.detach() for w in weights], list(vector), alpha=step))


def within_tolerance(
    attempt: Attempt, weights: Tensors, vector: Tensors, tolerance: float, scale: float
) -> Difference:
    """The product of one vector, at the first step where the estimate is below the tolerance.

    The error may be `tolerance` times the norm of the product, or times `scale` ‖v‖, if that is
    more. Steps shrink by 8 until kinks are outside, and if that does not help, grow over rounding.

    Args:
        attempt: The product and both terms of E for a step.
        weights: One tensor per parameter.
        vector: One tensor per parameter.
        tolerance: Relative error allowed.
        scale: The norm ‖A u‖ for a random unit vector u.

    Raises:
        ModelError: If no step is good enough, with the least estimate.
    """
    start = first_step(weights, vector)
    if not start:
        return Difference([torch.zeros_like(v) for v in vector], 0.0, 0.0, 0.0)
    judged = partial(_judged, attempt, weights, vector, scale)
    larger = int(math.log(_FARTHEST / _relative_step(weights[0].dtype), _FACTOR))
    smaller = [start / _FACTOR**i for i in range(_TRIES)]
    best = Difference([], math.inf, math.inf, start)
    for step in (*smaller, *(start * _FACTOR**i for i in range(1, larger + 1))):
        found = judged(step)
        if found.relative <= tolerance:
            return found
        best = min(best, found, key=lambda d: d.relative)
    raise ModelError(
        "the product by finite differences is uncertain: its error is estimated as "
        f"{best.relative:.2g} of its norm, at a step of {best.step:.2g}, and the tolerance is "
        f"{tolerance:.2g} (rounding, or kinks as of ReLU within the step): measure "
        "model.double(), pass a larger tolerance, or take exact products (method='exact') where "
        "the model has them"
    )


def _judged(
    attempt: Attempt, weights: Tensors, vector: Tensors, scale: float, step: float
) -> Difference:
    product, *terms = attempt(step)
    # what rounding takes from h·v, or adds to it, is a part of the vector that is not multiplied
    lost = torch._foreach_sub(moved(weights, vector, step), moved(weights, vector, -step))
    lost = torch._foreach_sub(torch._foreach_mul(lost, 0.5 / step), list(vector))
    norms = torch.stack([norm_of(t) for t in (product, *terms, lost, vector)])
    norm, fourth, change, part, length = norms.tolist()
    reach = max(norm, scale * length)
    error = math.hypot(fourth, change, part / length * reach)
    if not (math.isfinite(norm) and math.isfinite(error)):
        return Difference(product, math.inf, math.inf, step)
    return Difference(product, error, error / reach if error else 0.0, step)


def _relative_step(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps ** (1 / 3))


def norm_of(tensors: Tensors) -> Tensor:
    """The norm of all tensors together, a float64 scalar on their device."""
    norms = torch._foreach_norm(list(tensors), dtype=torch.float64)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm
