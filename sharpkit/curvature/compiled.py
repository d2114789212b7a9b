"""Products by compiled code: `compile=True`.

The product of a chunk is traced once per shape, from the examples to the result. What does not
depend on the vector is separated and computed when the chunk is recorded; what is left, the product
itself, is compiled. So compiled products keep what others keep, and compute no forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sharpkit.channels_last import keeping_layout
from sharpkit.contract.checks import reason
from sharpkit.contract.examples import Examples
from sharpkit.curvature.chunks import Linearised
from sharpkit.curvature.problem import Problem
from sharpkit.curvature.second_derivatives import Product, Tensors

BACKEND = "inductor"
Linearise = Callable[[Examples], Linearised]


class CompiledProducts:
    """The compiled products of an operator, one per shape of chunks.

    The model holds its weights in every call; `linearise` is traced.
    """

    def __init__(self, problem: Problem, linearise: Linearise) -> None:
        self._problem, self._linearise = problem, linearise
        self._parts: dict[Any, tuple[fx.GraphModule, Callable[..., Any]]] = {}

    def __call__(self, chunk: Examples) -> tuple[Tensor, Product, int]:
        """A chunk's mean loss, its compiled product, and the bytes that this keeps."""
        tensors, structure = pytree.tree_flatten((chunk.inputs, chunk.labels))
        key = tuple((t.shape, t.stride(), t.dtype) for t in tensors), str(structure)
        if key not in self._parts:
            self._parts[key] = self._compiled(tensors, structure)
        before, product = self._parts[key]
        with torch.no_grad():
            mean, *kept = before(*tensors)

        def multiply(vector: Tensors) -> Sequence[Tensor | None]:
            with torch.no_grad():
                return list(product(*vector, *kept))

        return mean, multiply, _own_bytes(kept, [*self._problem.leaves, *tensors])

    def _compiled(
        self, tensors: list[Tensor], structure: Any
    ) -> tuple[fx.GraphModule, Callable[..., Any]]:
        from torch._dynamo.backends.registry import lookup_backend
        from torch.fx.experimental.proxy_tensor import make_fx

        weights = self._problem.weights.values()
        vector = [torch.zeros_like(w, requires_grad=False) for w in weights]
        count = len(vector)

        def whole(*args: Tensor) -> list[Tensor]:
            inputs, labels = pytree.tree_unflatten(list(args[count:]), structure)
            linear = self._linearise(Examples(inputs, labels))
            return [linear.mean, *self._problem.filled(linear.product(args[:count]))]

        with torch.autograd.set_multithreading_enabled(False):
            traced = make_fx(whole)(*vector, *tensors)
        before, product = _separated(traced, count)
        with torch.no_grad(), keeping_layout(traced):
            _, *kept = before(*tensors)
            compiled = lookup_backend(BACKEND)(product, [*vector, *kept])
            compiled(*vector, *kept)  # what is compiled late, is compiled here
        return before, compiled


def try_compile(
    problem: Problem, linearise: Linearise, chunk: Examples
) -> tuple[CompiledProducts | None, str]:
    """Compiled products, or None and the reason why not, after a trial with a chunk."""
    products = CompiledProducts(problem, linearise)
    try:
        product = products(chunk)[1]
        wrong = _differs(problem, product, linearise(chunk).product)
    except Exception as error:  # a compiler is missing, or does not take the model
        return None, reason(error, problem.function.model)
    return (None, wrong) if wrong else (products, "")


def _differs(problem: Problem, found: Product, expected: Product) -> str:
    """How two products with a random vector differ by more than rounding; "" if they do not."""
    generator = torch.Generator().manual_seed(0)
    vector = [
        torch.randn(w.shape, generator=generator, dtype=w.dtype).to(w.device)
        for w in problem.weights.values()
    ]
    a, b = (
        torch.cat([t.reshape(-1) for t in problem.filled(f(vector))]) for f in (found, expected)
    )
    error, size = float((a - b).norm()), float(b.norm())
    # a network may amplify rounding; an error in the graph is not of this size
    if error <= torch.finfo(a.dtype).eps ** 0.5 * size:
        return ""
    return f"its products differ from those of the eager graph by {error / (size or 1.0):.2g}"


def _separated(traced: fx.GraphModule, count: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """What does not depend on the first `count` inputs, and what does with that as inputs."""
    nodes = list(traced.graph.nodes)
    given = [node for node in nodes if node.op == "placeholder"]
    end = nodes[-1]
    mean, *results = end.args[0]
    late = _dependent(nodes[:-1], given[:count])
    kept = dict.fromkeys(
        [a for node in nodes if node in late for a in node.all_input_nodes if a not in late]
        + [node for node in results if node not in late]
    )
    if mean in late:
        raise NotImplementedError("the loss is not computed before its product")
    before = _graph([n for n in nodes[:-1] if n not in late], given[count:], [mean, *kept])
    after = _graph([n for n in nodes if n in late], [*given[:count], *kept], results)
    return fx.GraphModule(traced, before), fx.GraphModule(traced, after)


def _graph(
    nodes: Iterable[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.Graph:
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"input_{i}") for i, node in enumerate(inputs)}
    for node in nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in outputs])
    graph.eliminate_dead_code()
    return graph


def _dependent(nodes: Sequence[fx.Node], sources: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on the sources, and fresh tensors that such a node writes to."""
    found: set[fx.Node] = set(sources)
    while True:
        size = len(found)
        for node in nodes:
            if node.op == "placeholder" or node in found:
                continue
            if any(a in found for a in node.all_input_nodes):
                found.add(node)
        for node in [n for n in nodes if n in found and _writes(n)]:
            target = node.all_input_nodes[0]
            if target not in found:
                if any(a.op != "call_function" for a in (target, *target.all_input_nodes)):
                    raise NotImplementedError(f"{node.target} writes to what is kept")
                found.add(target)
        if len(found) == size:
            return found


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _own_bytes(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> int:
    """Bytes of the storages of the first that are not of the second."""
    known = {t.untyped_storage().data_ptr() for t in others}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for place, size in storages.items() if place not in known)
