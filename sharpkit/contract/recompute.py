"""Activation checkpointing, which runs parts of the forward pass again during backward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils import checkpoint as torch_checkpoint

_NAMES = ("CheckpointFunction", "_checkpoint_without_reentrant_generator")
_lock = threading.RLock()


def _plain(function: Callable[..., Any], _preserve: bool, *args: Any) -> Any:
    return function(*args)


def _once(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _without_reentry(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
    return torch_checkpoint.checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=preserve
    )


class _Direct:
    apply = staticmethod(_plain)


class _NotReentrant:
    apply = staticmethod(_without_reentry)


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """Inside, `torch.utils.checkpoint` keeps what it would compute again; values are the same.

    Function transforms cannot see through it, and a second derivative would need its recomputation
    under the same conditions; a measurement bounds its memory by its chunks instead.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> with without_checkpointing():
        ...     y = torch_checkpoint.checkpoint(torch.sin, x, use_reentrant=True)
        >>> torch.autograd.grad(y.sum(), x)[0]  # reentrant checkpoints have no autograd.grad
        tensor([0.5403, 0.5403])
    """
    with _replaced(CheckpointFunction=_Direct, _checkpoint_without_reentrant_generator=_once):
        yield


@contextmanager
def without_reentry() -> Iterator[None]:
    """Inside, reentrant checkpoints are of the other kind, which `torch.autograd.grad` can use."""
    with _replaced(CheckpointFunction=_NotReentrant):
        yield


@contextmanager
def _replaced(**names: Any) -> Iterator[None]:
    with _lock:  # held throughout: another thread must not put back what is not its own
        before = {name: getattr(torch_checkpoint, name) for name in names}
        try:
            for name, value in names.items():
                setattr(torch_checkpoint, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(torch_checkpoint, name, value)
