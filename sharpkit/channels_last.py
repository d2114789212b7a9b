"""What PyTorch computes wrongly where images on a CPU have their channels last in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

# below so many input channels, the width of a vector register, a kernel of oneDNN writes past its
# memory: https://github.com/uxlfoundation/oneDNN/issues/6035
_FEW_CHANNELS = 16


def overruns(weight: Tensor, stride: Sequence[int]) -> bool:
    """Whether the gradient of a convolution's weight overruns memory, with channels last on a CPU.

    It does for strided 1 x 1 kernels of few channels, up to PyTorch 2.14 at least: numbers are
    then wrong, or the process is killed or waits forever.

    Example:
        >>> overruns(torch.ones(8, 4, 1, 1), [2, 2]), overruns(torch.ones(8, 4, 3, 3), [2, 2])
        (True, False)
    """
    on_cpu = weight.device.type == "cpu"
    pointwise = weight.ndim == 4 and weight.shape[2:] == (1, 1)
    return on_cpu and pointwise and max(stride) > 1 and weight.shape[1] < _FEW_CHANNELS


def channels_first(tensor: Tensor) -> Tensor:
    """Images or kernels on a CPU with each channel's pixels together in memory; others as they are.

    PyTorch goes by strides, which of 1 x 1 kernels and of images with one channel may be those of
    either order.

    Example:
        >>> images = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
        >>> images.stride(), channels_first(images).stride()
        ((48, 1, 12, 3), (48, 16, 4, 1))
    """
    if tensor.ndim != 4 or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return tensor
    _, channels, height, width = tensor.shape
    plain = (channels * height * width, height * width, width, 1)
    if tensor.stride() == plain or not 0 < tensor.stride(1) <= tensor.stride(3):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


class NeedsChannelsFirst(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether what is computed has an operation that is not safe with channels last.

    That is a convolution that overruns memory, or GroupNorm: its gradients for weight and bias
    alone, without one for its input, end the process, in PyTorch 2.13 at least.

    Example:
        >>> with NeedsChannelsFirst() as seen:
        ...     _ = torch.nn.Conv2d(3, 8, 1, stride=2)(torch.ones(1, 3, 4, 4))
        >>> seen.found
        True
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the arguments of some functions; every one is called as it is."""
        if func is torch.ops.aten.convolution.default:
            self.found = self.found or overruns(args[1], args[3])
        elif func is torch.ops.aten.native_group_norm.default:
            self.found = self.found or (args[0].ndim == 4 and args[0].device.type == "cpu")
        return func(*args, **(kwargs or {}))


@contextmanager
def keeping_layout(graph: fx.GraphModule) -> Iterator[None]:
    """Keeps inductor from choosing channels-last, as it does on a CPU, where that is no good.

    That is where memory would be overrun, and for convolutions of groups of channels, as those of
    groups of examples are: a step of m-SAM took 1.5 times as long.
    """
    import torch._inductor.config as settings

    if not any(map(_keeps_layout, graph.graph.nodes)):
        yield
        return
    with settings.patch(layout_optimization=False):
        yield


def _keeps_layout(node: fx.Node) -> bool:
    args: Any = node.args
    if node.target is torch.ops.aten.convolution.default:
        return bool(args[8] != 1)
    if node.target is not torch.ops.aten.convolution_backward.default:
        return False
    return bool(args[9] != 1 or overruns(args[2].meta["val"], args[4]))
