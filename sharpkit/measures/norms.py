"""Size and norms of a network's weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sharpkit.contract.loading import Data
from sharpkit.errors import ModelError
from sharpkit.measures.margins import margin_squared
from sharpkit.measures.weight_layers import WeightLayer, weight_layers


def parameter_count(model: nn.Module) -> float:
    """The number of trainable numbers, shared ones once.

    The quantity that VC-type bounds grow with, together with `depth`. Cost: none.

    Source:
        Jiang et al., ICLR 2020 (1912.02178), equation 20.

    Example:
        >>> import torch
        >>> parameter_count(torch.nn.Linear(3, 2))
        8.0
    """
    return float(sum(p.numel() for p in model.parameters()))


def depth(model: nn.Module, data: Data) -> float:
    """The number of weight matrices and convolution kernels, shared ones once.

    The second quantity of VC-type bounds. Cost: one example forward.

    Source:
        Jiang et al., ICLR 2020 (1912.02178), where the bounds on the VC dimension use it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> depth(model, (torch.zeros(1, 3), torch.tensor([0])))
        2.0
    """
    return float(len(weight_layers(model, data)))


def frobenius_squared(weight: Tensor) -> float:
    """‖W‖_F² of a float64 weight of any shape."""
    return float(torch.linalg.vector_norm(weight)) ** 2


def products(
    layers: Sequence[WeightLayer], squares: Sequence[float], margin: float
) -> dict[str, float]:
    """The four ways in which the squared norms of the layers are combined; margin is γ².

    Raises:
        ModelError: If a norm is 0.
    """
    for layer, square in zip(layers, squares, strict=True):
        if not square > 0:
            raise ModelError(
                f"{layer.name!r} is zero, so that the logarithm of its norm is infinite"
            )
    d = len(layers)
    total = sum(math.log(s) for s in squares)
    over = total - math.log(margin)
    return {
        "log_product": total,
        "log_sum": math.log(d) + total / d,
        "log_product_over_margin": over,
        "log_sum_over_margin": math.log(d) + over / d,
    }


def frobenius_norms(model: nn.Module, data: Data, *, percentile: float = 10.0) -> dict[str, float]:
    """Products and sums of the layers' Frobenius norms, plain and divided by the margin.

    With d layers, s_i = ‖W_i‖_F² and the margin γ (see `output_margin`):

        log_product              Σ log s_i
        log_sum                  log d + (Σ log s_i) / d
        log_product_over_margin  Σ log s_i − 2 log|γ|
        log_sum_over_margin      log d + (Σ log s_i − 2 log|γ|) / d
        sum_of_squares           Σ s_i

    "Sum" is the papers' name for d (Π s_i)^{1/d}, the least Σ s_i that rescaling the layers of a
    ReLU network can reach; it does not change under such rescaling, nor does the product, while
    `sum_of_squares` does. Cost: one forward pass, for the margin.

    Args:
        model: Any module with weight matrices or convolutions; BatchNorm is folded in.
        data: Inputs of shape (n, ...) and labels of shape (n,).
        percentile: Of the margins, 0 to 100.

    Returns:
        dict: Name to value.

    Raises:
        ModelError: For a weight that is zero, or a margin of zero.
        ArgumentError: For a percentile outside 0 to 100.

    Source:
        Jiang et al., ICLR 2020 (1912.02178), equations 36 to 39 and 42.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        >>> norms = frobenius_norms(model, (torch.eye(2), torch.tensor([0, 1])))
        >>> round(norms["sum_of_squares"], 6)
        25.0
    """
    layers = weight_layers(model, data)
    squares = [frobenius_squared(layer.weight) for layer in layers]
    values = products(layers, squares, margin_squared(model, data, percentile))
    return {**values, "sum_of_squares": sum(squares)}
