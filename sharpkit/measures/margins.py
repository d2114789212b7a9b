"""Measures of the outputs: margins and the training loss."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data, load_in_order
from sharpkit.contract.losses import Loss
from sharpkit.errors import ArgumentError, DataError, ModelError
from sharpkit.measures.measure import Estimate
from sharpkit.measures.passes import setup, single_terms, weighted_mean


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The margin of each example, z_y − max_{j≠y} z_j; shape (n,).

    Example:
        >>> import torch
        >>> margins(torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 4.0]]), torch.tensor([0, 1]))
        tensor([ 2., -3.])
    """
    is_label = torch.arange(logits.shape[-1], device=logits.device) == labels.unsqueeze(-1)
    others = logits.masked_fill(is_label, -torch.inf).amax(-1)
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - others


def check_percentile(percentile: float) -> None:
    """Raise ArgumentError outside 0 to 100."""
    if not 0 <= percentile <= 100:
        raise ArgumentError(f"percentile must be between 0 and 100, got {percentile}")


def output_margin(model: nn.Module, data: Data, *, percentile: float = 10.0) -> float:
    """A low percentile of the training margins, which stands for the margin of the network.

        γ = the 10th percentile over examples of z_y − max_{j≠y} z_j

    The minimum itself is decided by a single example. Negative where more than `percentile` per
    cent of the examples are misclassified. Scales with the outputs. Cost: one forward pass.

    Args:
        model: Any module with outputs of shape (n, classes), two or more classes.
        data: Inputs of shape (n, ...) and labels of shape (n,).
        percentile: 0 to 100, interpolated linearly.

    Returns:
        float: γ; larger is better.

    Raises:
        ArgumentError: For a percentile outside 0 to 100.
        DataError: For labels that do not fit the outputs, or a single output.
        ModelError: For NaN or infinite weights or outputs.

    Source:
        Jiang et al., ICLR 2020 (1912.02178), equation 22 (its inverse square), where a percentile
        replaces the minimum.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.eye(2)
        >>> data = torch.tensor([[3.0, 1.0], [0.0, 4.0]]), torch.tensor([0, 1])
        >>> output_margin(model, data, percentile=50)
        3.0
    """
    check_percentile(percentile)
    with frozen(model) as found:
        run = setup(model, data, found)
        logits = run.logits()
        if logits.shape[1] < 2:
            raise DataError("a margin needs at least two outputs, got 1")
        values = margins(logits.double(), run.labels)
    return float(np.percentile(values.cpu().numpy(), percentile))


def margin_squared(model: nn.Module, data: Data, percentile: float) -> float:
    """γ², by which norms are divided.

    Raises:
        ModelError: If γ is 0.
    """
    margin = output_margin(model, data, percentile=percentile)
    if margin == 0:
        raise ModelError(
            f"the {percentile:g}th percentile of the margins is 0: cannot divide by it"
        )
    return margin**2


def inverse_margin(model: nn.Module, data: Data, *, percentile: float = 10.0) -> float:
    """The inverse square of the margin.

        1 / γ²

    The sign of γ is lost, as in the papers' programs: for networks that misclassify more than
    `percentile` per cent of their training examples use `output_margin`. Cost: one forward pass.

    Args:
        model: Any module with outputs of shape (n, classes).
        data: Inputs of shape (n, ...) and labels of shape (n,).
        percentile: 0 to 100.

    Returns:
        float: 1 / γ².

    Raises:
        ModelError: If γ is 0.
        ArgumentError: For a percentile outside 0 to 100.

    Source:
        Jiang et al., ICLR 2020 (1912.02178), equation 22.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.eye(2)
        >>> inverse_margin(model, (torch.tensor([[3.0, 1.0]]), torch.tensor([0])))
        0.25
    """
    return 1.0 / margin_squared(model, data, percentile)


def normalized_margin(model: nn.Module, data: Data, *, percentile: float = 10.0) -> float:
    """The margin divided by the Lipschitz bound that the spectral norms give.

        γ / (Π ‖W_i‖₂ · mean ‖x‖₂)

    Unlike γ itself it does not change if a ReLU network without biases is scaled, nor if its
    inputs are. Cost: one forward pass, and the spectral norms.

    Args:
        model: Any module with outputs of shape (n, classes).
        data: Inputs of shape (n, ...), real numbers, and labels of shape (n,).
        percentile: 0 to 100.

    Returns:
        float: Larger is better; negative as γ.

    Raises:
        DataError: For inputs that are not a tensor of real numbers, or all zero.
        ModelError: For a weight that is zero.
        ArgumentError: For a percentile outside 0 to 100.

    Source:
        After Bartlett et al., NeurIPS 2017, whose normaliser has, besides this product, the
        factor of (2,1)-norms that `spectral_norms` reports through its stable ranks.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> model.weight.data = 5 * torch.eye(2)
        >>> data = torch.tensor([[3.0, 4.0]]), torch.tensor([1])
        >>> round(normalized_margin(model, data), 6)  # (20 − 15) / (5 · 5)
        0.2
    """
    from sharpkit.measures.passes import images
    from sharpkit.measures.spectral import spectral_norm
    from sharpkit.measures.weight_layers import weight_layers

    margin = output_margin(model, data, percentile=percentile)
    inputs = images(load_in_order(data), "the normalised margin")
    size = float(inputs.double().flatten(1).norm(dim=1).mean())
    norms = [spectral_norm(layer) for layer in weight_layers(model, data)]
    if size == 0:
        raise DataError("all inputs are zero: the margin cannot be normalised by their norm")
    if min(norms) == 0:
        raise ModelError("a weight is zero: the margin cannot be normalised by its norm")
    # a product of logarithms: neither overflows nor underflows
    bound = sum(math.log(norm) for norm in norms) + math.log(size)
    return math.copysign(math.exp(math.log(abs(margin)) - bound), margin) if margin else 0.0


def training_loss(model: nn.Module, data: Data, *, loss: Loss = "cross_entropy") -> Estimate:
    """The mean loss over the training examples, in eval mode.

        L(w) = (1/n) Σ ℓ(f_w(x_i), y_i)

    Cost: one forward pass.

    Args:
        model: Any module.
        data: Inputs of shape (n, ...) and labels of shape (n, ...).
        loss: "cross_entropy", "mse" or a callable (outputs, labels) -> mean loss.

    Returns:
        Estimate: The mean, and its standard error over examples.

    Raises:
        DataError: For labels that do not fit the outputs.
        ModelError: For NaN or infinite weights or losses.

    Source:
        Jiang et al., ICLR 2020 (1912.02178), where the cross-entropy at the end of training is
        one of the optimisation measures.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> round(training_loss(model, (torch.eye(2), torch.tensor([0, 1]))).value, 6)  # log 2
        0.693147
    """
    each = single_terms(loss)
    with frozen(model) as found, torch.no_grad():
        run = setup(model, data, found, loss)
        parts = [each(run.function({}, b.inputs), b.labels) for b in run.batches()]
    losses, weights = (torch.cat(part) for part in zip(*parts, strict=True))
    if not bool(torch.isfinite(losses).all()):
        raise ModelError(
            f"the loss of {int((~torch.isfinite(losses)).sum())} examples is not finite"
        )
    return weighted_mean(losses, weights)
