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


@contextmanager
def frozen(model: nn.Module) -> Iterator[Found]:
    """Hold a model in eval mode, as `held` does, and leave it exactly as it was found.

    Mode, weights, buffers, gradients, flags, attributes and random state are put back afterwards,
    also after an error. Takes memory for one copy of the weights and buffers. Weights in half
    precision are float32 inside (see `widened`).
    """
    with widened(model):
        model = unwrapped(model)
        found = Found(model)
        try:
            with held(model):
                yield found
        finally:
            found.restore()


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
