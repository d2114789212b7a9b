"""The memory that a group takes, and what it may take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def activation_bytes(
    model: FunctionalModel, weights: Tensors, loss: MeanLoss, one: Examples
) -> int:
    """Bytes that the gradient pass keeps per example: what autograd saves for one example."""
    own = {w.untyped_storage().data_ptr() for w in weights.values()}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        # not the storage's size: an input is a view of the whole data set
        if t.untyped_storage().data_ptr() not in own:
            saved[t.data_ptr()] = max(saved.get(t.data_ptr(), 0), t.nbytes)
        return t.detach()  # the tensor itself may own the graph that it is saved in: a leak

    with torch.enable_grad(), model.assigned(weights):
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                loss(model.outputs(one.inputs), one.labels)
        except SharpkitError:
            raise
        except Exception:  # function transforms inside the model allow no hooks
            with ResultSizes() as sizes:
                loss(model.outputs(one.inputs), one.labels)
            return int(sizes.bytes)
    return sum(saved.values())


class ResultSizes(TorchFunctionMode):
    """Adds up the bytes of everything that torch's functions return: what they save at most."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
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
