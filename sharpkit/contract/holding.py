"""Holding a model still while it is measured."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpkit.contract.half_precision import widened
from sharpkit.contract.modules import unwrapped
from sharpkit.contract.precision import measuring_precision
from sharpkit.contract.recompute import without_checkpointing
from sharpkit.contract.state import Found
from sharpkit.errors import ArgumentError
from sharpkit.memory import available_memory, freed_memory_kept

_LARGE = 2**27  # bytes; the system is not asked for less


@contextmanager
def frozen(model: nn.Module) -> Iterator[Found]:
    """Hold a model in eval mode, as `held` does, and leave it exactly as it was found.

    Mode, weights, buffers, gradients, flags, attributes and random state are put back afterwards,
    also after an error. Takes memory for one copy of the weights and buffers. Weights in half
    precision are float32 inside (see `widened`).

    Raises:
        ArgumentError: If the copy does not fit the memory.
    """
    with widened(model):
        model = unwrapped(model)
        _require_copy(model)
        found = Found(model)
        try:
            with held(model):
                yield found
        finally:
            found.restore()


def _require_copy(model: nn.Module) -> None:
    sizes: dict[torch.device, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        sizes[tensor.device] = sizes.get(tensor.device, 0) + tensor.numel() * tensor.itemsize
    for device, size in sizes.items():
        free = available_memory(device) if size >= _LARGE else None
        if free is not None and size > free:
            raise ArgumentError(
                f"a copy of the model's weights, which they are put back from, needs "
                f"{size / 1e9:,.1f} GB on {device}, of which {free / 1e9:,.1f} GB is free: "
                "measure where there is more memory, or a smaller model"
            )


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Inside, a model is in eval mode, runs eagerly, in full precision, with plain kernels.

    The mode is set module by module: an overridden `train` may merge or cache weights. Modes and
    random state are restored; weights are not looked at.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with (
            torch.random.fork_rng(devices=devices),
            freed_memory_kept(),
            unfused_attention(),
            measuring_precision(),
            without_checkpointing(),
            run_eagerly(),
        ):
            for module, _ in modes:
                module.training = False
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Plain kernels inside: fused attention has neither second derivatives nor batching rules."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def fused_attention() -> AbstractContextManager[object]:
    """Any kernel inside, for first derivatives without transforms: they are faster, and as exact.

    Example:
        >>> with fused_attention():
        ...     pass
    """
    kernels = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    known = [getattr(SDPBackend, name) for name in kernels if hasattr(SDPBackend, name)]
    context: AbstractContextManager[object] = sdpa_kernel(known)
    return context


def run_eagerly() -> AbstractContextManager[object]:
    """Inside, what `torch.compile` has wrapped runs as plain Python: compiled code keeps weights.

    Example:
        >>> with run_eagerly():
        ...     pass
    """
    # only if it has been imported is there anything compiled, and the import takes seconds
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
