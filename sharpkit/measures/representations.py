"""Measures of a hidden layer's representation of the training examples."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data
from sharpkit.errors import ArgumentError, DataError, ModelError
from sharpkit.measures.passes import Setup, setup
from sharpkit.measures.weight_layers import calls_of, product_layers, weight_layers


def features(
    model: nn.Module, data: Data, *, layer: str | None = None, pool: bool = True
) -> tuple[Tensor, Tensor]:
    """The representation of every example at one layer, and the labels.

    Args:
        model: Any module.
        data: Inputs of shape (n, ...) and labels of shape (n,).
        layer: Name of the module whose output is meant; None for what the last linear or
            convolutional layer receives.
        pool: Average feature maps (n, channels, height, width) over their positions; everything
            else is flattened.

    Returns:
        tuple: Features of shape (n, d) and labels of shape (n,), on the CPU.

    Raises:
        ArgumentError: If there is no such layer.
        ModelError: If the layer gives no tensor with one row per example, or NaN.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2))
        >>> data = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 0])
        >>> features(model, data)[0].shape, features(model, data, layer="2")[0].shape
        (torch.Size([5, 7]), torch.Size([5, 2]))
    """

    def pooled(rows: Tensor) -> Tensor:
        return rows.mean((2, 3)) if pool and rows.ndim == 4 else rows.flatten(1)

    with frozen(model) as found:
        run = setup(model, data, found)
        return layer_rows(run, model, layer, pooled), run.examples.labels.cpu()


def layer_rows(
    run: Setup, model: nn.Module, layer: str | nn.Module | None, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """What a layer gives for every example, changed to (n, d), on the CPU.

    Of None it is what the last linear or convolutional layer that is called receives.

    Raises:
        ArgumentError: If there is no such layer.
        ModelError: If it gives no tensor with one row per example, or NaN.
    """
    named = dict(model.named_modules())
    if isinstance(layer, str) and (layer not in named or not layer):
        names = ", ".join(name for name in named if name)
        raise ArgumentError(f"layer {layer!r}: the model has no such module; it has {names}")
    chosen = (
        [named[layer] if isinstance(layer, str) else layer]
        if layer is not None
        else product_layers(model)
    )
    parts = []
    with torch.no_grad(), calls_of(chosen, output=layer is not None, last=True) as take:
        for batch in run.batches():
            run.function({}, batch.inputs)
            rows = next(iter(take()), None)
            if not isinstance(rows, Tensor):
                what = "a linear or convolutional layer" if layer is None else f"layer {layer!r}"
                raise ModelError(f"{what} gave no tensor in the forward pass")
            if rows.ndim < 2 or len(rows) != len(batch):
                name = type(layer).__name__ if isinstance(layer, nn.Module) else layer
                raise ModelError(
                    f"layer {name or 'before the last weight'!r} gives shape "
                    f"{tuple(rows.shape)}: expected one row for each of {len(batch)} examples"
                )
            parts.append(change(rows).cpu())
    result = torch.cat(parts)
    if not bool(torch.isfinite(result).all()):
        raise ModelError("the representation has NaN or infinite entries")
    return result


def davies_bouldin(
    model: nn.Module, data: Data, *, layer: str | None = None, pool: bool = True
) -> float:
    """How badly the classes are separated at a hidden layer: the Davies-Bouldin index.

        mean over classes a of max over b ≠ a of (s_a + s_b) / ‖c_a − c_b‖₂

    c_a is the centre of class a and s_a the mean distance of its examples from it. Small for
    compact, distant classes. Invariant under scaling, rotating and permuting the features. Cost:
    one forward pass.

    Args:
        model: Any module.
        data: Inputs of shape (n, ...) and labels of shape (n,).
        layer: Name of the module whose output is meant; None for what the last linear or
            convolutional layer receives.
        pool: Average feature maps over their positions.

    Returns:
        float: The index; smaller is better.

    Raises:
        ArgumentError: If there is no such layer.
        DataError: For labels that are not classes, fewer than two of them, or as many as examples.
        ModelError: If the layer gives no usable tensor.

    Source:
        Davies and Bouldin, IEEE TPAMI 1979; as a measure of generalization Natekar and Sharma
        (2012.02775).

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 2)
        >>> x = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
        >>> davies_bouldin(model, (x, torch.tensor([0, 0, 1, 1])))  # (1 + 1) / 10
        0.2
    """
    from sklearn.metrics import davies_bouldin_score

    rows, labels = _classes(model, data, layer, pool)
    return float(davies_bouldin_score(rows.numpy(), labels.numpy()))


def representation_variance(
    model: nn.Module, data: Data, *, layer: str | None = None, pool: bool = True
) -> float:
    """The share of a hidden layer's variance that lies within the classes.

        tr Σ_W / tr Σ,   Σ_W = mean over i of (h_i − c_{y_i})(h_i − c_{y_i})ᵀ

    h_i is the representation of example i, c_y the centre of class y and Σ the covariance of all.
    0 for classes collapsed to points, 1 for classes with one common centre. Invariant under
    scaling, rotating and permuting the features. Cost: one forward pass.

    Args:
        model: Any module.
        data: Inputs of shape (n, ...) and labels of shape (n,).
        layer: Name of the module whose output is meant; None for what the last linear or
            convolutional layer receives.
        pool: Average feature maps over their positions.

    Returns:
        float: Between 0 and 1; smaller is better separated.

    Raises:
        ArgumentError: If there is no such layer.
        DataError: For labels that are not classes, fewer than two of them, or as many as examples.
        ModelError: If the layer gives no usable tensor, or the same for all examples.

    Source:
        The within-class variability of Papyan, Han and Donoho, PNAS 2020 (2008.08186), with traces
        in place of the pseudo-inverse; one of the consistency measures of the competition's kind.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 2)
        >>> x = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
        >>> representation_variance(model, (x, torch.tensor([0, 0, 1, 1])))  # 1 of 1 + 25
        0.03846...
    """
    rows, labels = _classes(model, data, layer, pool)
    total = float((rows - rows.mean(0)).square().sum())
    if not total > 0:
        raise ModelError("the representation is the same for all examples")
    groups = [rows[labels == label] for label in set(labels.tolist())]
    within = sum(float((group - group.mean(0)).square().sum()) for group in groups)
    return within / total


def effective_rank(
    model: nn.Module, data: Data, *, layer: str | None = None, pool: bool = True
) -> dict[str, float]:
    """How many directions a representation, and the weight matrices, really use.

        exp(−Σ p_k log p_k),   p_k = σ_k / Σ σ_j the singular values

        representation  of the matrix of centred representations, one row per example
        weights         mean over layers of that of W_l (out, rest), BatchNorm folded in

    Between 1 and the rank, and equal to it if all singular values are the same. Both are invariant
    under scaling each layer and permuting units. Cost: one forward pass and one singular value
    decomposition per layer.

    Args:
        model: Any module.
        data: Inputs of shape (n, ...) and labels of shape (n,).
        layer: Name of the module whose output is the representation; None for what the last linear
            or convolutional layer receives.
        pool: Average feature maps over their positions.

    Returns:
        dict: "representation" and "weights".

    Raises:
        ArgumentError: If there is no such layer.
        ModelError: If the layer gives no usable tensor, or the same for all examples, or a weight
            is zero.

    Source:
        Roy and Vetterli, EUSIPCO 2007.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.diag(torch.tensor([3.0, 3.0]))
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [2.0, 0.0]])  # on one line
        >>> found = effective_rank(model, (x, torch.tensor([0, 1, 0])))
        >>> {name: round(value, 6) for name, value in found.items()}
        {'representation': 1.0, 'weights': 2.0}
    """
    rows, _ = features(model, data, layer=layer, pool=pool)
    rows = rows.double()
    matrices = [w.weight.flatten(1) for w in weight_layers(model, data)]
    ranks = [_effective_rank(w, "a weight is zero") for w in matrices]
    same = "the representation is the same for all examples"
    return {
        "representation": _effective_rank(rows - rows.mean(0), same),
        "weights": sum(ranks) / len(ranks),
    }


def _effective_rank(matrix: Tensor, reason: str) -> float:
    values = torch.linalg.svdvals(matrix)
    if not float(values[0]) > 0:
        raise ModelError(f"the effective rank is not defined: {reason}")
    share = values / values.sum()
    return math.exp(float(torch.special.entr(share).sum()))


def _classes(model: nn.Module, data: Data, layer: str | None, pool: bool) -> tuple[Tensor, Tensor]:
    """Features in float64 and labels that are at least two classes, fewer than examples."""
    rows, labels = features(model, data, layer=layer, pool=pool)
    if labels.ndim != 1 or labels.is_floating_point():
        raise DataError(f"expected class labels of shape (n,), got {tuple(labels.shape)}")
    classes = len(set(labels.tolist()))
    if not 2 <= classes < len(labels):
        raise DataError(
            f"{classes} classes among {len(labels)} examples: "
            "expected at least 2, and fewer than examples"
        )
    return rows.double(), labels
