"""Functions of tensors, traced once and compiled by torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sharpkit.channels_last import keeping_layout

BACKEND: str | Callable[..., Any] = "inductor"
T = TypeVar("T")


@dataclass(frozen=True)
class Traced:
    """What a function did with tensors, down to the operations that reach the device.

    Attributes:
        graph: Of the tensors in its arguments, then of `taken`; returns those in its result.
        taken: Tensors that it took from elsewhere.
        structure: Of the result, with all that is no tensor in it.
    """

    graph: fx.GraphModule
    taken: list[Tensor]
    structure: Callable[[Sequence[Tensor]], Any]


@dataclass(frozen=True)
class Code:
    """A traced function, compiled; it holds nothing of the function.

    Attributes:
        run: Of the tensors of `Traced.graph`.
        taken: As of `Traced`.
        structure: As of `Traced`.
    """

    run: Callable[..., Sequence[Tensor]]
    taken: list[Tensor]
    structure: Callable[[Sequence[Tensor]], Any]

    def __call__(self, args: tuple[Any, ...], taken: Sequence[Tensor] | None = None) -> Any:
        """What the function returns, to rounding.

        Args:
            args: Arguments of the form of those it was traced with.
            taken: In place of what it took from elsewhere, in the same order; None for the same.
        """
        with torch.no_grad(), _without_autocast():
            found = self.run(*tensors_of(args), *(self.taken if taken is None else taken))
        return self.structure(found)


def trace(function: Callable[..., Any], args: tuple[Any, ...]) -> Traced:
    """Run a function and note what it does; numbers and the like in `args` are constants.

    Raises:
        Exception: Of torch, if what it does depends on values.

    Example:
        >>> scale = torch.full((2,), 3.0)
        >>> traced = trace(lambda x: {"scaled": scale * x}, (torch.ones(2),))
        >>> traced.taken[0] is scale
        True
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    leaves, given = pytree.tree_flatten(args)
    form: list[Any] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        parts = iter(tensors)
        filled = [next(parts) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        found, spec = pytree.tree_flatten(function(*pytree.tree_unflatten(filled, given)))
        rest = [None if isinstance(leaf, Tensor) else leaf for leaf in found]
        form[:] = [[isinstance(leaf, Tensor) for leaf in found], rest, spec]
        return [leaf for leaf in found if isinstance(leaf, Tensor)]

    with torch.autograd.set_multithreading_enabled(False):
        graph = make_fx(flat)(*tensors_of(args))
    places, rest, spec = form

    def structure(tensors: Sequence[Tensor]) -> Any:
        parts = iter(tensors)
        filled = [next(parts) if place else leaf for place, leaf in zip(places, rest, strict=True)]
        return pytree.tree_unflatten(filled, spec)

    return Traced(*_with_inputs(graph), structure)


def compiled(traced: Traced, args: tuple[Any, ...], backend: str | None = None) -> Code:
    """Compile what was traced, by a backend of torch's (inductor), for the form of `args`.

    It runs once, so what it writes to its tensors is written.
    """
    from torch._dynamo.backends.registry import lookup_backend

    inputs = [*tensors_of(args), *traced.taken]
    with torch.no_grad(), _without_autocast(), keeping_layout(traced.graph):
        run: Any = lookup_backend(BACKEND if backend is None else backend)(traced.graph, inputs)
        run(*inputs)  # what is compiled late, is compiled here
    return Code(run, traced.taken, traced.structure)


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

    def __init__(self, function: Callable[..., T], name: str, backend: str | None = None) -> None:
        self._function, self._name, self._backend = function, name, backend
        self._form: Any = None
        self._code: Code | None = None

    def __call__(self, *args: Any) -> T:
        """What the function returns, to rounding.

        Warns:
            UserWarning: Once, if it cannot be compiled; then it runs as it is.
        """
        form = form_of(args)
        if self._form is None:
            self._form = form
            try:
                self._code = compiled(trace(self._function, args), args, self._backend)
            except Exception as error:
                warnings.warn(
                    f"compile=True: {self._name} runs without being compiled, because that "
                    f"failed: {failure(error)}",
                    stacklevel=2,
                )
        if self._code is None or form != self._form:
            return self._function(*args)
        result: T = self._code(args)
        return result


def tensors_of(args: Any) -> list[Tensor]:
    """The tensors in a structure, in order."""
    return [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]


def form_of(args: Any) -> Any:
    """The structure with shapes, strides, types and devices of its tensors; all else as it is."""
    leaves, structure = pytree.tree_flatten(args)
    return str(structure), tuple(
        (tuple(t.shape), t.stride(), t.dtype, t.device) if isinstance(t, Tensor) else t
        for t in leaves
    )


def failure(error: Exception) -> str:
    """What went wrong, in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _with_inputs(traced: fx.GraphModule) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph with the tensors that it holds as further inputs, and these tensors."""
    traced.graph.eliminate_dead_code()  # tensors were only looked at there
    held = {
        node: tensor
        for node in traced.graph.nodes
        if node.op == "get_attr" and isinstance(tensor := getattr(traced, node.target), Tensor)
    }
    distinct = list({id(tensor): tensor for tensor in held.values()}.values())
    graph = fx.Graph()
    copies = {
        node: graph.node_copy(node) for node in traced.graph.nodes if node.op == "placeholder"
    }
    inputs: dict[int, fx.Node] = {}
    for i, tensor in enumerate(distinct):
        inputs[id(tensor)] = graph.placeholder(f"taken_{i}")
        inputs[id(tensor)].meta["val"] = tensor
    for node in traced.graph.nodes:
        if node in held:
            copies[node] = inputs[id(held[node])]
        elif node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(traced, graph), distinct


@contextmanager
def _without_autocast() -> Iterator[None]:
    """Inside, operations keep the types that they were traced with."""
    enabled = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    try:
        for kind in enabled:
            torch.set_autocast_enabled(kind, False)
        yield
    finally:
        for kind in enabled:
            torch.set_autocast_enabled(kind, True)
