"""Size and norms of a network's weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data, load_in_order
from sharpkit.contract.parameters import select_parameters
from sharpkit.errors import ModelError
from sharpkit.measures.layers import BatchNorm, WeightLayer, fold, trace, weight_layers
from sharpkit.measures.margins import margin_squared


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


def path_norm(model: nn.Module, data: Data, *, percentile: float = 10.0) -> dict[str, float]:
    """The sum over all paths from an input to an output of the squared product of the weights.

        plain        Σ_paths Π w_e² = Σ_j f_{w²}(1)_j
        over_margin  plain / γ²

    f_{w²} is the network with every weight and bias squared, applied to an input of ones. Exact
    for ReLU networks, and then invariant under rescaling of their layers; max pooling takes the
    largest path of its window. BatchNorm is folded into the layer before it. Cost: one example
    forward, in float64, and one forward pass for the margin.

    Args:
        model: A module whose inputs are one tensor of real numbers.
        data: Inputs of shape (n, ...), of which only the shape matters, and labels of shape (n,).
        percentile: Of the margins, 0 to 100.

    Returns:
        dict: "plain" and "over_margin".

    Raises:
        DataError: For inputs such as tokens or dicts.
        ModelError: If the result leaves the range of float64, or the margin is 0.
        ArgumentError: For a percentile outside 0 to 100.

    Source:
        Neyshabur et al., COLT 2015; Jiang et al., ICLR 2020 (1912.02178), equations 43 and 44.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(),
        ...                       nn.Linear(1, 2, bias=False))
        >>> model[0].weight.data = torch.tensor([[3.0]])
        >>> model[2].weight.data = torch.tensor([[1.0], [2.0]])
        >>> path_norm(model, (torch.ones(1, 1), torch.tensor([1])))  # 9 · (1 + 4), margin 3
        {'plain': 45.0, 'over_margin': 5.0}
    """
    from sharpkit.measures.passes import images

    select_parameters(model)
    inputs = images(load_in_order(data, n=1), "the path norm")
    found = trace(model, data)
    with frozen(model), torch.no_grad():
        function = FunctionalModel(model)
        ones = torch.ones(inputs.shape, dtype=torch.float64, device=function.device)
        outputs = function(_squared(model, found.norms), ones)
    total = float(outputs.sum())
    if not math.isfinite(total):
        raise ModelError(f"the path norm is {total}: it leaves the range of float64")
    return {"plain": total, "over_margin": total / margin_squared(model, data, percentile)}


def _squared(model: nn.Module, norms: dict[nn.Module, BatchNorm]) -> dict[str, Tensor]:
    """Parameters and buffers of the network of squared weights, in float64."""
    names = {module: name for name, module in model.named_modules()}

    def path(module: nn.Module, key: str) -> str:
        return f"{names[module]}.{key}".lstrip(".")

    state = {n: b.double() for n, b in model.named_buffers() if b.is_floating_point()}
    state |= {n: p.detach().double().square() for n, p in model.named_parameters()}
    for module in names:
        if isinstance(module, BatchNorm):
            if module.running_mean is None or module.weight is None:
                raise ModelError(
                    f"{names[module]}: the path norm needs a BatchNorm with stored statistics and "
                    "with weights (affine=True)"
                )
            layer = next((before for before, norm in norms.items() if norm is module), None)
            weight_scale, scale, shift = fold(layer or module, module)
            if layer is not None:
                weight, bias = layer.weight, layer.bias
                assert isinstance(weight, Tensor)
                state[path(layer, "weight")] = (weight.detach().double() * weight_scale).square()
                if isinstance(bias, Tensor):
                    shift = shift + scale * bias.detach().double()
                    state[path(layer, "bias")] = torch.zeros_like(shift)
                scale = torch.ones_like(scale)
            # the module divides by √(1 + ε) where its statistics are 0 and 1
            state[path(module, "running_mean")] = torch.zeros_like(shift)
            state[path(module, "running_var")] = torch.ones_like(shift)
            state[path(module, "weight")] = scale.square() * math.sqrt(1 + module.eps)
            state[path(module, "bias")] = shift.square()
    return state
