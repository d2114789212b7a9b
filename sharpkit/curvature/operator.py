"""Curvature matrices that are never formed: products with vectors, summed over a data set."""

from __future__ import annotations

import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from sharpkit.contract.distributed_data import DistributedData
from sharpkit.contract.examples import Examples
from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data, as_data
from sharpkit.contract.losses import Loss
from sharpkit.contract.parameters import Parameters
from sharpkit.contract.precision import current_precision, precision
from sharpkit.contract.ranks import ALONE
from sharpkit.contract.shares import read_share
from sharpkit.contract.team_checks import require_same_arguments, require_same_weights
from sharpkit.curvature.chunks import Linearised, chunk_plan, graph_bytes
from sharpkit.curvature.differences import TOLERANCES, Differences, probe
from sharpkit.curvature.fast_rules import fast_rules
from sharpkit.curvature.memory import gigabytes, require_memory
from sharpkit.curvature.plain_rules import plain_rules
from sharpkit.curvature.problem import Problem, make_problem, refuse_training_mode
from sharpkit.curvature.recording import Recording, choose_way
from sharpkit.curvature.second_derivatives import (
    Method,
    Mode,
    Moved,
    Product,
    Tensors,
    choose_mode,
    without_padding,
)
from sharpkit.errors import ArgumentError, DataError, ModelError


class _Sums(NamedTuple):
    """What the examples of one process give: see `Recording`."""

    n: int
    weight: float
    loss: float
    used: set[int]
    mode: Mode
    why: str  # what is wrong with the modes before


def owning_edge(tensor: Tensor) -> GradientEdge:
    """Where the graph of a tensor ends: keeps the graph for later products, but not the tensor.

    It is that of a view: the edge of a Python function's own output does not keep it alive in
    PyTorch 2.6 to 2.8.
    """
    with torch.enable_grad():
        return get_gradient_edge(tensor.view_as(tensor))


class CurvatureOperator(ABC):
    """A symmetric P x P matrix, the mean over examples of one matrix each, as the loss is.

    Subclasses say how one chunk of examples is linearised; everything about data, memory and
    vectors is here. The graph of each chunk is recorded once and kept while the memory budget
    lasts; the other chunks are recorded again for every call, once for all vectors of the call.
    Whenever PyTorch differentiates, the model holds the operator's own copies of the weights: later
    training changes no product.
    Use it as a context manager, or call `close`, to free the graphs early.

    With `DistributedData` each process has the graphs of its share of the examples, and a product
    is the sum of theirs, by one all-reduce. All of them make every product, with the same vectors.

    Attributes:
        shape: (P, P).
        dtype: float32 or float64, that of the parameters.
        device: Where the parameters are.
        parameters: Name to shape of every selected parameter, in the order of the P coordinates;
            a complex one has pairs of reals, shape (..., 2).
        left_out: Names of the parameters that are not selected.
        precision: "full", or "tf32" if made inside `precision("tf32")`; that of every product.
        mode: How second derivatives are computed: "reverse", "plain reverse" (without this
            package's rules for convolutions), "forward" over reverse, which keeps no graph, or
            "finite difference" where there are none.
        tolerance: The relative error that a product by finite differences may have.
        errors: The estimated norms of the errors of the last products by finite differences, one
            per vector; empty for others.
        product_error: The largest ‖error‖ / ‖v‖ so far of products by finite differences; 0 for
            others, which are exact but for rounding.
        compiled: Whether products run as compiled code.
        n: Number of examples, of all processes.
        team: The processes that compute products together; mostly this one alone.
        chunks: Number of chunks of this process; so are `kept_chunks` and `kept_bytes`.
        kept_chunks: How many of them are kept.
        kept_bytes: Memory that the kept graphs take, estimated.
        loss: The mean loss.
        gradient: The gradient of the mean loss, shape (P,).
        unused: Parameters that the loss does not depend on: their rows and columns are zero.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data | DistributedData,
        *,
        loss: Loss = "cross_entropy",
        parameters: Parameters = None,
        n: int | None = None,
        seed: int | None = None,
        chunk: int | Literal["auto"] = "auto",
        memory_budget: int | None = None,
        compile: bool = False,
        method: Method = "auto",
        tolerance: float | None = None,
        progress: bool = True,
    ) -> None:
        self.team = data.team if isinstance(data, DistributedData) else ALONE
        self.precision = current_precision()

        def check() -> None:
            refuse_training_mode(model)
            _check_arguments(method, chunk, memory_budget, tolerance)

        self.team.gathered(check)
        require_same_arguments(
            self.team, model, kind=type(self).__name__, loss=loss, parameters=parameters, n=n,
            seed=seed, method=method, tolerance=tolerance, precision=self.precision,
        )  # fmt: skip
        require_same_weights(self.team, model)
        if isinstance(data, DistributedData):
            data, n, seed = self._own_share(data, n, seed), None, None
        with frozen(model) as found:

            def construct() -> _Sums:
                self._problem = make_problem(model, data, loss, parameters, n, seed, found)
                self._check(self._problem)
                self.tolerance = tolerance or TOLERANCES[self.dtype]
                return self._problem.run(
                    lambda: self._construct(method, chunk, memory_budget, compile, progress)
                )

            sums = self.team.gathered(construct)
            self._problem.run(lambda: self._join(sums))
            self.team.gathered(self._problem.probe.confirm)
        self._warn()

    def _own_share(self, data: DistributedData, n: int | None, seed: int | None) -> Data:
        share = read_share(data, n=n, seed=seed, twice=True)
        if share.total < self.team.world:
            raise ArgumentError(
                f"{share.total} examples for {self.team.world} ranks: expected one or more for "
                "each; measure in one process"
            )
        return as_data(share.examples)

    def _construct(
        self,
        method: Method,
        chunk: int | Literal["auto"],
        memory_budget: int | None,
        compile: bool,
        progress: bool,
    ) -> _Sums:
        """Choose mode and chunks, and go over this share of the data once."""
        problem = self._problem
        self.mode, self._why = choose_mode(problem, self._by_differences, self._product, method)
        keeping = self.mode in ("reverse", "plain reverse")
        known = [*problem.leaves, *problem.fixed.values()]
        plan = chunk_plan(
            problem.examples,
            (0, 0) if self.mode == "forward" else self._graph_bytes(problem, known),
            list(problem.weights.values()),
            chunk,
            memory_budget if keeping else 0,
        )
        self._differences = Differences(list(problem.weights.values()), self.tolerance)
        me = weakref.proxy(self)  # no cycle: the graphs are freed with the operator

        def linearise(chunk: Examples) -> Linearised:
            return me._linearise(chunk)  # type: ignore[no-any-return]

        way = choose_way(problem, linearise, plan, self.mode, self._why, compile)
        self._recording = Recording(problem, linearise, plan, way)
        self._gradient_part = self._recording.record(progress and self.team.rank == 0)
        found = self._recording
        return _Sums(
            len(problem.examples), found.weight, found.loss, found.used, self.mode, self._why
        )

    def _join(self, sums: Sequence[_Sums]) -> None:
        """What is known when all shares have been gone over: totals, loss, gradient.

        Raises:
            DataError: If no label counts.
            ModelError: If the loss depends on nothing, or only some shares have exact products.
        """
        modes = [share.mode == "finite difference" for share in sums]
        if any(modes) and not all(modes):
            rank = modes.index(True)
            raise ModelError(
                f"rank {rank} takes finite differences, and others do not: its examples lead to "
                f"operations without second derivatives ({sums[rank].why}); pass "
                'method="finite_difference" on every rank'
            )
        self._n = sum(share.n for share in sums)
        self._total = sum(share.weight for share in sums)
        if not self._total > 0:
            raise DataError("no label counts: the weights of the loss are 0 for all examples")
        self.loss = sum(share.loss for share in sums) / self._total
        self._gradient_part /= self._total
        self.gradient = part = self._gradient_part
        if self.team.world > 1:

            def add(total: Tensor) -> None:
                total.add_(part)

            self.gradient = self.team.summed(len(part), part, add, same=part[:0])
        used = set[int]().union(*(share.used for share in sums))
        names = list(self.parameters)
        self.unused = [name for i, name in enumerate(names) if i not in used]
        if len(self.unused) == len(names):
            raise ModelError(
                "the loss does not depend on any selected parameter "
                "(a forward under no_grad, or a detach?)"
            )
        if self.mode == "finite difference":
            self._probe_differences()
        else:
            del self._gradient_part  # differences alone need it

    def _graph_bytes(self, problem: Problem, known: list[Tensor]) -> tuple[int, int]:

        def linearised(examples: Examples) -> Linearised:
            return self._linearise(problem.on_device(examples))

        record = self._loss_graph if self.mode == "finite difference" else linearised
        return graph_bytes(record, problem.examples, known, problem.probe.at_most(4))

    @property
    def compiled(self) -> bool:
        """Whether products run as compiled code."""
        return self._recording.way.compiled is not None

    @property
    def errors(self) -> tuple[float, ...]:
        """Estimated norms of the errors of the last products by finite differences."""
        return self._differences.errors

    @property
    def product_error(self) -> float:
        """The largest ‖error‖ / ‖v‖ so far of products by finite differences."""
        return self._differences.largest

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
    def left_out(self) -> tuple[str, ...]:
        """The names of the parameters that are not selected."""
        return self._problem.left_out

    @property
    def n(self) -> int:
        """The number of examples, of all processes."""
        return self._n

    @property
    def chunks(self) -> int:
        """The number of chunks."""
        return len(self._recording.chunks)

    @property
    def kept_chunks(self) -> int:
        """The number of chunks whose graph is in memory."""
        return sum(chunk.product is not None for chunk in self._recording.chunks)

    @property
    def kept_bytes(self) -> int:
        """Memory that the kept graphs take, estimated."""
        return self._recording.kept_bytes

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
        rows = vectors.detach().to(self.device, self.dtype).T.contiguous()
        multiply = self._multiplied
        if self.mode == "finite difference":
            multiply = self._differenced
        restoring = self.kept_chunks < self.chunks
        with precision(self.precision), self._problem.still(restoring):
            return self._problem.run(lambda: multiply(rows)).T

    def _multiplied(self, rows: Tensor) -> Tensor:
        """The products with rows (k, P): what all processes add up in one all-reduce."""

        recording = self._recording
        shares = [self._share(chunk.weight) for chunk in recording.chunks]

        def add(total: Tensor) -> None:
            inputs, outputs = self._blocks(rows), self._blocks(total.view(rows.shape))
            recording.add_products(inputs, outputs, shares)

        return self.team.summed(rows.numel(), rows, add, same=rows).view(rows.shape)

    def _differenced(self, rows: Tensor) -> Tensor:
        """The same by finite differences, whose steps follow from sums over all processes."""
        out = torch.zeros_like(rows)
        self._add_differences(self._blocks(rows), self._blocks(out))
        return out

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.matvec(other) if other.ndim == 1 else self.matmat(other)

    def to_dense(self) -> Tensor:
        """The matrix itself, shape (P, P), symmetrised; P products.

        Raises:
            ArgumentError: If it does not fit the memory.
        """
        size = self.shape[0]
        item = self.dtype.itemsize
        self.team.gathered(
            lambda: require_memory(
                3 * size * size * item,
                self.device,
                f"a dense {size} x {size} matrix",
                "use products, or select fewer parameters",
            )
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
        self._recording.free()

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

    @abstractmethod
    def _by_differences(self, moved: Moved, chunk: Examples, step: float) -> Sequence[Tensor]:
        """A chunk's product with the direction of `moved`, from first derivatives alone."""

    @abstractmethod
    def _difference(self, vector: Tensors, step: float) -> Sequence[Tensors]:
        """The product with one vector by differences over all chunks, and the terms of its error.

        These are two vectors as well, one tensor per parameter; their norms count.
        """

    def _check(self, problem: Problem) -> None:  # noqa: B027
        """Raise for what this matrix is not defined for."""

    def _share(self, weight: float) -> float:
        """What the matrix of a chunk counts, given the weight of its loss."""
        return weight / self._total

    def _product(self, chunk: Examples, mode: Mode) -> Product:
        return self._linearise(chunk, mode).product

    def _linearise(self, chunk: Examples, mode: Mode | None = None) -> Linearised:
        mode = mode or self.mode
        with plain_rules(), fast_rules() if mode == "reverse" else nullcontext():
            if mode == "finite difference":
                return self._first_order(chunk)
            return self._forward(chunk) if mode == "forward" else self._reverse(chunk)

    def _first_order(self, chunk: Examples) -> Linearised:
        """Loss and gradient of a chunk; products by differences are of all chunks at once."""
        problem, leaves = self._problem, self._problem.leaves
        with torch.enable_grad():
            mean, weight = problem.terms(chunk)
            gradient: Sequence[Tensor | None] = [None] * len(leaves)
            if mean.requires_grad:
                shared = problem.function.has_complex  # the graph of pairs viewed as numbers
                gradient = torch.autograd.grad(mean, leaves, retain_graph=shared, allow_unused=True)
        return Linearised(mean.detach(), weight, problem.real(gradient), _of_no_chunk)

    def _loss_graph(self, examples: Examples) -> object:
        with plain_rules(), torch.enable_grad():
            return self._problem.terms(self._problem.on_device(examples))

    def _blocks(self, rows: Tensor) -> list[list[Tensor]]:
        """Rows (k, P) as views, one per parameter, of the vectors that are multiplied at once."""
        together = self._recording.way.together
        if together == 1:
            return [list(self.split(row).values()) for row in rows]
        shapes = self.parameters.values()
        sizes = [shape.numel() for shape in shapes]
        return [
            [
                part.view(len(block), *shape)
                for part, shape in zip(torch.split(block, sizes, 1), shapes, strict=True)
            ]
            for block in torch.split(rows, together)
        ]

    def _add_differences(self, inputs: Sequence[Tensors], outputs: Sequence[Tensors]) -> None:
        self.team.gathered(self._recording.check)
        vectors = [without_padding(self._problem, vector) for vector in inputs]
        with plain_rules():
            self._differences.add(self._difference_of_all, vectors, outputs)

    def _difference_of_all(self, vector: Tensors, step: float) -> Sequence[Tensors]:
        """`_difference` over the chunks of all processes, in one all-reduce."""
        if self.team.world == 1:
            return self._difference(vector, step)
        given = torch.cat([part.reshape(-1) for part in vector])

        def add(total: Tensor) -> None:
            for row, parts in zip(total.view(3, -1), self._difference(vector, step), strict=True):
                torch.cat([part.reshape(-1) for part in parts], out=row)

        total = self.team.summed(3 * given.numel(), given, add, same=given)
        return [list(self.split(row).values()) for row in total.view(3, -1)]

    def _probe_differences(self) -> None:
        """One product: whether differences tell at all, and how large products are.

        Raises:
            ModelError: If they do not.
        """
        gradient = list(self.split(self.gradient).values())
        for name, a, b in zip(
            self.parameters, gradient, without_padding(self._problem, gradient), strict=True
        ):
            if a is not b and not torch.equal(a, b):
                raise ModelError(
                    f"a row of {name!r} is padding in one place and weights in another, and "
                    "differences cannot move the one alone: leave padding_idx out"
                )
        vector = probe(self.shape[0]).to(self.dtype).to(self.device)
        product = torch.zeros_like(vector)
        inputs, outputs = ([list(self.split(t).values())] for t in (vector, product))
        try:
            self._add_differences(inputs, outputs)
        except ModelError as error:
            first = f"the model cannot be differentiated twice: {self._why}; and " * bool(self._why)
            raise ModelError(f"{first}{error}") from error
        self._differences.scale = float(product.norm() / vector.norm())

    def _warn(self) -> None:
        if self._why and self.mode == "finite difference":
            warnings.warn(
                "using finite differences, some five gradients for a product, which has an "
                f"estimated error: the model cannot be differentiated twice: {self._why}",
                stacklevel=3,
            )
        elif self._why:
            warnings.warn(
                f"using forward over reverse mode, which keeps no graph and is slower: {self._why}",
                stacklevel=3,
            )
        if self._recording.way.why_eager:
            why = self._recording.way.why_eager
            warnings.warn(f"compile=True has no effect: {why}", stacklevel=3)
        if self.unused:
            warnings.warn(
                f"the loss does not depend on {', '.join(self.unused)}: "
                "their rows and columns are zero",
                stacklevel=3,
            )


def _check_arguments(
    method: Method, chunk: int | Literal["auto"], memory_budget: int | None, tolerance: float | None
) -> None:
    if method not in get_args(Method):
        raise ArgumentError(f"method must be one of {get_args(Method)}, got {method!r}")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ArgumentError(f"tolerance must be between 0 and 1, got {tolerance}")
    if memory_budget is not None and memory_budget < 0:
        raise ArgumentError(f"memory_budget must be 0 or more bytes, got {memory_budget}")
    if chunk != "auto" and not (isinstance(chunk, int) and chunk >= 1):
        raise ArgumentError(f'chunk must be "auto" or a positive integer, got {chunk!r}')


def _of_no_chunk(vector: Tensors) -> Sequence[Tensor | None]:
    raise NotImplementedError("a product by differences is one of all chunks")
