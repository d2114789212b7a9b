"""The Hessian of the mean loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from sharpkit.contract.examples import Examples
from sharpkit.curvature.chunks import Linearised
from sharpkit.curvature.differences import STEPS, extrapolated, moved
from sharpkit.curvature.operator import CurvatureOperator, owning_edge
from sharpkit.curvature.second_derivatives import Moved, Tensors
from sharpkit.curvature.vocabulary import OutputLayer, in_slices, slopes


class HessianOperator(CurvatureOperator):
    """The Hessian of the mean loss over the examples, as an operator on vectors.

    For weights w in R^P and examples (x_n, y_n),

        H = 1/N Σ_n ∇²_w ℓ(f(x_n; w), y_n),      H v = ∇_w [∇_w L(w)ᵀ v].

    A loss with weights of its own (class weights, labelled positions) is Σ of sums / Σ of weights,
    and so is H; a complex weight is two real ones. On a few examples, a product is compared with
    differences of the gradient, and refused if they do not agree.

    The gradient of each chunk is recorded once with its graph, and every product is one backward
    pass through that graph: about the cost of one gradient. Chunks past the memory budget are
    recorded again in each call, which costs about 2.2 gradients for a single vector.

    By finite differences (`method`) a product takes no second derivative and keeps no graph: four
    gradients, at w ± h v and w ± 2h v, give it with an estimate of its error (`errors`), and the
    step h is chosen anew until that is within the tolerance. Between them a ReLU may switch: the
    difference then has the average of the jump of the gradient, of which the exact product, at one
    point, sees nothing; the estimate counts it as an error.

    Args:
        model: Any module in eval mode; inputs in, one row of outputs per example out.
        data: A `Dataset` of (input, label) pairs, a `DataLoader` that does not shuffle, a list of
            (inputs, labels) batches, also of different lengths, or a pair (inputs of shape
            (N, ...), labels of shape (N,)); it must stay as it is while products are computed.
            With `DistributedData` each of several processes has a share of the examples.
        loss: "cross_entropy", "mse", a loss of torch's, or a callable (outputs, labels) that
            returns the mean over examples or (sums, weights); it may read the weights, too.
        parameters: Names, glob patterns or modules; None for those that require gradients (all if
            none does), "*" for all.
        n: How many examples; None for all.
        seed: Which n examples, in a seeded order; None for the first n.
        chunk: Examples per chunk; "auto" follows from sizes. The result changes by rounding only.
        memory_budget: Bytes for kept graphs; None for half of the free memory, at most 4 GiB on
            a CPU; 0 keeps none.
        compile: Compile the products with `torch.compile`'s compiler (inductor). It takes a minute
            for a deep network, once per shape of chunks, and pays where many products follow;
            products are the same but for rounding. With a warning it has no effect where there
            is no compiler, or the model cannot be traced.
        method: "exact" second derivatives, "finite_difference", or "auto": exact, and where these
            are missing or wrong, with a warning, finite differences.
        tolerance: Relative error that a product by finite differences may have; None for 1e-6 in
            float64 and 1e-2 in float32.
        progress: Show a progress bar if recording takes longer than two seconds.

    Raises:
        ArgumentError: For an empty selection, or graphs that do not fit.
        DataError: For data that differ between two passes, or labels that do not fit.
        ModelError: For NaN weights or loss, BatchNorm or Dropout in training mode, random
            outputs, a loss that is not a scalar mean, a gradient that is not that of the loss,
            second derivatives that PyTorch does not have or has wrong (with "exact"), or a product
            whose estimated error stays above the tolerance.

    Source:
        Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994; for finite
        differences Nocedal and Wright, "Numerical Optimization", 2006, section 8.1.

    Example:
        A linear model with half the squared error has H = XᵀX / N:

        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> H = HessianOperator(model, (x, torch.zeros(2, 1)), loss="mse")
        >>> H.to_dense()
        tensor([[1., 1.],
                [1., 2.]])
        >>> H.matvec(torch.tensor([1.0, 0.0]))
        tensor([1., 1.])
        >>> D = HessianOperator(
        ...     model.double(), (x, torch.zeros(2, 1)), loss="mse", method="finite_difference"
        ... )
        >>> D.matvec(torch.tensor([1.0, 0.0])).round(decimals=6).tolist()
        [1.0, 1.0]
        >>> D.errors[0] < 1e-9
        True
    """

    def _reverse(self, chunk: Examples) -> Linearised:
        problem, leaves = self._problem, self._problem.leaves
        with torch.enable_grad():
            mean, weight, ends, slopes = self._ends(chunk)
            gradient: Sequence[Tensor | None] = [None] * len(leaves)
            if ends:
                gradient = torch.autograd.grad(
                    ends, leaves, slopes, create_graph=True, allow_unused=True
                )
            gradient = problem.real(gradient)
        edges: list[GradientEdge] = []
        where: list[int] = []
        for i, g in enumerate(gradient):
            if g is not None and g.requires_grad:
                edges.append(owning_edge(g))
                where.append(i)

        def product(vector: Sequence[Tensor]) -> Sequence[Tensor | None]:
            if not edges:
                return [None] * len(leaves)
            found = torch.autograd.grad(
                edges, leaves, [vector[i] for i in where], retain_graph=True, allow_unused=True
            )
            return problem.real(found)

        detached = [None if g is None else g.detach() for g in gradient]
        return Linearised(mean.detach(), weight, detached, product)

    def _ends(self, chunk: Examples) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor | None]]:
        """Mean loss and weight, and what the graph of the gradient begins at, with its slopes."""
        problem = self._problem
        with OutputLayer() as watch:
            outputs = problem.function.outputs(chunk.inputs)
        layer = watch.of(outputs)
        if layer is None or not in_slices(problem.loss, outputs, chunk.labels, layer):
            mean, weight = problem.loss.terms(outputs, chunk.labels)
            return mean, weight, [mean] if mean.requires_grad else [], [None]
        mean, weight = problem.loss.terms(outputs.detach(), chunk.labels)
        found = slopes(problem.loss, chunk.labels, weight, layer)
        pairs = [(t, s) for t, s in zip(layer, found, strict=True) if t.requires_grad]
        return mean, weight, [t for t, _ in pairs], [s for _, s in pairs]

    def _forward(self, chunk: Examples) -> Linearised:
        problem, leaves = self._problem, self._problem.leaves
        with torch.enable_grad():
            mean, weight = problem.terms(chunk)
            gradient = torch.autograd.grad(mean, leaves, allow_unused=True)
        point = tuple(w.detach() for w in leaves)

        def mean_at(weights: tuple[Tensor, ...]) -> Tensor:
            return problem.run(lambda: problem.terms(chunk)[0], weights)

        def product(vector: Sequence[Tensor]) -> Sequence[Tensor | None]:
            slope = torch.func.grad(mean_at)
            tangent = torch.func.jvp(slope, (point,), (tuple(vector),))[1]
            return [t.detach() for t in tangent]

        return Linearised(mean.detach(), weight, problem.real(gradient), product)

    def _by_differences(self, at: Moved, chunk: Examples, step: float) -> Sequence[Tensor]:
        def slopes(leaves: Sequence[Tensor]) -> list[Tensor]:
            return self._problem.slopes(leaves, chunk)

        pairs = zip(at(step, slopes), at(-step, slopes), strict=True)
        return [(above - below) / (2 * step) for above, below in pairs]

    def _difference(self, vector: Tensors, step: float) -> Sequence[Tensors]:
        weights = list(self._problem.weights.values())
        values = [self._gradient(moved(weights, vector, place * step)) for place in STEPS]
        return extrapolated(values, list(self.split(self._gradient_part).values()), step)

    def _gradient(self, weights: Tensors) -> list[Tensor]:
        """The gradient of the mean loss of all examples, at other weights."""
        total = [torch.zeros_like(w) for w in weights]
        for chunk in self._recording.chunks:
            examples = self._recording.examples(chunk)
            part = self._problem.at(weights, partial(self._problem.slopes, chunk=examples))
            torch._foreach_add_(total, part, alpha=self._share(chunk.weight))
        return total
