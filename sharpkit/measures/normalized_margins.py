"""The margin in units of the Lipschitz bound that the layers give."""

from __future__ import annotations

import math

from torch import nn

from sharpkit.contract.loading import Data, load_in_order
from sharpkit.errors import DataError, ModelError
from sharpkit.measures.margins import output_margin
from sharpkit.measures.passes import images
from sharpkit.measures.spectral import spectral_norm
from sharpkit.measures.weight_layers import weight_layers


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
