"""Losses whose labels name classes: cross-entropies, with what they divide by, and margins."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from sharpkit.contract.surprise import group_slopes, is_small, mean_surprise, surprise
from sharpkit.contract.terms import (
    Formula,
    GroupForms,
    Terms,
    check_same_shape,
    check_tensor,
    count,
    mean_and_weight,
)
from sharpkit.errors import DataError, ModelError

IGNORED = -100  # the label of a position without one


def class_formula(module: nn.Module, axis: int = 1) -> Formula:
    """The formula of CrossEntropyLoss or NLLLoss with classes on an axis, or else on the last."""
    plain = module.weight is None and not isinstance(module, nn.NLLLoss) and not _smoothing(module)
    check = partial(_check, module, axis)
    forms = GroupForms(is_small, partial(_group_means, axis), partial(_group_slopes, axis))
    return Formula(
        partial(_terms, module, axis),
        check,
        ignored=module.ignore_index,  # type: ignore[arg-type]
        whole=Formula(partial(_whole_terms, axis), check, forms) if plain else None,
    )


def multi_margin_formula(module: nn.Module) -> Formula:
    """The formula of MultiMarginLoss."""
    return Formula(partial(_multi_margin_terms, module), partial(_check, module, -1))


def multi_label_margin_formula(module: nn.Module) -> Formula:
    """The formula of MultiLabelMarginLoss."""
    return Formula(_multi_label_margin_terms, _check_label_lists)


def _one_hot(outputs: Tensor, labels: Tensor) -> Tensor:
    return torch.arange(outputs.shape[-1], device=outputs.device) == labels.unsqueeze(-1)


def _terms(module: Any, axis: int, outputs: Any, labels: Tensor) -> Terms:
    if _are_probabilities(module, axis, outputs, labels):
        return _probability_terms(module, outputs, labels)
    logits, labels = _classes_last(outputs, labels, axis), labels.long()
    ignored = labels == module.ignore_index
    labels = labels.masked_fill(ignored, 0)
    if module.weight is None and not isinstance(module, nn.NLLLoss) and not _smoothing(module):
        total = surprise(logits, labels).masked_fill(ignored, 0.0)
        # halves are summed in float32, as torch does
        total = total.sum(dtype=torch.promote_types(total.dtype, torch.float32))
        weight = ignored.logical_not().sum(dtype=torch.float64)
        return (total / weight.clamp(min=1.0).to(total.dtype)).to(logits.dtype), weight
    weights = ignored.logical_not().double()
    if module.weight is not None:
        weights = weights * _class_weights(module, logits, torch.float64)[labels]
    losses = _weighted_losses(module, logits, labels, weights.to(logits.dtype))
    return mean_and_weight(losses.masked_fill(ignored, 0.0), weights.sum())


def _whole_terms(axis: int, outputs: Any, labels: Tensor) -> Terms:
    (mean,) = _group_means(axis, outputs, labels, 1)
    return mean, torch.full((), labels.numel(), dtype=torch.float64, device=labels.device)


def _group_means(axis: int, outputs: Any, labels: Tensor, groups: int) -> Tensor:
    return mean_surprise(_classes_last(outputs, labels, axis), labels.long(), groups)


def _group_slopes(
    axis: int, outputs: Any, labels: Tensor, groups: int, factor: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    logits = _classes_last(outputs, labels, axis)
    means, slopes, exponent = group_slopes(logits, labels.long(), groups, factor)
    return means, slopes if logits is outputs else slopes.movedim(-1, 1), exponent


def _smoothing(module: Any) -> float:
    """The label smoothing of a loss, 0 where it has none."""
    return float(getattr(module, "label_smoothing", 0.0))


def _weighted_losses(module: Any, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The loss of every position, as torch's modules add them up."""
    if isinstance(module, nn.NLLLoss):
        return -weights * torch.where(_one_hot(logits, labels), logits, 0.0).sum(-1)
    precise = weights * surprise(logits, labels)
    smoothing = _smoothing(module)
    if not smoothing:
        return precise
    of_all = _class_weights(module, logits, logits.dtype) * logits.log_softmax(-1)
    return (1.0 - smoothing) * precise - smoothing / logits.shape[-1] * of_all.sum(-1)


def _probability_terms(module: Any, outputs: Tensor, labels: Tensor) -> Terms:
    """Torch divides by the number of positions here, whatever the class weights."""
    logits, labels = outputs.movedim(1, -1), labels.movedim(1, -1).to(outputs.dtype)
    classes = logits.shape[-1]
    labels = (1.0 - module.label_smoothing) * labels + module.label_smoothing / classes
    losses = -labels * _class_weights(module, logits, logits.dtype) * logits.log_softmax(-1)
    positions = math.prod(logits.shape[1:-1])
    return mean_and_weight(losses, count(outputs) * positions)


def _class_weights(module: Any, logits: Tensor, dtype: torch.dtype) -> Tensor:
    weight = module.weight
    if weight is None:
        return torch.ones(logits.shape[-1], dtype=dtype, device=logits.device)
    if weight.shape != logits.shape[-1:]:
        raise ModelError(
            f"{type(module).__name__} has class weights of shape {tuple(weight.shape)}, but the "
            f"model has {logits.shape[-1]} classes: expected one weight per class"
        )
    moved: Tensor = weight.detach().to(logits.device, dtype)
    return moved


def _are_probabilities(module: Any, axis: int, outputs: Any, labels: Tensor) -> bool:
    return (
        axis == 1
        and isinstance(module, nn.CrossEntropyLoss)
        and isinstance(outputs, Tensor)
        and outputs.ndim > 1
        and labels.is_floating_point()
        and labels.shape == outputs.shape
    )


def _classes_last(outputs: Tensor, labels: Tensor, axis: int) -> Tensor:
    """Outputs with the classes on the last axis, if what remains has the shape of the labels."""
    check_tensor(outputs)
    if labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"cross-entropy expects integer labels, got {labels.dtype} of shape "
            f"{tuple(labels.shape)} for outputs of shape {tuple(outputs.shape)}"
        )
    if outputs.ndim > 1 and axis == 1 and labels.shape == outputs.shape[:1] + outputs.shape[2:]:
        return outputs.movedim(1, -1)
    if outputs.ndim > 1 and labels.shape == outputs.shape[:-1]:
        return outputs
    raise DataError(
        f"labels of shape {tuple(labels.shape)} do not fit outputs of shape "
        f"{tuple(outputs.shape)}: expected outputs (n, classes) with labels (n,), or outputs "
        "(n, positions, classes) with labels (n, positions)"
    )


def _check(module: Any, axis: int, outputs: Any, labels: Tensor) -> None:
    probabilities = _are_probabilities(module, axis, outputs, labels)
    logits = outputs.movedim(1, -1) if probabilities else _classes_last(outputs, labels, axis)
    _class_weights(module, logits, torch.float64)  # refuses another number of classes
    weights = module.weight
    if weights is not None and not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ModelError(
            f"{type(module).__name__} has class weights {weights.tolist()}: expected finite "
            "numbers of at least 0"
        )
    if not probabilities:
        _check_range(labels, logits.shape[-1], getattr(module, "ignore_index", None))


def _check_range(labels: Tensor, classes: int, ignored: int | None) -> None:
    wrong = (labels < 0) | (labels >= classes)
    if ignored is not None:
        wrong = wrong & (labels != ignored)
    if not bool(wrong.any()):
        return
    labels = labels if ignored is None else labels[labels != ignored]
    also = "" if ignored is None else f", or {ignored} to be ignored"
    raise DataError(
        f"labels run from {int(labels.min())} to {int(labels.max())}, but the model has {classes} "
        f"outputs: expected labels in [0, {classes - 1}]{also}"
    )


def _multi_margin_terms(module: Any, outputs: Any, labels: Tensor) -> Terms:
    logits, labels = _classes_last(outputs, labels, -1), labels.long()
    is_label = _one_hot(logits, labels)
    label_logit = torch.where(is_label, logits, 0.0).sum(-1, keepdim=True)
    excess = relu(module.margin - label_logit + logits) ** module.p
    losses = torch.where(is_label, 0.0, excess).sum(-1) / logits.shape[-1]
    weights = _class_weights(module, logits, logits.dtype)[labels]
    return mean_and_weight(weights * losses, count(logits))


def _multi_label_margin_terms(outputs: Any, labels: Tensor) -> Terms:
    check_same_shape(outputs, labels)
    listed = (labels < 0).cumsum(-1) == 0  # labels up to the first negative one
    labels = torch.where(listed, labels, 0).long()
    is_label = (_one_hot(outputs, labels) & listed.unsqueeze(-1)).any(-2)
    gaps = outputs.gather(-1, labels).unsqueeze(-1) - outputs.unsqueeze(-2)  # (n, label, class)
    counted = listed.unsqueeze(-1) & ~is_label.unsqueeze(-2)
    losses = torch.where(counted, relu(1.0 - gaps), 0.0).sum((-1, -2)) / outputs.shape[-1]
    return mean_and_weight(losses, count(outputs))


def _check_label_lists(outputs: Any, labels: Tensor) -> None:
    check_same_shape(outputs, labels)
    if labels.is_floating_point() or labels.ndim != 2:
        raise DataError(
            "MultiLabelMarginLoss expects integer labels of shape (n, classes), ended by -1, got "
            f"{labels.dtype} of shape {tuple(labels.shape)}"
        )
    _check_range(labels.clamp(min=0), outputs.shape[-1], None)
