"""Buffers that a forward pass changes, such as running statistics, put back afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


class BufferGuard:
    """Remembers the buffers of every module that runs in training mode, and puts them back.

    SAM's second pass must not move running statistics, and an optimizer does not know its model:
    so modules are noticed when they are called. Only what runs between `start` and `stop` is.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._seen: dict[nn.Module, dict[str, tuple[Tensor, Tensor]]] = {}
        self._called: set[nn.Module] = set()

    def start(self) -> None:
        """From now on, note a module's buffers before its first call."""
        note = torch.compiler.disable(self._note)  # type: ignore[no-untyped-call]
        self._handle = register_module_forward_pre_hook(note)

    @torch.no_grad()
    def stop(self) -> None:
        """Put every buffer noted back, and take no more notes; harmless if not started."""
        if self._handle is not None:
            self._handle.remove()
        for module, buffers in self._seen.items():
            for name, (buffer, before) in buffers.items():
                buffer.copy_(before)
                module._buffers[name] = buffer
        self._handle, self._seen, self._called = None, {}, set()

    def _note(self, module: nn.Module, args: Any) -> None:
        if module in self._called:
            return
        for part in module.modules():  # a compiled module does not announce its parts
            if part not in self._called and part.training:
                self._seen[part] = {
                    name: (buffer, buffer.detach().clone())
                    for name, buffer in part._buffers.items()
                    if buffer is not None
                }
            self._called.add(part)
