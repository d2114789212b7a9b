"""The smallest perturbation of all layers at once that changes a prediction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit.contract.examples import Examples
from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data
from sharpkit.contract.modules import hooked
from sharpkit.contract.parameters import floating_parameters
from sharpkit.errors import ArgumentError, ModelError
from sharpkit.measures.layer_margins import checked_margins
from sharpkit.measures.measure import Estimate
from sharpkit.measures.passes import Setup, mean_of, setup
from sharpkit.measures.weight_layers import product_layers

_HALVINGS = 10
_DOUBLINGS = 20


def all_layer_margin(model: nn.Module, data: Data, *, steps: int = 5) -> Estimate:
    """The mean over training examples of the all-layer margin.

        m(x, y) = min (Σ_l ‖δ_l‖₂²)^{1/2}   such that  max_{j≠y} z_j(δ) ≥ z_y(δ)

    z(δ) are the outputs of the network in which layer l gives f_l(h_{l−1}) + δ_l ‖h_{l−1}‖₂ for the
    input h_{l−1} that it receives under the perturbations of the earlier ones: each δ_l is measured
    in units of its layer's input. The layers are the linear and convolutional ones; m = 0 for a
    misclassified example. The minimum is not convex. From δ = 0 every step solves the problem with
    the constraint linearised, δ ← (⟨g, δ⟩ − γ) g / ‖g‖² for the margin γ and its gradient g at δ
    (every second step half of it, against cycles around kinks), and the result is shortened by
    bisection until it lies on the boundary. The shortest is taken: the prediction does change
    there, so that the value is an upper bound of the minimum, which a longer search can only
    lower. Invariant under permuting units, and under scaling the inputs of a network without
    biases. Cost: 1 G and 12 F per step.

    Args:
        model: Any module whose examples do not influence each other, with outputs (n, classes).
        data: Inputs of shape (n, ...) and labels of shape (n,).
        steps: Linearised problems solved.

    Returns:
        Estimate: The mean, and its standard error over examples; larger is better.

    Raises:
        ArgumentError: For less than one step.
        DataError: For labels that do not fit the outputs, or a single output.
        ModelError: For NaN or infinite weights or outputs, if no layer is called, or a prediction
            that nothing changes.

    Source:
        Wei and Ma, ICLR 2020 (1910.04284), equations 2.1 and 2.2 (with the 2-norm over layers).

    Example:
        One layer: z = x + δ ‖x‖ needs δ of length (z_1 − z_2) / √2 ‖x‖ to tie its two entries:

        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.eye(2)
        >>> round(all_layer_margin(model, (torch.tensor([[4.0, 3.0]]), torch.tensor([0]))).value, 4)
        0.1414
    """
    if steps < 1:
        raise ArgumentError(f"steps must be at least 1, got {steps}")
    with frozen(model) as found:
        run = setup(model, data, found)
        parts = [_batch_margins(run, model, batch, steps) for batch in run.batches()]
    return mean_of(torch.cat(parts))


def _batch_margins(run: Setup, model: nn.Module, batch: Examples, steps: int) -> Tensor:
    """The margins of one batch, shape (examples,), float64."""
    weights = {k: p.detach() for k, p in floating_parameters(model).items()}
    with _perturbed_layers(model) as perturbation:

        def margin(deltas: list[Tensor]) -> Tensor:
            perturbation.deltas, perturbation.calls = deltas, 0
            logits = run.function(weights, batch.inputs)
            return checked_margins(logits, batch.labels)

        with torch.no_grad():
            clean = margin([])  # also makes the δ, as zeros
        deltas = perturbation.zeros
        if not deltas:
            raise ModelError("no linear or convolutional layer is called in the forward pass")
        wrong = clean <= 0
        best = torch.where(wrong, 0.0, torch.inf).double()

        def look(candidate: list[Tensor]) -> list[Tensor]:
            """Where the ray through a candidate crosses, if within twice its length."""
            nonlocal best
            with torch.no_grad():
                low = (margin(candidate) > 0).to(clean)  # 0 or 1
                high = low + 1
                crosses = margin(_scaled(candidate, high)) <= 0
                for _ in range(_HALVINGS):
                    middle = (low + high) / 2
                    past = margin(_scaled(candidate, middle)) <= 0
                    low, high = torch.where(past, low, middle), torch.where(past, middle, high)
            ends = _scaled(candidate, torch.where(crosses, high, 1.0))
            best = torch.where(crosses, torch.minimum(best, _length(ends)), best)
            return ends

        for step in range(steps):
            following = _linearised_step(deltas, margin)
            # half steps between whole ones end the cycles around a kink
            deltas = look(following if step % 2 == 0 else _halfway(deltas, following))
        for _ in range(_DOUBLINGS):  # a step can fall short where slopes change on its way
            if bool(torch.isfinite(best).all()):
                break
            deltas = [2 * d for d in deltas]
            look(deltas)
        if not bool(torch.isfinite(best).all()):
            raise ModelError(
                f"{int((~torch.isfinite(best)).sum())} predictions do not change however large the "
                "perturbation of the layers: the margin is infinite"
            )
    return best


def _scaled(deltas: list[Tensor], factor: Tensor) -> list[Tensor]:
    return [d * _per_row(factor, d) for d in deltas]


def _halfway(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return [(x + y) / 2 for x, y in zip(a, b, strict=True)]


def _linearised_step(deltas: list[Tensor], margin: Any) -> list[Tensor]:
    """The shortest perturbations at which the margin, linearised at the given ones, is 0."""
    with torch.enable_grad():
        leaves = [d.detach().requires_grad_() for d in deltas]
        gamma = margin(leaves)
        slopes = torch.autograd.grad(gamma.sum(), leaves, materialize_grads=True)
    along = sum((g * d).flatten(1).sum(1) for g, d in zip(slopes, deltas, strict=True))
    square = sum(g.square().flatten(1).sum(1) for g in slopes)
    amount = (along - gamma.detach()) / torch.as_tensor(square).clamp_min(1e-30)
    return _scaled(list(slopes), amount)


def _length(deltas: list[Tensor]) -> Tensor:
    rows = torch.cat([d.flatten(1).double() for d in deltas], 1)
    length: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return length


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


class _Perturbation:
    """δ of every call of a layer in the order of the calls; none yet: zeros are noted."""

    def __init__(self) -> None:
        self.deltas: list[Tensor] = []
        self.zeros: list[Tensor] = []
        self.calls = 0

    def hook(self, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self.deltas:
            self.zeros.append(torch.zeros_like(output))
            return None
        delta = self.deltas[self.calls]
        self.calls += 1
        size = inputs[0].flatten(1).norm(dim=1)
        return output + delta * _per_row(size, output)


@contextmanager
def _perturbed_layers(model: nn.Module) -> Iterator[_Perturbation]:
    perturbation = _Perturbation()
    with hooked(m.register_forward_hook(perturbation.hook) for m in product_layers(model)):
        yield perturbation
