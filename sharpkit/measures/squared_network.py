"""A forward pass whose constant factors are squared, as the weights are for a path norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sharpkit.errors import ModelError

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

    Args:
        weights: Parameters and buffers of the network, squared already. A product of two tensors
            that are none of them is refused.

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
