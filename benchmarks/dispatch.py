"""What a GPU would be given to do and waited for, counted on any device."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# operations whose result, or its shape, has to be known on the host
SYNCHRONISING = {
    "aten::_local_scalar_dense", "aten::equal", "aten::allclose", "aten::masked_select",
    "aten::nonzero", "aten::_unique2",
}  # fmt: skip

# operations that touch no number, so that a GPU is given nothing to do
VIEWS = {
    f"aten::{name}"
    for name in (
        "alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split",
        "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
        "_unsafe_view",
    )
}  # fmt: skip


class Calls(TorchDispatchMode):
    """Counts the operations that reach a device while it is entered.

    Attributes:
        by_name: Calls of every operation.
        synchronising: Those of them that wait for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.synchronising: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.name().partition(".")[0]
        self.by_name[name] += 1
        if name in SYNCHRONISING or (name == "aten::index" and _has_mask(args[1])):
            self.synchronising[name] += 1
        return func(*args, **(kwargs or {}))


def _has_mask(indices: list[Tensor | None]) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def counted(run: Callable[[], object]) -> Calls:
    """The calls of one run."""
    with Calls() as calls:
        run()
    return calls


def calls(run: Callable[[], object]) -> tuple[int, int]:
    """How many operations one run takes, and how many of them are no views."""
    found = counted(run).by_name
    views = sum(count for name, count in found.items() if name in VIEWS)
    return found.total(), found.total() - views


def waits(run: Callable[[], object], device: str) -> int:
    """How often one run waits for the device: told by CUDA, or counted as on a CPU."""
    if torch.device(device).type != "cuda":
        return counted(run).synchronising.total()
    run()  # what is made once, such as the library's own workspaces
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)
