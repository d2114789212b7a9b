"""How much memory a graph keeps, how much it may, and the message when it does not fit."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from sharpkit.errors import ArgumentError, SharpkitError
from sharpkit.groupwise.memory import ResultSizes
from sharpkit.memory import available_memory

_CPU_BUDGET = 4 * 2**30
# the graph of a gradient over what the forward pass returns: that, and as much twice in backward
_OF_GRADIENT = 3


def default_budget(device: torch.device) -> int:
    """Bytes for kept graphs: half of what is free, and on a CPU no more than 4 GiB."""
    free = available_memory(device)
    if device.type == "cuda" and free is not None:
        return free // 2
    return _CPU_BUDGET if free is None else min(_CPU_BUDGET, free // 2)


def require_memory(needed: int, device: torch.device, what: str, advice: str) -> None:
    """Raise ArgumentError with the numbers if `needed` bytes are more than the device has free.

    Example:
        >>> require_memory(10**18, torch.device("cpu"), "the basis", "ask for fewer steps")
        Traceback (most recent call last):
        ...
        sharpkit.errors.ArgumentError: the basis needs 1,000,000,000.0 GB on cpu, of which ...
    """
    free = available_memory(device)
    if free is not None and needed > free:
        raise ArgumentError(
            f"{what} needs {gigabytes(needed)} on {device}, "
            f"of which {gigabytes(free)} is free: {advice}"
        )


def gigabytes(size: int) -> str:
    """A size for people, in units of 10^9 bytes.

    Example:
        >>> gigabytes(1_250_000_000)
        '1.2 GB'
    """
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


class _Saved:
    """A tensor as autograd keeps it; lives as long as the graph that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # with its history it would hold the graph that holds it


def saved_bytes(record: Callable[[], object], ignore: list[Tensor]) -> int:
    """Bytes of the tensors that the graph recorded keeps alive, each storage once.

    For a model that transforms functions it is an estimate from what torch's functions return.
    `record` builds a graph and returns what holds it; tensors to ignore exist anyway.
    """
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        kept = _Saved(tensor)
        saved.add(kept)
        return kept

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            graph = record()
    except SharpkitError:
        raise
    except Exception:  # function transforms inside the model allow no hooks
        with ResultSizes() as results:
            record()
        return _OF_GRADIENT * int(results.bytes)
    known = {t.untyped_storage().data_ptr() for t in ignore}
    dense = [kept.tensor for kept in saved if kept.tensor.layout is torch.strided]
    storages = [tensor.untyped_storage() for tensor in dense]
    sizes = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in known}
    del graph
    return sum(sizes.values())
