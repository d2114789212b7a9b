"""The memory that a group takes, and what it may take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.losses import MeanLoss
from sharpkit.errors import SharpkitError
from sharpkit.groupwise.geometry import Tensors
from sharpkit.memory import allowed_memory

_CPU_MEMORY_BUDGET = 4 * 2**30


class Tried(NamedTuple):
    """What one gradient of a few examples tells."""

    bytes: int  # that it keeps for each example
    unused: list[str]  # weights that the loss does not depend on


def try_gradient(model: FunctionalModel, loss: MeanLoss, weights: Tensors, few: Examples) -> Tried:
    """What autograd saves for an example, and the weights that have no derivative."""
    own = {w.untyped_storage().data_ptr() for w in weights.values()}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        # not the storage's size: an input is a view of the whole data set
        if t.untyped_storage().data_ptr() not in own:
            saved[t.data_ptr()] = max(saved.get(t.data_ptr(), 0), t.nbytes)
        return t.detach()  # the tensor itself may own the graph that it is saved in: a leak

    def value() -> Tensor:
        return loss(model.outputs(few.inputs), few.labels)

    with torch.enable_grad(), model.assigned(weights) as leaves:
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                mean = value()
            count = sum(saved.values())
        except SharpkitError:
            raise
        except Exception:  # function transforms inside the model allow no hooks
            with ResultSizes() as sizes:
                mean = value()
            count = int(sizes.bytes)
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if mean.requires_grad:
            found = torch.autograd.grad(mean, leaves, allow_unused=True)
    unused = [name for name, g in zip(weights, found, strict=True) if g is None]
    return Tried(math.ceil(count / len(few)), unused)


class ResultSizes(TorchFunctionMode):
    """Adds up the bytes of everything that torch's functions return: what they save at most."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function and add up what it returns."""
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.bytes += out.numel() * out.element_size()
        return out


def default_memory_budget(device: torch.device) -> int:
    """4 GiB on a CPU, half of the memory of a GPU; at most half of what a worker is allowed."""
    budget = _CPU_MEMORY_BUDGET
    if device.type == "cuda":
        budget = torch.cuda.get_device_properties(device).total_memory // 2
    allowed = allowed_memory(device)
    return budget if allowed is None else min(budget, allowed // 2)
