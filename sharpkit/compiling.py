"""Functions of tensors, traced once and compiled by torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sharpkit.convolutions import keeping_layout

T = TypeVar("T")


class Compiled(Generic[T]):
    """A function that runs compiled for arguments of the form of its first ones.

    It is traced with these, down to the operations that reach the device, so that no Python of the
    model is left, and compiled. Arguments of another form (a smaller last chunk) run as without.
    What the function takes from elsewhere must stay the same tensors.

    Args:
        function: Of tensors, or structures of them; returns the same.
        name: Of what it does, for the warning.
        backend: Of `torch.compile`.
    """

    def __init__(self, function: Callable[..., T], name: str, backend: str = "inductor") -> None:
        self._function, self._name, self._backend = function, name, backend
        self._form: Any = None
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> T:
        """What the function returns, to rounding.

        Warns:
            UserWarning: Once, if it cannot be compiled; then it runs as it is.
        """
        form = _form(args)
        if self._form is None:
            self._form = form
            try:
                self._compiled = self._made(args)
            except Exception as error:
                warnings.warn(
                    f"compile=True: {self._name} runs without being compiled, because that "
                    f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}",
                    stacklevel=2,
                )
        if self._compiled is None or form != self._form:
            return self._function(*args)
        with torch.no_grad():
            result: T = self._compiled(*args)
        return result

    def _made(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        from torch.fx.experimental.proxy_tensor import make_fx

        graph = make_fx(self._function)(*args)
        compiled = torch.compile(graph, backend=self._backend)
        with torch.no_grad(), keeping_layout(graph):
            compiled(*args)  # it is compiled at its first call
        return compiled


def _form(args: tuple[Any, ...]) -> Any:
    leaves, structure = pytree.tree_flatten(args)
    return structure, [
        (tuple(t.shape), t.stride(), t.dtype, t.device) if isinstance(t, Tensor) else t
        for t in leaves
    ]
