"""Sharpness by accuracy: how large a box around the weights keeps the training accuracy."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data, load_in_order
from sharpkit.contract.losses import cross_entropy
from sharpkit.contract.parameters import floating_parameters, select_parameters
from sharpkit.errors import ArgumentError
from sharpkit.measures.distance import squared_distance
from sharpkit.measures.pac_bayes import squared_norm, typical_weight
from sharpkit.measures.passes import Setup, setup
from sharpkit.measures.search import check_drop, size_of_drop


def sharpness_radius(
    model: nn.Module, data: Data, *, magnitude: bool = False, drop: float = 0.1, steps: int = 5
) -> float:
    """The size of the box around the weights whose worst point costs `drop` training accuracy.

        α with  A(w) − min A(w + u) = drop  over |u_i| ≤ α
        α with  the same                    over |u_i| ≤ α |w_i|   if magnitude

    The minimum is that over the iterates of projected sign-gradient ascent of the cross-entropy
    from w, step t of size α/√t: a fixed function of α, whose root is bracketed by factors of 4 and
    then found by Brent's method in log α, to 0.5 %. Cost: `steps` − 1 gradient passes and a forward
    pass per α, since all share the first gradient. About ten α are tried, so that 5 steps take some
    40 gradient and 10 forward passes.

    Args:
        model: Any module with outputs of shape (n, classes); all its parameters are perturbed.
        data: Inputs of shape (n, ...) and labels of shape (n,).
        magnitude: A box in proportion to each weight.
        drop: Fall in accuracy, between 0 and 1.
        steps: Steps of the ascent; 1 for the linearised loss (one gradient pass in all).

    Returns:
        float: α; larger means flatter.

    Raises:
        ArgumentError: For drop or steps out of range.
        DataError: For labels that do not fit the outputs.
        ModelError: For NaN or infinite weights or outputs, or if no box lowers the accuracy by
            `drop` (it is too low already, or the loss has no gradient).

    Source:
        Keskar et al., ICLR 2017, and Jiang et al., ICLR 2020 (1912.02178), whose search draws
        a random start at every step and adds a floor of 10⁻³ to the box in proportion, which on
        its own can cost a network of many weights its accuracy.

    Example:
        The worst point of the box moves both weights by α, and 1 − α < −1 + α beyond 1:

        >>> import torch
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> model.weight.data = torch.tensor([[1.0], [-1.0]])
        >>> round(sharpness_radius(model, (torch.ones(1, 1), torch.tensor([0]))), 2)
        1.0
    """
    check_drop(drop)
    if steps < 1:
        raise ArgumentError(f"steps must be at least 1, got {steps}")
    with frozen(model) as found:
        run = setup(model, data, found)
        weights = floating_parameters(model)
        clean = run.accuracy()
        first = _ascent_signs(run, weights)[0]

        def worst(alpha: float) -> float:
            box = {
                k: alpha * p.abs() if magnitude else torch.full_like(p, alpha)
                for k, p in weights.items()
            }
            return _worst_accuracy(run, weights, box, first, steps, clean)

        return size_of_drop(worst, clean, drop, 0.1 * (1 if magnitude else typical_weight(weights)))


def accuracy_sharpness(
    model: nn.Module, data: Data, *, initial: nn.Module, drop: float = 0.1, steps: int = 5
) -> dict[str, float]:
    """Sharpness bounds from the box around the weights that keeps the training accuracy.

    With ω parameters, n examples, and α, α' the plain and the magnitude-aware radius (see
    `sharpness_radius`):

        origin              ‖w‖² log(2ω) / 4α² + log(n / α) + 10
        initial             ‖w − w⁰‖² log(2ω) / 4α² + log(n / α) + 10
        flatness            1 / α²
        magnitude_flatness  1 / α'²

    The bound on the gap is √(value / n). Cost: that of two radii, some 80 gradient and 20 forward
    passes with 5 steps.

    Args:
        model: Any module with outputs of shape (n, classes).
        data: Inputs of shape (n, ...) and labels of shape (n,).
        initial: The same architecture before training.
        drop: Fall in accuracy that defines the radii.
        steps: Steps of the ascent.

    Returns:
        dict: "origin", "initial", "flatness" and "magnitude_flatness".

    Raises:
        ModelError: If the architectures differ, or a radius does not exist.
        DataError: For labels that do not fit the outputs.
        ArgumentError: For drop or steps out of range.

    Source:
        Jiang et al., ICLR 2020 (1912.02178), appendix C, the sharpness counterparts of the
        PAC-Bayes measures of equations 48, 49, 53 and 61. w is all parameters.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> model.weight.data = torch.tensor([[1.0], [-1.0]])
        >>> data = torch.ones(1, 1), torch.tensor([0])
        >>> found = accuracy_sharpness(model, data, initial=torch.nn.Linear(1, 2, bias=False))
        >>> round(found["flatness"], 1)
        1.0
    """
    moved = squared_distance(model, initial)
    alpha = sharpness_radius(model, data, drop=drop, steps=steps)
    relative = sharpness_radius(model, data, magnitude=True, drop=drop, steps=steps)
    weights = select_parameters(model)
    n = len(load_in_order(data))
    scale = math.log(2 * sum(p.numel() for p in weights.values())) / (4 * alpha**2)
    rest = math.log(n / alpha) + 10
    return {
        "origin": squared_norm(weights) * scale + rest,
        "initial": moved * scale + rest,
        "flatness": alpha**-2,
        "magnitude_flatness": relative**-2,
    }


def _worst_accuracy(
    run: Setup,
    weights: dict[str, Tensor],
    box: dict[str, Tensor],
    first: dict[str, Tensor],
    steps: int,
    clean: float,
) -> float:
    """The least accuracy among the iterates of projected sign-gradient ascent in a box."""
    least, signs = clean, first
    u = {k: torch.zeros_like(p) for k, p in weights.items()}
    for step in range(1, steps + 1):
        u = {k: torch.clamp(u[k] + box[k] * signs[k] / step**0.5, -box[k], box[k]) for k in u}
        at = {k: p + u[k] for k, p in weights.items()}
        if step == steps:
            return min(least, run.accuracy(at))
        signs, accuracy = _ascent_signs(run, at)
        least = min(least, accuracy)
    return least


def _ascent_signs(run: Setup, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """Signs of the gradient of the total loss, 0 where it is not finite, and the accuracy."""
    leaves = {k: p.detach().requires_grad_() for k, p in weights.items()}
    total = {k: torch.zeros_like(p) for k, p in weights.items()}
    right = 0
    for batch in run.batches():
        with torch.enable_grad():
            outputs = run.function(leaves, batch.inputs)
            loss = cross_entropy(outputs, batch.labels) * len(batch)
            parts = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for name, part in zip(leaves, parts, strict=True):
            if part is not None:
                total[name] += part
        right += int((outputs.argmax(1) == batch.labels).sum())
    signs = {k: torch.nan_to_num(g).sign() for k, g in total.items()}
    return signs, right / len(run.examples)
