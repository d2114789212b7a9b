"""The path norm: the network of squared weights and constants, applied to an input of ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data, load_in_order
from sharpkit.contract.parameters import select_parameters
from sharpkit.errors import ModelError
from sharpkit.measures.margins import margin_squared
from sharpkit.measures.passes import images
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


# what moves entries about, adds them, or chooses the largest: paths keep their weights
# fmt: off
_PLAIN = frozenset((
    "alias", "detach", "view", "_unsafe_view", "reshape", "_reshape_alias", "permute",
    "transpose", "t", "expand", "cat", "stack", "slice", "select", "unsqueeze", "squeeze",
    "clone", "contiguous", "_to_copy", "copy_", "split", "split_with_sizes", "unbind", "flatten",
    "unfold", "as_strided", "index", "index_select", "gather", "roll", "flip", "pixel_shuffle",
    "sum", "upsample_nearest1d", "upsample_nearest2d", "im2col", "relu", "relu_", "leaky_relu",
    "leaky_relu_", "_prelu_kernel", "prelu", "abs", "neg", "max_pool1d", "max_pool2d",
    "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d",
    "amax", "maximum", "max", "convolution", "addmv", "empty", "zeros", "zeros_like", "new_zeros",
))
# fmt: on
_PRODUCTS = frozenset(["mul", "mul_", "mm", "bmm", "mv", "addmm", "baddbmm", "dot"])
_NORMS = {  # BatchNorm, with the position of its argument `training`
    "native_batch_norm": 5,
    "_native_batch_norm_legit": 5,
    "cudnn_batch_norm": 5,
    "miopen_batch_norm": 5,
    "_native_batch_norm_legit_no_training": None,
}


class SquaredConstants(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, means, average pooling and scalar factors c act as c², and differences as sums.

    A product of two tensors that are not among the weights, squared already, is refused.

    Raises:
        ModelError: If something is computed under which paths keep no weight of their own.

    Example:
        >>> x = torch.ones(1, 4)
        >>> with SquaredConstants([]):
        ...     y = x.mean(1), 3 * x[0, 0], x[0, 0] - x[0, 1]
        >>> [float(v) for v in y]  # 4 · (1/4)², 3², 1 + 1
        [0.25, 9.0, 2.0]
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = {w.untyped_storage().data_ptr() for w in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _RULES:
            return _RULES[name](func, args, kwargs)
        if name in _NORMS:
            position = _NORMS[name]
            plain = position is None or not args[position]
        elif name == "constant_pad_nd":
            # -infinity before max pooling never is the largest
            plain = (args[2] if len(args) > 2 else kwargs.get("value", 0)) in (0, -math.inf)
        else:
            plain = name in _PLAIN or (name in _PRODUCTS and self._weighs(name, args))
        if not plain:
            raise ModelError(
                f"the path norm is that of linear maps and positively homogeneous activations "
                f"(ReLU, max and average pooling), but the forward pass computes {name!r}: leave "
                "the path norm out for this network"
            )
        if name in ("mul", "mul_"):
            args = tuple(a**2 if isinstance(a, int | float) else a for a in args)
        return func(*args, **kwargs)

    def _weighs(self, name: str, args: tuple[Any, ...]) -> bool:
        """Whether at most one factor of a product is neither a number nor a weight."""
        factors = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
        tensors = [f for f in factors if isinstance(f, Tensor)]
        free = [f for f in tensors if f.untyped_storage().data_ptr() not in self.weights]
        return len(free) < 2


def _mean(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    mean: Tensor = func(*args, **kwargs)
    share: float = mean.numel() / args[0].numel()
    return mean * share


def _average_pool(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The average of x times that of its window's shares: Σ x / k², whatever the border does."""
    x, rest = args[0], list(args[1:])
    result: Tensor = func(*args, **kwargs)
    # the sum of a window of ones over its average is its divisor
    window = [*rest, *[None] * (6 - len(rest))]
    window[1] = window[1] if window[1] else window[0]
    window[2:] = [window[2] or 0, window[3] or False, window[4] is not False, 1]
    ones = torch.ones_like(x)
    share: Tensor = func(ones, *args[1:], **kwargs) / func(ones, *window)
    return result * share


def _adaptive_pool(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    result: Tensor = func(*args, **kwargs)
    for axis in range(-len(args[1]), 0):
        size, cells = args[0].shape[axis], result.shape[axis]
        edges = [(i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)]
        counts = result.new_tensor([end - start for start, end in edges])
        result = result / counts.view(-1, *[1] * (-axis - 1))
    return result


def _sum(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """a ± c b is a + c² b."""
    factor = kwargs.get("alpha", 1) ** 2
    other = args[1] if isinstance(args[1], Tensor) else args[1] ** 2
    result = torch.add(args[0], other, alpha=factor)
    return args[0].copy_(result) if func.overloadpacket.__name__.endswith("_") else result


def _quotient(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(args[1], Tensor) and args[1].ndim > 0:
        raise ModelError(
            "the path norm is not defined for a network that divides by a tensor: leave it out"
        )
    return func(args[0], args[1] ** 2, **kwargs)


_RULES: dict[str, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    **dict.fromkeys(("mean",), _mean),
    **dict.fromkeys(("avg_pool2d", "avg_pool3d"), _average_pool),
    **dict.fromkeys(("_adaptive_avg_pool2d", "_adaptive_avg_pool3d"), _adaptive_pool),
    **dict.fromkeys(("add", "add_", "sub", "sub_"), _sum),
    **dict.fromkeys(("div", "div_"), _quotient),
}
