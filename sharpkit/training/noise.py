"""Both passes of SAM alike: they draw the same random numbers, and the second moves no buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakMethod, finalize

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Noise:
    """The random state of the CPU and of some GPUs, to be replayed.

    Args:
        devices: Those of other types than CUDA have no state of their own.
    """

    def __init__(self, *devices: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}

    @classmethod
    def of(cls, parameters: Iterable[Tensor]) -> Noise:
        """The state of every device that holds parameters."""
        return cls(*{p.device for p in parameters})

    @contextmanager
    def replayed(self, *, then_on: bool) -> Iterator[None]:
        """Inside, the same numbers again; afterwards others, if some were drawn in between."""
        here = Noise(*self._cuda) if then_on else None
        self.replay()
        yield
        if here is not None:
            here.replay()

    def same_as(self, other: Noise) -> bool:
        """Whether nothing was drawn between both."""
        pairs = [(self._cpu, other._cpu), *((s, other._cuda[d]) for d, s in self._cuda.items())]
        return all(torch.equal(a, b) for a, b in pairs)

    def replay(self) -> None:
        """Put the state back as it was."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


class DrawsOfCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """How many random numbers every call draws in two passes, over 3 and then over 2 groups."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._numbers: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, and note how much it drew."""
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            drawn = [t.numel() for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
            self._numbers.append(max(drawn, default=1))
        return out

    @property
    def are_of_examples(self) -> bool:
        """Whether each example has numbers of its own, as with dropout: as many as examples ask."""
        half, odd = divmod(len(self._numbers), 2)
        first, second = self._numbers[:half], self._numbers[half:]
        return not odd and all(2 * a == 3 * b for a, b in zip(first, second, strict=True))


class BufferGuard:
    """Remembers the buffers of every module that runs in training mode, and puts them back.

    SAM's second pass must not move running statistics, and an optimizer does not know its model:
    so modules are noticed when they are called. Only what runs between `start` and `stop` is.
    """

    def __init__(self) -> None:
        self._remove: Callable[[], object] = lambda: None
        self._seen: dict[nn.Module, dict[str, tuple[Tensor, Tensor]]] = {}
        self._called: set[nn.Module] = set()

    def start(self) -> None:
        """From now on, note a module's buffers before its first call."""
        method = WeakMethod(self._note)  # or a guard that nobody stops would watch for ever

        def note(module: nn.Module, args: Any) -> None:
            own = method()
            if own is not None:
                own(module, args)

        hook = torch.compiler.disable(note)  # type: ignore[no-untyped-call]
        self._remove = finalize(self, register_module_forward_pre_hook(hook).remove)

    @torch.no_grad()
    def stop(self) -> None:
        """Put every buffer noted back, and take no more notes; harmless if not started."""
        self._remove()
        for module, buffers in self._seen.items():
            for name, (buffer, before) in buffers.items():
                buffer.copy_(before)
                module._buffers[name] = buffer
        self._seen, self._called = {}, set()

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
