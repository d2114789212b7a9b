"""Torch's own losses, as modules or functions, read as formulas.

Where torch's operation has no rule for vmap or for forward derivatives, the formula is written out.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sharpkit.contract.class_losses import (
    class_formula,
    multi_label_margin_formula,
    multi_margin_formula,
)
from sharpkit.contract.terms import Formula, Terms, check_same_shape, count
from sharpkit.errors import ModelError


def formula_of(module: nn.Module) -> Formula | None:
    """The formula of a loss module of torch's, or None for a module of another kind.

    A subclass counts if it does not change `forward`.
    """
    for kind in _FUNCTIONS:
        unchanged = type(module).forward is kind.forward and "forward" not in vars(module)
        if isinstance(module, kind) and unchanged:
            if kind in _WHOLE:
                return _WHOLE[kind][1](module)
            own = partial(_entry_terms, module, kind), partial(_check_entries, module, kind)
            return Formula(*own)
    return None


def module_of(loss: Any) -> nn.Module | None:
    """The module that a loss function of torch's stands for, or None for anything else.

    Example:
        >>> module_of(partial(F.huber_loss, delta=2.0)).delta
        2.0
    """
    function, keywords = loss, {}
    if isinstance(loss, partial) and not loss.args:
        function, keywords = loss.func, loss.keywords
    kind = next((kind for kind, known in _FUNCTIONS.items() if known is function), None)
    if kind is None or not set(keywords) <= set(inspect.signature(kind).parameters):
        return None
    return kind(**keywords)


def _squared(outputs: Tensor, labels: Tensor) -> Tensor:
    # linearizing the gradient of F.mse_loss crashes torch 2.13
    return (outputs - labels).square()


def _huber(outputs: Tensor, labels: Tensor, delta: float) -> Tensor:
    distance = (outputs - labels).abs()
    return torch.where(distance < delta, 0.5 * distance.square(), delta * (distance - 0.5 * delta))


def _soft_margin(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.softplus(-labels * outputs, threshold=80.0)


def _divergence(outputs: Tensor, labels: Tensor, log_target: bool) -> Tensor:
    if log_target:
        return labels.exp() * (labels - outputs)
    return torch.xlogy(labels, labels) - labels * outputs


# losses with a formula of their own: the function, and the formula of a module
_WHOLE: dict[type[nn.Module], tuple[Callable[..., Tensor], Callable[[nn.Module], Formula]]] = {
    nn.CrossEntropyLoss: (F.cross_entropy, class_formula),
    nn.NLLLoss: (F.nll_loss, class_formula),
    nn.MultiMarginLoss: (F.multi_margin_loss, multi_margin_formula),
    nn.MultiLabelMarginLoss: (F.multilabel_margin_loss, multi_label_margin_formula),
}
# means of entries: the function, what gives the loss of every entry (None for the function itself),
# and the attributes that it takes as keywords
_Entry: TypeAlias = tuple[Callable[..., Tensor], Callable[..., Tensor] | None, tuple[str, ...]]
_ENTRIES: dict[type[nn.Module], _Entry] = {
    nn.MSELoss: (F.mse_loss, _squared, ()),
    nn.L1Loss: (F.l1_loss, None, ()),
    nn.SmoothL1Loss: (F.smooth_l1_loss, None, ("beta",)),
    nn.HuberLoss: (F.huber_loss, _huber, ("delta",)),
    nn.BCELoss: (F.binary_cross_entropy, None, ("weight",)),
    nn.BCEWithLogitsLoss: (F.binary_cross_entropy_with_logits, None, ("weight", "pos_weight")),
    nn.KLDivLoss: (F.kl_div, _divergence, ("log_target",)),
    nn.PoissonNLLLoss: (F.poisson_nll_loss, None, ("log_input", "full", "eps")),
    nn.SoftMarginLoss: (F.soft_margin_loss, _soft_margin, ()),
    nn.MultiLabelSoftMarginLoss: (
        F.multilabel_soft_margin_loss,
        partial(F.binary_cross_entropy_with_logits, reduction="none"),
        ("weight",),
    ),
}
_FUNCTIONS = {kind: known[0] for kind, known in (_WHOLE | _ENTRIES).items()}


def _entry_terms(module: nn.Module, kind: type[nn.Module], outputs: Any, labels: Tensor) -> Terms:
    """The mean of all entries: every example has as many, so its weight is 1."""
    check_same_shape(outputs, labels)
    function, of_entries, names = _ENTRIES[kind]
    of_entries = of_entries or partial(function, reduction="none")
    keywords = {name: _moved(getattr(module, name), name, outputs) for name in names}
    losses = of_entries(outputs, labels.to(outputs.dtype), **keywords)
    mean = losses.mean()
    if module.reduction == "batchmean":
        mean = mean * math.prod(losses.shape[1:])
    return mean, count(outputs)


def _check_entries(module: nn.Module, kind: type[nn.Module], outputs: Any, labels: Tensor) -> None:
    check_same_shape(outputs, labels)
    for name in _ENTRIES[kind][2]:
        _moved(getattr(module, name), name, outputs)


def _moved(value: Any, name: str, outputs: Tensor) -> Any:
    """A tensor of the module's where the outputs are, if it means the same for every batch."""
    if not isinstance(value, Tensor):
        return value
    one = torch.Size((1, *outputs.shape[1:]))
    if not _broadcasts_to(value.shape, one):
        raise ModelError(
            f"{name} of shape {tuple(value.shape)} does not fit one example's outputs of shape "
            f"{tuple(outputs.shape[1:])}: expected a weight per class; for weights of the examples "
            "themselves, give a callable that returns (sums, weights)"
        )
    return value.detach().to(outputs.device, outputs.dtype)


def _broadcasts_to(shape: torch.Size, target: torch.Size) -> bool:
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(a in (1, b) for a, b in pairs)
