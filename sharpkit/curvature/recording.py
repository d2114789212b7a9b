"""The graphs of one process's examples, chunk by chunk, and their products with vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sharpkit.contract.examples import Examples
from sharpkit.curvature.chunks import (
    Chunk,
    ChunkPlan,
    check_repeated,
    check_unchanged,
    read_losses,
    recorded,
)
from sharpkit.curvature.compiled import CompiledProducts, Linearise, try_compile
from sharpkit.curvature.plain_rules import plain_rules
from sharpkit.curvature.problem import Problem
from sharpkit.curvature.second_derivatives import Mode, Product, Tensors
from sharpkit.curvature.together import can_go_together, products_together
from sharpkit.progress import progress_bar


class Way(NamedTuple):
    """How vectors are multiplied: by compiled code, several at once, or one by one."""

    compiled: CompiledProducts | None
    why_eager: str  # what keeps products from being compiled that should be
    together: int  # vectors in one backward pass


def choose_way(
    problem: Problem, linearise: Linearise, plan: ChunkPlan, mode: Mode, why: str, compile: bool
) -> Way:
    """How vectors are multiplied, with the mode of second derivatives and why it is not another."""
    compiled, why_eager = None, ""
    if compile and mode == "finite difference":
        why_eager = "products are differences of first derivatives"
    elif compile and mode == "forward":
        why_eager = f"they take forward over reverse mode ({why})"
    elif compile:
        first = problem.on_device(problem.examples.slice(*plan.bounds[0]))
        compiled, why_eager = try_compile(problem, linearise, first)
    alone = compiled is not None or mode == "finite difference"
    together = 1 if alone else plan.together
    if together > 1 and mode != "forward":
        few = problem.few(problem.probe.at_most(2))
        together = together if can_go_together(problem, linearise(few).product) else 1
    return Way(compiled, why_eager, together)


class Recording:
    """What an operator keeps of its examples: chunks, and the graphs of the first of them.

    The others are recorded again in every call, once for all vectors of the call.

    Args:
        problem: Model, loss and examples.
        linearise: What the operator makes of a chunk on the device.
        plan: Where chunks start, and how many are kept.
        way: How vectors are multiplied.

    Attributes:
        chunks: Those of this process, once `record` has gone over them.
        kept_bytes: Memory that the kept graphs take, estimated.
        weight: The sum of the weights of the loss.
        loss: The sum of the losses, not their mean.
        used: Places of the parameters that the loss depends on.
    """

    def __init__(self, problem: Problem, linearise: Linearise, plan: ChunkPlan, way: Way) -> None:
        self._problem, self._linearise = problem, linearise
        self._plan, self.way = plan, way
        self.chunks: list[Chunk] = []
        self.kept_bytes: int = 0
        self.weight = self.loss = 0.0
        self.used: set[int] = set()

    def record(self, progress: bool) -> Tensor:
        """Go over the examples once; the sum of weights times gradients, shape (P,)."""
        weights = list(self._problem.weights.values())
        sizes = [w.numel() for w in weights]
        total = torch.zeros(sum(sizes), dtype=weights[0].dtype, device=weights[0].device)
        parts = [t.view(w.shape) for t, w in zip(torch.split(total, sizes), weights, strict=True)]
        losses: list[tuple[Tensor, Tensor]] = []
        for start, stop in progress_bar(
            iterable=self._plan.bounds, desc="linearising", unit="chunk", leave=False, delay=2,
            progress=progress,
        ):  # fmt: skip
            given = self._problem.examples.slice(start, stop)
            examples = self._problem.on_device(given)
            linear = self._linearise(examples)
            product = self._kept(examples, linear.product)
            self.chunks.append(recorded(start, stop, given, product))
            self.used.update(i for i, g in enumerate(linear.gradient) if g is not None)
            _add(parts, _times(linear.gradient, linear.weight), 1.0)
            losses.append((linear.mean, linear.weight))
        read_losses(self.chunks, losses)
        self.weight = sum(chunk.weight for chunk in self.chunks)
        self.loss = sum(chunk.mean * chunk.weight for chunk in self.chunks)
        return total

    def _kept(self, examples: Examples, product: Product) -> Product | None:
        """A chunk's product, if it is kept."""
        if self.way.compiled is None:
            keep = len(self.chunks) < self._plan.keep
            self.kept_bytes = self._plan.keep_bytes
            return product if keep else None
        _, product, size = self.way.compiled(examples)
        if self.kept_bytes + size > self._plan.budget:
            return None
        self.kept_bytes += size
        return product

    def examples(self, chunk: Chunk) -> Examples:
        """Those of a chunk, on the device."""
        return self._problem.on_device(self._problem.examples.slice(chunk.start, chunk.stop))

    def add_products(
        self, inputs: Sequence[Tensors], outputs: Sequence[Tensors], shares: Sequence[float]
    ) -> None:
        """Add to each output, in place, the sum over chunks of share times product.

        Where several vectors go together, tensors have an axis for them in front.
        """
        again: list[Chunk] = []
        means: list[Tensor] = []
        inputs = [list(map(_aligned, vector)) for vector in inputs]
        for chunk, share in zip(self.chunks, shares, strict=True):
            product = chunk.product
            if product is None:
                mean, product = self._recorded_again(chunk)
                again.append(chunk)
                means.append(mean)
            for vector, total in zip(inputs, outputs, strict=True):
                _add(total, self._multiply(product, vector), share)
        check_repeated(again, means)

    def _multiply(self, product: Product, vectors: Tensors) -> Sequence[Tensor | None]:
        if self.way.together == 1:
            return product(vectors)
        return products_together(self._problem, product, vectors)

    def _recorded_again(self, chunk: Chunk) -> tuple[Tensor, Product]:
        examples = self._problem.examples.slice(chunk.start, chunk.stop)
        check_unchanged(chunk, examples)
        examples = self._problem.on_device(examples)
        if self.way.compiled is not None:
            return self.way.compiled(examples)[:2]
        linear = self._linearise(examples)
        return linear.mean, linear.product

    def check(self) -> None:
        """Raise if the examples, or the loss of the first ones, are others than at first."""
        for chunk in self.chunks:
            check_unchanged(chunk, self._problem.examples.slice(chunk.start, chunk.stop))
        first = self.chunks[0]
        with plain_rules(), self._problem.function.evaluating():
            check_repeated([first], [self._problem.terms(self.examples(first))[0].detach()])

    def free(self) -> None:
        """Drop the kept graphs."""
        for chunk in self.chunks:
            chunk.product = None
        self.kept_bytes = 0


def _aligned(part: Tensor) -> Tensor:
    """Pairs of reals are viewed as complex numbers only if they begin at an even place."""
    pairs = part.ndim > 0 and part.shape[-1] == 2
    return part.clone() if pairs and part.storage_offset() % 2 else part


def _times(gradient: Sequence[Tensor | None], weight: Tensor) -> list[Tensor | None]:
    """Each gradient that is there times a number on the device, which the host need not know."""
    return [None if g is None else g * weight.to(g.dtype) for g in gradient]


def _add(totals: Sequence[Tensor], terms: Sequence[Tensor | None], weight: float) -> None:
    """Add weight times each term that is there, in place."""
    pairs = [(a, b) for a, b in zip(totals, terms, strict=True) if b is not None]
    if pairs:
        first, second = map(list, zip(*pairs, strict=True))
        with torch.no_grad():  # a backward pass of the user's own may return a graph
            torch._foreach_add_(first, second, alpha=weight)
