"""Measures from first derivatives: gradient noise, Fisher-Rao norm, input Jacobian."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sharpkit.contract.examples import Examples, Inputs
from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data
from sharpkit.contract.losses import Loss, resolve_loss
from sharpkit.contract.parameters import floating_parameters, select_parameters
from sharpkit.errors import ArgumentError, DataError, ModelError
from sharpkit.groupwise.fallback import vectorised_or_loop
from sharpkit.measures.measure import Estimate
from sharpkit.measures.passes import images, mean_of, setup, single_terms

_GRADIENT_BYTES = 2**27  # of the per-example gradients held at a time


def gradient_noise(model: nn.Module, data: Data, *, loss: Loss = "cross_entropy") -> float:
    """The total variance of the loss gradient over training examples.

        tr Cov(g) = Σ_i ‖g_i − ḡ‖² / (n − 1),   g_i = ∇_w ℓ(f_w(x_i), y_i)

    The variance of a mini-batch gradient of size B is this divided by B. Cost: one gradient pass
    over single examples, vectorised.

    Args:
        model: Any module.
        data: Inputs of shape (n, ...) and labels of shape (n,), n at least 2.
        loss: "cross_entropy", "mse" or a callable (outputs, labels) -> mean loss.

    Returns:
        float: The trace of the covariance.

    Raises:
        DataError: For fewer than two examples, or labels that do not fit the outputs.
        ModelError: For NaN or infinite weights or gradients.

    Source:
        Jiang et al., ICLR 2020 (1912.02178), the gradient noise at the end of training.

    Example:
        Gradients of ½(w x)² at w = 1 for x = 1 and 2 are 1 and 4:

        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
        >>> gradient_noise(model, data, loss="mse")
        4.5
    """
    loss_fn = resolve_loss(loss)
    with frozen(model) as found:
        run = setup(model, data, found, loss)
        reason = run.probe.try_swapping() if run.probe is not None else ""
        if reason:
            raise ModelError(
                f"{reason}, so examples have no gradients of their own here: read weights as "
                "attributes of the modules that own them, inside forward"
            )
        n = len(run.examples)
        if n < 2:
            raise DataError("the variance of gradients needs at least two examples, got 1")
        weights = floating_parameters(model)

        def one(
            parameters: dict[str, Tensor], inputs: Inputs, label: Tensor
        ) -> tuple[Tensor, Tensor]:
            batch = pytree.tree_map(lambda t: t.unsqueeze(0), inputs)

            def terms() -> tuple[Tensor, Tensor]:
                return loss_fn.terms(run.function.outputs(batch), label.unsqueeze(0))

            mean, weight = run.function.within(parameters, terms)
            return mean * weight.to(mean.dtype), weight

        gradient = torch.func.grad(one, has_aux=True)
        # deviations from a first guess of the mean: the difference of squares stays accurate
        first, _ = _gradients(gradient, weights, next(run.batches(1)), model)
        center = {k: g[0] for k, g in first.items()}
        squares = counted = 0.0
        sums = {k: torch.zeros_like(p, dtype=torch.float64) for k, p in weights.items()}
        size = max(1, min(32, _GRADIENT_BYTES // sum(p.nbytes for p in weights.values())))
        for batch in run.batches(size):
            gradients, counts = _gradients(gradient, weights, batch, model)
            counted += float(counts.sum())
            for name, g in gradients.items():
                off = (g - center[name]).double()
                squares += float(off.square().sum())
                sums[name] += off.sum(0)
    total = squares - sum(float(s.square().sum()) for s in sums.values()) / n
    if not torch.isfinite(torch.tensor(total)):
        raise ModelError("a gradient is NaN or infinite")
    if not counted > 0:
        raise DataError("no label counts in the loss: all are ignored, or weigh 0")
    return max(total, 0.0) / (n - 1) * (n / counted) ** 2


def _gradients(
    gradient: Callable[..., tuple[dict[str, Tensor], Tensor]],
    weights: dict[str, Tensor],
    batch: Examples,
    model: nn.Module,
) -> tuple[dict[str, Tensor], Tensor]:
    """Per-example gradients of sums, each (examples, *parameter shape), and the weights."""

    def side_by_side() -> tuple[dict[str, Tensor], Tensor]:
        result: tuple[dict[str, Tensor], Tensor] = torch.func.vmap(gradient, in_dims=(None, 0, 0))(
            weights, batch.inputs, batch.labels
        )
        return result

    def one_by_one() -> tuple[dict[str, Tensor], Tensor]:
        rows = []
        for i in range(len(batch)):
            inputs = pytree.tree_map(lambda t, i=i: t[i], batch.inputs)
            rows.append(gradient(weights, inputs, batch.labels[i]))
        found, counts = zip(*rows, strict=True)
        return (
            {name: torch.stack([row[name] for row in found]) for name in weights},
            torch.stack(counts),
        )

    return vectorised_or_loop("auto", side_by_side, one_by_one, model)[0]


def fisher_rao_norm(model: nn.Module, data: Data, *, loss: Loss = "cross_entropy") -> Estimate:
    """The squared length of the weights in the metric of the empirical Fisher matrix.

        ‖w‖²_FR = wᵀ F w = mean over i of ⟨w, ∇_w ℓ(f_w(x_i), y_i)⟩²

    Invariant under rescaling the layers of a ReLU network, and under any change of units of single
    weights that keeps the function; for L layers without biases it equals
    L² mean ⟨∂ℓ/∂f, f⟩². Every inner product is a directional derivative along w, so the cost is
    one forward-mode pass (about two forward passes) and no per-example gradient.

    Args:
        model: Any module.
        data: Inputs of shape (n, ...) and labels of shape (n,).
        loss: "cross_entropy", "mse" or a callable (outputs, labels) -> mean loss.

    Returns:
        Estimate: The mean, and its standard error over examples.

    Raises:
        DataError: For labels that do not fit the outputs.
        ModelError: For NaN or infinite weights or results.

    Source:
        Liang et al., AISTATS 2019 (1711.01530), the empirical version, before the square root.

    Example:
        With one weight, f = w x and ℓ = ½f², the derivative along w is (w x)²:

        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> data = torch.tensor([[1.0], [1.0]]), torch.zeros(2, 1)
        >>> fisher_rao_norm(model, data, loss="mse").value  # 4²
        16.0
    """
    each = single_terms(loss)
    with frozen(model) as found:
        run = setup(model, data, found, loss)
        weights = floating_parameters(model)
        parts, counts = [], []
        for batch in run.batches():

            def losses(
                parameters: dict[str, Tensor], batch: Examples = batch
            ) -> tuple[Tensor, Tensor]:
                return each(run.function(parameters, batch.inputs), batch.labels)

            with torch.no_grad(), warnings.catch_warnings():
                # torch compiles its own forward-mode rules with a function it deprecates
                warnings.filterwarnings("ignore", message=".*torch.jit.script")
                _, along, weight = torch.func.jvp(  # type: ignore[misc]
                    losses, (weights,), (weights,), has_aux=True
                )
                parts.append(along.double())
                counts.append(weight)
    counted = torch.cat(counts).sum()
    squares = (torch.cat(parts) * (len(run.examples) / counted)).square()
    if not bool(torch.isfinite(squares).all()):
        raise ModelError("a directional derivative is NaN or infinite")
    return mean_of(squares)


def jacobian_norm(
    model: nn.Module, data: Data, *, of: Literal["logits", "probabilities"] = "logits"
) -> Estimate:
    """The mean Frobenius norm of the derivative of the outputs by the inputs.

        mean over i of ‖∂f(x_i) / ∂x‖_F

    Cost: one backward pass per output, exact.

    Args:
        model: Any module whose examples do not influence each other, with outputs (n, classes).
        data: Inputs of shape (n, ...), real numbers, and labels of shape (n,).
        of: Differentiate the "logits", or their softmax, the "probabilities".

    Returns:
        Estimate: The mean, and its standard error over examples.

    Raises:
        ArgumentError: For another value of `of`.
        DataError: For inputs that are tokens or dicts.
        ModelError: For NaN or infinite weights or results.

    Source:
        Novak et al., ICLR 2018 (1802.08760), the input-output Jacobian.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2)
        >>> model.weight.data = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        >>> jacobian_norm(model, (torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 0, 1]))).value
        5.0
    """
    if of not in ("logits", "probabilities"):
        raise ArgumentError(f'of must be "logits" or "probabilities", got {of!r}')
    with frozen(model) as found:
        run = setup(model, data, found)
        select_parameters(model)
        images(run.examples.diverse(1), "the Jacobian norm")
        norms = []
        for batch in run.batches():
            with torch.enable_grad():
                inputs = batch.inputs.detach().clone().requires_grad_()
                outputs = run.function({}, inputs)
                outputs = outputs.softmax(1) if of == "probabilities" else outputs
                total = torch.zeros(len(batch), dtype=torch.float64, device=outputs.device)
                for column in outputs.sum(0):
                    (row,) = torch.autograd.grad(column, inputs, retain_graph=True)
                    total += row.double().flatten(1).square().sum(1)
            norms.append(total.sqrt())
    result = torch.cat(norms)
    if not bool(torch.isfinite(result).all()):
        raise ModelError("an input derivative is NaN or infinite")
    return mean_of(result)
