"""Measures of a hidden layer's representation of the training examples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sharpkit.errors import DataError, ModelError
from sharpkit.functional import Data, frozen
from sharpkit.measures.layers import captured
from sharpkit.measures.passes import setup


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
    parts = []
    with frozen(model), torch.no_grad(), captured(model, layer) as take:
        run = setup(model, data)
        for batch in run.batches():
            run.function({}, batch.inputs)
            rows = take()
            if rows.ndim < 2 or len(rows) != len(batch):
                raise ModelError(
                    f"layer {layer or 'before the last weight'!r} gives shape "
                    f"{tuple(rows.shape)}: expected one row for each of {len(batch)} examples"
                )
            rows = rows.mean((2, 3)) if pool and rows.ndim == 4 else rows.flatten(1)
            parts.append(rows.cpu())
    result = torch.cat(parts)
    if not bool(torch.isfinite(result).all()):
        raise ModelError("the representation has NaN or infinite entries")
    return result, run.examples.labels.cpu()


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

    rows, labels = features(model, data, layer=layer, pool=pool)
    if labels.ndim != 1 or labels.is_floating_point():
        raise DataError(f"expected class labels of shape (n,), got {tuple(labels.shape)}")
    classes = len(set(labels.tolist()))
    if not 2 <= classes < len(labels):
        raise DataError(
            f"{classes} classes among {len(labels)} examples: "
            "expected at least 2, and fewer than examples"
        )
    return float(davies_bouldin_score(rows.double().numpy(), labels.numpy()))
