"""Margins at layers: how far a representation is from the decision boundary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sharpkit.contract.examples import Examples
from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data
from sharpkit.contract.losses import check_class_labels
from sharpkit.contract.parameters import floating_parameters
from sharpkit.errors import DataError, ModelError
from sharpkit.measures.margins import check_percentile, margins
from sharpkit.measures.passes import Setup, setup
from sharpkit.measures.weight_layers import calls_of, product_layers


def hidden_layer_margin(model: nn.Module, data: Data, *, percentile: float = 10.0) -> float:
    """The normalised margins of the training examples at every layer, averaged over layers.

        mean over layers l of the 10th percentile over i of  γ_i / (‖∂γ_i / ∂x_i^l‖₂ √ν_l)

    x_i^l is what layer l, a linear or convolutional one, receives for example i (the input itself
    for l = 0), γ_i = z_y − max_{j≠y} z_j its margin at the output, and ν_l = mean ‖x_i^l − x̄^l‖²
    the total variance of the layer. To first order γ_i / ‖∂γ_i / ∂x_i^l‖ is the distance of x_i^l
    from the decision boundary, so that the value is that distance in units of the spread of the
    data. Invariant under rescaling the layers of a ReLU network, permuting units, and scaling the
    inputs of a network without biases. Cost: one gradient pass.

    Args:
        model: Any module whose examples do not influence each other, with outputs (n, classes).
        data: Inputs of shape (n, ...) and labels of shape (n,).
        percentile: Of each layer's margins, 0 to 100.

    Returns:
        float: Larger is better; negative where most margins are.

    Raises:
        ArgumentError: For a percentile outside 0 to 100.
        DataError: For labels that do not fit the outputs, or a single output.
        ModelError: For NaN or infinite weights or outputs, if no linear or convolutional layer is
            called, the representation of a layer is the same for all examples, or the margin of
            too many does not depend on it.

    Source:
        Jiang et al., ICLR 2019 (1810.00113), section 3; there quartiles of all layers are the
        features of a regression, here a percentile of each is averaged. The all-layer margin of
        Wei and Ma, which perturbs all layers at once, is `all_layer_margin`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> model.weight.data = torch.tensor([[1.0], [-1.0]])
        >>> data = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1])
        >>> hidden_layer_margin(model, data)  # both are one standard deviation from the boundary
        1.0
    """
    check_percentile(percentile)
    with frozen(model) as state:
        run = setup(model, data, state)
        distances, variances = _distances(run, model)
    found = []
    for layer, (distance, variance) in enumerate(zip(distances, variances, strict=True)):
        with np.errstate(invalid="ignore"):
            value = float(np.percentile(distance.cpu().numpy(), percentile))
        if not np.isfinite(value) or not variance > 0:
            raise ModelError(
                f"input of layer {layer}: the margin does not depend on it, or it is the same for "
                "all examples"
            )
        found.append(value / variance**0.5)
    return float(np.mean(found))


def _distances(run: Setup, model: nn.Module) -> tuple[list[Tensor], list[float]]:
    """First-order distances (n,) from the boundary at each layer, and the total variances."""
    weights = floating_parameters(model)
    leaves = {k: p.detach().requires_grad_() for k, p in weights.items()}
    parts: list[list[Tensor]] = []
    spreads: list[_Spread] = []
    with calls_of(product_layers(model)) as take:
        for batch in run.batches():
            gamma, gradients, inputs = _margin_gradients(run, leaves, batch, take)
            if not parts:
                parts = [[] for _ in inputs]
                spreads = [_Spread() for _ in inputs]
            for layer, (x, gradient) in enumerate(zip(inputs, gradients, strict=True)):
                norm = gradient.flatten(1).double().norm(dim=1)
                flat = torch.where(gamma == 0, 0.0, gamma.sign() * torch.inf)
                parts[layer].append(torch.where(norm > 0, gamma / norm, flat))
                spreads[layer].add(x.flatten(1).double())
    return [torch.cat(p) for p in parts], [spread.variance for spread in spreads]


def _margin_gradients(
    run: Setup, leaves: dict[str, Tensor], batch: Examples, take: Callable[[], list[Any]]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Margins (examples,), their gradients with respect to each layer's input, and the inputs."""
    with torch.enable_grad():
        # with weights that need gradients, so does every hidden layer
        given = batch.inputs
        if isinstance(given, Tensor) and given.is_floating_point():
            given = given.detach().requires_grad_()
        gamma = checked_margins(run.function(leaves, given), batch.labels)
        inputs = [x for x in take() if isinstance(x, Tensor) and x.requires_grad]
        for x in inputs:
            if len(x) != len(batch):
                raise ModelError(
                    f"a layer receives shape {tuple(x.shape)}: expected one row for each of "
                    f"{len(batch)} examples"
                )
        if not inputs:
            raise ModelError("no linear or convolutional layer is called in the forward pass")
        found = torch.autograd.grad(gamma.sum(), inputs, allow_unused=True)
    gradients = [
        torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)
    ]
    return gamma.detach().double(), gradients, [x.detach() for x in inputs]


class _Spread:
    """Total variance of rows that come in batches, around a first guess of their mean."""

    def __init__(self) -> None:
        self.center: Tensor | None = None
        self.count, self.squares = 0, 0.0

    def add(self, rows: Tensor) -> None:
        if self.center is None:
            self.center = rows.mean(0)
            self.sums = torch.zeros_like(self.center)
        off = rows - self.center
        self.count += len(rows)
        self.squares += float(off.square().sum())
        self.sums += off.sum(0)

    @property
    def variance(self) -> float:
        """Mean squared distance from the mean."""
        mean = self.sums / self.count
        return max(self.squares / self.count - float(mean.square().sum()), 0.0)


@dataclass(frozen=True)
class LayerMargins:
    """What `layer_margins` gives, one row an example, float64 on the CPU."""

    margins: Tensor  # γ = z_y − max_{j≠y} z_j, shape (n,)
    slopes: Tensor  # ‖∂γ / ∂h‖₂, shape (n,)
    rows: Tensor  # h, the representation, shape (n, d)


def layer_margins(
    run: Setup, model: nn.Module, module: nn.Module, *, output: bool = False
) -> LayerMargins:
    """Margins, their slopes and the representations h at the input or output of a module.

    Of a module that is called several times the first call counts. Cost: one gradient pass.

    Raises:
        DataError: For labels that do not fit the outputs, or a single output.
        ModelError: If the module is not called, or examples have no row each.
    """
    leaves = {k: p.detach().requires_grad_() for k, p in floating_parameters(model).items()}
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with calls_of([module], output=output) as take:
        for batch in run.batches():
            with torch.enable_grad():
                inputs = batch.inputs
                if isinstance(inputs, Tensor) and inputs.is_floating_point():
                    inputs = inputs.detach().requires_grad_()
                logits = run.function(leaves, inputs)
                gamma = checked_margins(logits, batch.labels)
                h = next(iter(take()), None)
                if not isinstance(h, Tensor) or len(h) != len(batch) or not h.requires_grad:
                    raise ModelError(
                        f"{type(module).__name__}: expected a representation with one row for each "
                        f"of {len(batch)} examples, on which the output depends"
                    )
                (slope,) = torch.autograd.grad(gamma.sum(), h, materialize_grads=True)
            length = slope.flatten(1).double().norm(dim=1)
            rows = h.detach().flatten(1)
            found.append((gamma.detach().double().cpu(), length.cpu(), rows.double().cpu()))
    return LayerMargins(*(torch.cat(part) for part in zip(*found, strict=True)))


def checked_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The margins, differentiable.

    Raises:
        DataError: For a single output, or labels that do not fit.
        ModelError: For NaN or infinite outputs.
    """
    check_class_labels(labels, logits)
    if logits.shape[1] < 2:
        raise DataError("a margin needs at least two outputs, got 1")
    if not bool(torch.isfinite(logits).all()):
        raise ModelError("the model has NaN or infinite outputs")
    return margins(logits, labels)
