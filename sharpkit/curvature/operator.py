"""Curvature matrices that are never formed: products with vectors, summed over a data set."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from tqdm import tqdm

from sharpkit.contract.examples import Data, Examples
from sharpkit.contract.functional import frozen
from sharpkit.contract.losses import Loss
from sharpkit.contract.parameters import Parameters
from sharpkit.curvature.memory import gigabytes, require_memory
from sharpkit.curvature.plan import Plan, graph_bytes, make_plan
from sharpkit.curvature.problem import (
    make_problem,
    missing_derivative,
    refuse_training_mode,
)
from sharpkit.curvature.rules import fast_rules
from sharpkit.errors import ArgumentError, ModelError

# maps a vector, as one tensor per parameter, to the product; None stands for zeros
Product = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]

# in the order in which they are tried; the second is for models that transform convolutions
_Mode = Literal["reverse", "plain reverse", "forward"]
_MODES: tuple[_Mode, ...] = ("reverse", "plain reverse", "forward")


@dataclass(frozen=True)
class Linearised:
    """A chunk of examples, linearised at the weights: its loss, gradient and matrix."""

    loss: Tensor  # scalar, detached
    gradient: Sequence[Tensor | None]  # per parameter, None where it is not used
    product: Product


def owning_edge(tensor: Tensor) -> GradientEdge:
    """Where the graph of a tensor ends: keeps the graph for later products, but not the tensor.

    It is that of a view: the edge of a Python function's own output does not keep it alive in
    PyTorch 2.6 to 2.8.
    """
    with torch.enable_grad():
        return get_gradient_edge(tensor.view_as(tensor))


class CurvatureOperator(ABC):
    """A symmetric P x P matrix, the mean over examples of one matrix each.

    Subclasses say how one chunk of examples is linearised; everything about data, memory and
    vectors is here. The graph of each chunk is recorded once and kept while the memory budget
    lasts; the other chunks are recorded again for every call, once for all vectors of the call.
    The operator belongs to the weights at its construction and is unaffected by later training.
    Use it as a context manager, or call `close`, to free the graphs early.

    Attributes:
        shape: (P, P).
        dtype: float32 or float64, that of the parameters.
        device: Where the parameters are.
        parameters: Name to shape of every selected parameter, in the order of the P coordinates.
        n: Number of examples.
        chunks: Number of chunks.
        kept_chunks: How many of them are kept.
        kept_bytes: Memory that the kept graphs take, estimated.
        loss: The mean loss.
        gradient: The gradient of the mean loss, shape (P,).
        unused: Parameters that the loss does not depend on: their rows and columns are zero.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        *,
        loss: Loss = "cross_entropy",
        parameters: Parameters = None,
        n: int | None = None,
        seed: int | None = None,
        chunk: int | Literal["auto"] = "auto",
        memory_budget: int | None = None,
        progress: bool = True,
    ) -> None:
        refuse_training_mode(model)
        if memory_budget is not None and memory_budget < 0:
            raise ArgumentError(f"memory_budget must be 0 or more bytes, got {memory_budget}")
        if chunk != "auto" and not (isinstance(chunk, int) and chunk >= 1):
            raise ArgumentError(f'chunk must be "auto" or a positive integer, got {chunk!r}')
        with frozen(model):
            self._problem = make_problem(model, data, loss, parameters, n, seed)
            self._leaves = list(self._problem.weights.values())
            self._mode = self._derivative_mode()
            known = [*self._leaves, *self._problem.others.values()]
            self._plan: Plan = make_plan(
                self.n,
                (0, 0)
                if self._mode == "forward"
                else graph_bytes(self._record_first, self.n, known),
                self._leaves,
                chunk,
                0 if self._mode == "forward" else memory_budget,
            )
            self._record(progress)

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P) for P selected parameters."""
        size = sum(w.numel() for w in self._problem.weights.values())
        return size, size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters and of every product."""
        return next(iter(self._problem.weights.values())).dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters and of every product."""
        return next(iter(self._problem.weights.values())).device

    @property
    def parameters(self) -> Mapping[str, torch.Size]:
        """Name to shape of the selected parameters, in the order of the coordinates."""
        return {name: w.shape for name, w in self._problem.weights.items()}

    @property
    def n(self) -> int:
        """The number of examples."""
        return len(self._problem.examples)

    @property
    def chunks(self) -> int:
        """The number of chunks."""
        return len(self._plan.bounds)

    @property
    def kept_chunks(self) -> int:
        """The number of chunks whose graph is in memory."""
        return sum(product is not None for product in self._kept)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector of shape (P,) as one tensor per parameter (views), by name."""
        return {
            name: part.view(shape)
            for part, (name, shape) in zip(
                torch.split(vector, [s.numel() for s in self.parameters.values()]),
                self.parameters.items(),
                strict=True,
            )
        }

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One tensor per parameter, by name, as a vector of shape (P,)."""
        return torch.cat([tensors[name].reshape(-1) for name in self.parameters])

    def matvec(self, vector: Tensor) -> Tensor:
        """The product with one vector, (P,) -> (P,).

        Raises:
            ArgumentError: If the shape is not (P,).
        """
        if vector.shape != (self.shape[0],):
            raise ArgumentError(
                f"expected a vector of shape ({self.shape[0]},), got {tuple(vector.shape)}"
            )
        return self.matmat(vector.unsqueeze(1)).squeeze(1)

    def matmat(self, vectors: Tensor) -> Tensor:
        """The products with k vectors, the columns of a matrix, (P, k) -> (P, k).

        The result is laid out so that its columns are contiguous.

        Raises:
            ArgumentError: If the shape is not (P, k).
        """
        if vectors.ndim != 2 or vectors.shape[0] != self.shape[0]:
            raise ArgumentError(
                f"expected vectors of shape ({self.shape[0]}, k), got {tuple(vectors.shape)}"
            )
        rows = vectors.detach().to(self.device, self.dtype).T
        inputs = [list(self.split(row.contiguous()).values()) for row in rows]
        out = torch.zeros(rows.shape, dtype=self.dtype, device=self.device)
        outputs = [list(self.split(row).values()) for row in out]
        complete = self.kept_chunks == self.chunks
        with nullcontext() if complete else frozen(self._problem.model):
            for (start, stop), kept in zip(self._plan.bounds, self._kept, strict=True):
                product = (
                    kept or self._linearise(self._problem.examples_between(start, stop)).product
                )
                for vector, total in zip(inputs, outputs, strict=True):
                    _add(total, product(vector), (stop - start) / self.n)
        return out.T

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.matvec(other) if other.ndim == 1 else self.matmat(other)

    def to_dense(self) -> Tensor:
        """The matrix itself, shape (P, P), symmetrised; P products.

        Raises:
            ArgumentError: If it does not fit the memory.
        """
        size = self.shape[0]
        item = self.dtype.itemsize
        require_memory(
            3 * size * size * item,
            self.device,
            f"a dense {size} x {size} matrix",
            "use products, or select fewer parameters",
        )
        dense = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for start in range(0, size, 64):
            stop = min(start + 64, size)
            block = torch.zeros(size, stop - start, dtype=self.dtype, device=self.device)
            block[torch.arange(start, stop), torch.arange(stop - start)] = 1.0
            dense[:, start:stop] = self.matmat(block)
        return (dense + dense.T) / 2

    def to_scipy(self) -> Any:
        """The operator as a `scipy.sparse.linalg.LinearOperator` on NumPy vectors."""
        import numpy as np
        from scipy.sparse.linalg import LinearOperator

        def apply(array: Any) -> Any:
            columns = torch.from_numpy(np.array(array, dtype=dtype).reshape(self.shape[0], -1))
            return self.matmat(columns).cpu().numpy().reshape(np.shape(array))

        dtype = np.float64 if self.dtype == torch.float64 else np.float32
        return LinearOperator(
            self.shape, matvec=apply, rmatvec=apply, matmat=apply, rmatmat=apply, dtype=dtype
        )

    def close(self) -> None:
        """Free the kept graphs; products still work, and record what they need."""
        self._kept[:] = [None] * len(self._kept)
        self.kept_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.shape[0]} x {self.shape[1]}, {self.dtype}, "
            f"{self.device}, n={self.n}, {self.kept_chunks} of {self.chunks} chunks kept, "
            f"{gigabytes(self.kept_bytes)})"
        )

    @abstractmethod
    def _reverse(self, chunk: Examples) -> Linearised:
        """Linearise a chunk with reverse mode only, keeping its graph."""

    @abstractmethod
    def _forward(self, chunk: Examples) -> Linearised:
        """Linearise a chunk for models that lack second reverse-mode derivatives."""

    def _linearise(self, chunk: Examples, mode: _Mode | None = None) -> Linearised:
        mode = mode or self._mode
        if mode == "forward":
            return self._forward(chunk)
        with fast_rules() if mode == "reverse" else nullcontext():
            return self._reverse(chunk)

    def _derivative_mode(self) -> _Mode:
        """Reverse over reverse mode, or forward over reverse where an operation needs it."""
        few = self._problem.examples_between(0, 1)
        ones = [torch.ones_like(w) for w in self._leaves]
        missing: dict[_Mode, str] = {}
        for mode in _MODES:
            try:
                self._linearise(few, mode).product(ones)
            except (RuntimeError, NotImplementedError) as error:
                operation = missing_derivative(error)
                if operation is None:
                    raise
                missing[mode] = operation
                continue
            if mode == "forward":
                warnings.warn(
                    f"{missing['plain reverse']} has no second reverse-mode derivative: using "
                    "forward over reverse mode, which keeps no graph and is slower",
                    stacklevel=4,
                )
            return mode
        raise ModelError(
            f"the model cannot be differentiated twice: {missing['plain reverse']} has no second "
            f"reverse-mode derivative, and {missing['forward']} no forward-mode derivative; use a "
            "plain implementation of it (for attention, the math kernel or "
            "attn_implementation='eager')"
        )

    def _record_first(self, count: int) -> Linearised:
        return self._linearise(self._problem.examples_between(0, count))

    def _record(self, progress: bool) -> None:
        """Go over the data once: the loss, the gradient, and the graphs that are kept."""
        self._kept: list[Product | None] = []
        self.kept_bytes = self._plan.keep_bytes
        self.loss = 0.0
        self.gradient = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        parts = list(self.split(self.gradient).values())
        used: set[int] = set()
        for start, stop in self._progress(progress):
            linear = self._linearise(self._problem.examples_between(start, stop))
            value = float(linear.loss)
            if value != value or value in (float("inf"), float("-inf")):
                raise ModelError(
                    f"the loss of examples {start} to {stop - 1} is {value}: "
                    "expected a finite number"
                )
            share = (stop - start) / self.n
            self.loss += share * value
            used.update(i for i, g in enumerate(linear.gradient) if g is not None)
            _add(parts, linear.gradient, share)
            self._kept.append(linear.product if len(self._kept) < self._plan.keep else None)
        self._report_unused(used)

    def _progress(self, progress: bool) -> Iterator[tuple[int, int]]:
        yield from tqdm(
            self._plan.bounds,
            desc="linearising",
            unit="chunk",
            leave=False,
            delay=2,
            disable=None if progress else True,
        )

    def _report_unused(self, used: set[int]) -> None:
        names = list(self.parameters)
        self.unused = [name for i, name in enumerate(names) if i not in used]
        if len(self.unused) == len(names):
            raise ModelError(
                "the loss does not depend on any selected parameter "
                "(a forward under no_grad, or a detach?)"
            )
        if self.unused:
            warnings.warn(
                f"the loss does not depend on {', '.join(self.unused)}: "
                "their rows and columns are zero",
                stacklevel=4,
            )


def _add(totals: Sequence[Tensor], terms: Sequence[Tensor | None], weight: float) -> None:
    """Add weight times each term that is there, in place."""
    pairs = [(a, b) for a, b in zip(totals, terms, strict=True) if b is not None]
    if pairs:
        first, second = map(list, zip(*pairs, strict=True))
        torch._foreach_add_(first, second, alpha=weight)
