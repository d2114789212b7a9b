"""Input margins within the directions in which the training data vary."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from sharpkit.contract.examples import Examples
from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data
from sharpkit.errors import ArgumentError, DataError, ModelError
from sharpkit.measures.layer_margins import checked_margins
from sharpkit.measures.passes import Setup, images, setup


def constrained_margin(
    model: nn.Module, data: Data, *, variance: float = 0.9, steps: int = 10
) -> float:
    """The median distance of inputs from the decision boundary within the main directions of data.

        median over x of min ‖c‖₂  such that  the prediction at x + Pᵀ c differs from that at x

    The rows of P are the first principal components of the inputs, as many as explain `variance` of
    their variance. To first order the distance is γ / ‖P ∂γ/∂x‖₂ for the margin γ; this is iterated
    as in DeepFool, with the class that comes next at every point, and the step that crosses is
    shortened by bisection until it ends on the boundary: an upper bound of the minimum. An example
    for which none is found counts as infinitely far, which the median bears; misclassified ones
    are left out. Only the decision matters, not how the network is parametrised. Cost: `steps` G
    and some 20 F.

    Args:
        model: Any module whose examples do not influence each other, with outputs (n, classes).
        data: Inputs of shape (n, ...), real numbers, and labels of shape (n,).
        variance: Share of the variance of the inputs, greater than 0 and at most 1.
        steps: Steps towards the boundary.

    Returns:
        float: The median; larger is better.

    Raises:
        ArgumentError: For variance or steps out of range.
        DataError: For inputs that are tokens or dicts, or all the same.
        ModelError: For NaN or infinite outputs, if no example is classified correctly, or no
            boundary is found for half of them.

    Source:
        Mouton, Theunissen and Davel, AAAI 2024 (2308.15466), constrained margins: the
        search space, the first-order formula and the iteration; the number of components, which
        they take at an elbow of the explained variance, is set by `variance` here.

    Example:
        The data vary along the first axis only, so that the boundary 2 x + y = 0 is met along it:

        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.tensor([[2.0, 1.0], [-2.0, -1.0]])
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> round(constrained_margin(model, (x, torch.tensor([0, 1]))), 3)
        1.0
    """
    if not 0 < variance <= 1:
        raise ArgumentError(f"variance must be in (0, 1], got {variance}")
    if steps < 1:
        raise ArgumentError(f"steps must be at least 1, got {steps}")
    with frozen(model) as found:
        run = setup(model, data, found)
        basis = principal_components(images(run.examples, "the constrained margin"), variance)
        parts = [_distances(run, batch, basis, steps) for batch in run.batches()]
    distances = torch.cat(parts)
    if not len(distances):
        raise ModelError("no training example is classified correctly: there is no margin")
    middle = float(np.median(distances.numpy()))
    if not math.isfinite(middle):
        raise ModelError(
            f"the boundary was not found for half of the examples in {steps} steps along the "
            "components: try more steps, or more variance"
        )
    return middle


def principal_components(inputs: Tensor, variance: float) -> Tensor:
    """The fewest orthonormal directions (k, d) that explain a share of the variance, in float64.

    Example:
        >>> x = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0]])
        >>> principal_components(x, 0.9).abs().round()
        tensor([[1., 0.]], dtype=torch.float64)
    """
    rows = inputs.flatten(1).double()
    directions: Tensor
    _, sizes, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    share = sizes.square().cumsum(0)
    if not float(share[-1]) > 0:
        raise DataError("all inputs are the same: they have no directions")
    count = int((share < variance * (1 - 1e-9) * share[-1]).sum()) + 1
    return directions[:count]


def _distances(run: Setup, batch: Examples, basis: Tensor, steps: int) -> Tensor:
    """Distances of the examples of a batch that are classified correctly, float64 on the CPU."""
    inputs = batch.inputs
    assert isinstance(inputs, Tensor)
    basis = basis.to(inputs)

    def margin(c: Tensor) -> Tensor:
        logits = run.function({}, inputs + (c @ basis).view_as(inputs))
        return checked_margins(logits, batch.labels)

    c = inputs.new_zeros(len(inputs), len(basis))
    with torch.no_grad():
        right = margin(c) > 0
    inside, crossed = c, ~right
    for _ in range(steps):
        with torch.enable_grad():
            at = c.detach().requires_grad_()
            gamma = margin(at)
            (slope,) = torch.autograd.grad(gamma.sum(), at)
        square = slope.square().sum(1, keepdim=True).clamp_min(1e-30)
        move = -gamma.detach().unsqueeze(1) * slope / square
        for reach in (1.02, 2.0):  # beyond the linearised boundary, then further
            with torch.no_grad():
                over = (margin(c + reach * move) <= 0) & ~crossed
            # an example that has crossed stays where it first did
            inside = torch.where(over.unsqueeze(1), c, inside)
            c = torch.where(over.unsqueeze(1), c + reach * move, c)
            crossed = crossed | over
        c = torch.where(crossed.unsqueeze(1), c, c + move)
    low, high = torch.zeros_like(c[:, :1]), torch.ones_like(c[:, :1])
    with torch.no_grad():
        for _ in range(10):
            middle = (low + high) / 2
            past = (margin(inside + middle * (c - inside)) <= 0).unsqueeze(1)
            low, high = torch.where(past, low, middle), torch.where(past, middle, high)
    found = (inside + high * (c - inside)).double().norm(dim=1)
    return torch.where(crossed, found, torch.inf)[right].cpu()
