"""Models whose weights are in half precision: measured in float32 copies of the same numbers."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from sharpkit.contract.modules import unwrapped
from sharpkit.errors import ArgumentError
from sharpkit.memory import available_memory

HALF = (torch.float16, torch.bfloat16)


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Inside, weights and buffers in float16 or bfloat16 are float32 copies; then as they were.

    m-sharpness and second derivatives are differences of nearly equal numbers, of which two or
    three digits leave nothing. The copies have the same values, so what is measured is the network
    that was stored, computed in float32. A mixed network runs in float32 throughout.

    Raises:
        ArgumentError: If the copies do not fit the memory; for float8; for a module in
            DistributedDataParallel, which would lose track of its gradients.

    Example:
        >>> layer = nn.Linear(2, 2, dtype=torch.bfloat16)
        >>> with widened(layer):
        ...     layer.weight.dtype
        torch.float32
        >>> layer.weight.dtype
        torch.bfloat16
    """
    inner = unwrapped(model)
    _refuse_less(inner)
    buffers = {id(b): b for b in inner.buffers() if b.dtype in HALF}.values()
    tensors: list[Tensor] = [*_half(inner.parameters()), *buffers]
    if not tensors:
        yield
        return
    if isinstance(model, DistributedDataParallel):
        raise ArgumentError(
            f"the model is in DistributedDataParallel and has weights in {_kinds(tensors)}: "
            "measure a copy, copy.deepcopy(model.module)"
        )
    _require_room(tensors)
    before = [(t, t.data, t.grad if t.is_leaf else None) for t in tensors]
    try:
        for tensor, data, _ in before:
            tensor.grad = None  # its dtype must be that of the weight
            tensor.data = data.float()
        yield
    finally:
        for tensor, data, gradient in before:
            tensor.grad = None
            tensor.data = data
            tensor.grad = gradient


def refuse_half(parameters: Iterable[Tensor], what: str) -> None:
    """Raise ArgumentError if a trained parameter is in half precision.

    Example:
        >>> refuse_half(nn.Linear(2, 2, dtype=torch.float16).parameters(), "fit")
        Traceback (most recent call last):
        ...
        sharpkit.errors.ArgumentError: fit trains weights in float32 or float64, got float16: ...
    """
    half = _half(parameters)
    if half:
        raise ArgumentError(
            f"{what} trains weights in float32 or float64, got {_kinds(half)}: steps and "
            f"perturbations smaller than its rounding would be lost. {WAY_OUT}"
        )


class HalfResults(TorchFunctionMode):
    """Notes whether any result inside is in half precision: an autocast or cast of a model's own.

    Example:
        >>> with HalfResults() as seen:
        ...     _ = torch.ones(1).bfloat16()
        >>> seen.kind
        torch.bfloat16
    """

    kind: torch.dtype | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call it, and look at what it gives."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype in HALF:
            self.kind = result.dtype
        return result

    def warn(self, name: str) -> None:
        """Warn if there was one."""
        if self.kind is not None:
            warnings.warn(
                f"{name} computes in {str(self.kind).removeprefix('torch.')} inside its forward "
                "pass (an autocast or a cast of its own), also while it is measured: differences "
                "of losses then keep two or three digits at most. Take it out to measure in "
                "float32, and take dtypes from weights",
                stacklevel=2,
            )


WAY_OUT = (
    "Keep the weights in float32 (model.float()); torch.autocast(device, torch.bfloat16) around "
    "the passes is as fast"
)


def _half(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t for t in tensors if t.dtype in HALF]


def _kinds(tensors: Iterable[Tensor]) -> str:
    return " and ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))


def _refuse_less(model: nn.Module) -> None:
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
            raise ArgumentError(
                f"{name!r} is {tensor.dtype}, which has no gradients: expected float16 or more; "
                "measure the model before it was quantised"
            )


def _require_room(tensors: list[Tensor]) -> None:
    needed: dict[torch.device, int] = {}
    for tensor in tensors:
        needed[tensor.device] = needed.get(tensor.device, 0) + 4 * tensor.numel()
    for device, size in needed.items():
        free = available_memory(device)
        if free is not None and size > free:
            raise ArgumentError(
                f"weights in {_kinds(tensors)} are measured in float32 copies, which need "
                f"{size / 1e9:,.1f} GB on {device}, of which {free / 1e9:,.1f} GB is free: move "
                "the model to a device with more memory, or measure a smaller one; in half "
                "precision the numbers would be rounding"
            )
