"""The path norm: the network of squared weights, applied to an input of ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data, load_in_order
from sharpkit.contract.parameters import select_parameters
from sharpkit.errors import ModelError
from sharpkit.measures.margins import margin_squared
from sharpkit.measures.passes import images
from sharpkit.measures.squared_network import SquaredConstants
from sharpkit.measures.weight_layers import BatchNorm, fold, wiring


def path_norm(model: nn.Module, data: Data, *, percentile: float = 10.0) -> dict[str, float]:
    """The sum over all paths from an input to an output of the squared product of the weights.

        plain        Σ_paths Π w_e² = Σ_j f_{w²}(1)_j
        over_margin  plain / γ²

    f_{w²} is the network with every weight and bias squared, applied to an input of ones; the
    constants of average pooling, means and scalar factors are weights too, and squared. Exact for
    ReLU networks, and then invariant under rescaling of their layers; max pooling takes the
    largest path of its window. BatchNorm is folded into the layer before it. Where something else
    than linear maps and positively homogeneous activations is computed (tanh, softmax, LayerNorm,
    products of activations) paths have no weight, and the network is refused. Cost: one example
    forward, in float64, and one forward pass for the margin.

    Args:
        model: A module whose inputs are one tensor of real numbers.
        data: Inputs of shape (n, ...), of which only the shape matters, and labels of shape (n,).
        percentile: Of the margins, 0 to 100.

    Returns:
        dict: "plain" and "over_margin".

    Raises:
        DataError: For inputs such as tokens or dicts.
        ModelError: If the network is not one of linear maps and positively homogeneous
            activations, the result leaves the range of float64, or the margin is 0.
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
    select_parameters(model)
    inputs = images(load_in_order(data, n=1), "the path norm")
    found = wiring(model, data)
    with frozen(model), torch.no_grad():
        function = FunctionalModel(model)
        ones = torch.ones(inputs.shape, dtype=torch.float64, device=function.device)
        state = _squared(model, found.norms)
        with SquaredConstants(state.values()):
            outputs = function(state, ones)
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
