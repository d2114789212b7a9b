"""Losses: means over examples, or over what their labels count, and what they take."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sharpkit.contract.class_losses import IGNORED, class_formula
from sharpkit.contract.mean_check import check_parts
from sharpkit.contract.terms import Formula, Terms, check_same_shape, count, mean_and_weight
from sharpkit.contract.torch_losses import formula_of, module_of
from sharpkit.errors import ArgumentError, DataError, ModelError

# a name, a loss module or function of torch's, or a callable (outputs, labels)
Loss: TypeAlias = str | Callable[[Any, Tensor], Any]


@dataclass(frozen=True)
class MeanLoss:
    """A loss whose value over a set is the weighted mean of its values over the parts."""

    given: Loss  # the loss as it was given
    exact: bool  # whether it is of known form; if not, `check_is_mean` tests it
    formula: Formula = field(repr=False)

    def terms(self, outputs: Any, labels: Tensor) -> Terms:
        """The mean of a batch and the weight of that mean among others.

        L(A ∪ B) = (w_A L_A + w_B L_B) / (w_A + w_B). Works inside torch.func transformations.

        Args:
            outputs: A tensor of shape (n, ...); for a callable whatever the model returns.
            labels: Shape (n, ...); which one is up to the loss.

        Returns:
            tuple[Tensor, Tensor]: The mean, a scalar of the dtype of the outputs, a constant 0
                where the weight is 0; and the weight, a float64 scalar without gradient.

        Raises:
            DataError, ModelError: If shapes do not fit.

        Example:
            >>> loss = resolve_loss("cross_entropy")
            >>> labels = torch.tensor([[1, -100, 0], [-100, -100, 1]])
            >>> loss.terms(torch.zeros(2, 3, 2), labels)  # log 2 over three labelled positions
            (tensor(0.6931), tensor(3., dtype=torch.float64))
        """
        return self.formula.terms(outputs, labels)

    def __call__(self, outputs: Any, labels: Tensor) -> Tensor:
        """The mean alone."""
        return self.terms(outputs, labels)[0]

    def where_all_count(self, labels: Iterable[Tensor]) -> MeanLoss:
        """The same loss by fewer calls, if none of these labels is one that it ignores.

        Example:
            >>> loss = resolve_loss("cross_entropy").where_all_count([torch.tensor([0, 1])])
            >>> loss.terms(torch.zeros(2, 2), torch.tensor([0, 1]))
            (tensor(0.6931), tensor(2., dtype=torch.float64))
        """
        f = self.formula
        if f.whole is None or not all(
            len(part)
            and not part.is_floating_point()
            and bool((part != f.ignored).all())
            and part[0].numel()
            for part in labels
        ):
            return self
        return replace(self, formula=f.whole)

    def check(self, outputs: Any, labels: Tensor) -> None:
        """Raise DataError or ModelError unless outputs and labels of a batch fit each other."""
        self.formula.check(outputs, labels)


def resolve_loss(loss: Loss) -> MeanLoss:
    """The loss with its normaliser.

    Args:
        loss: One of
            - "cross_entropy": logits (n, classes) with labels (n,), or (n, positions, classes)
              with (n, positions); labels of −100 are ignored;
            - "mse": ½‖f(x) − y‖², labels shaped as the outputs;
            - a loss module of torch's, or its function, alone or in functools.partial with
              keywords; reduction="sum" is read as "mean";
            - a callable (outputs, labels) that returns a mean over examples, or a pair of tensors
              (sums, weights): the loss of any examples is then Σ sums / Σ weights. `outputs` is
              what the model returns, also a tuple or dict.

    Returns:
        MeanLoss: `loss` itself if it is one.

    Raises:
        ArgumentError: For anything else, and for reduction="none".

    Example:
        >>> loss = resolve_loss(nn.CrossEntropyLoss(weight=torch.tensor([3.0, 1.0])))
        >>> loss.terms(torch.zeros(2, 2), torch.tensor([0, 1]))[1].item()
        4.0
    """
    resolved = _resolve(loss)
    module = _module(resolved.given)
    if resolved is not loss and module is not None and module.reduction == "sum":
        warnings.warn(
            f'{type(module).__name__}(reduction="sum") is read as its mean, reduction="mean": a '
            "sum grows with the number of examples",
            stacklevel=2,
        )
    return resolved


def check_is_mean(loss: MeanLoss, outputs: Any, labels: Tensor) -> None:
    """Raise ModelError unless a loss of unknown form is the weighted mean of its parts.

    Compares L(all) with Σ weight · mean / Σ weight over single examples and unequal splits, and
    tests that the loss is a scalar or (sums, weights), repeatable, and leaves its arguments alone.
    Labels are as different as there are, sorted; at most 30 examples are looked at.

    Raises:
        ModelError: With the two values, the likely cause and the ways out.

    Example:
        >>> loss = resolve_loss(lambda f, y: (f - y).square().sum())
        >>> check_is_mean(loss, torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
        Traceback (most recent call last):
        ...
        sharpkit.errors.ModelError: the loss is not a mean over examples: 5 for 2 examples ...
    """
    if not loss.exact:
        check_parts(loss.terms, outputs, labels)


def check_labels(labels: Tensor, outputs: Any, loss: Loss) -> None:
    """Raise DataError unless the labels of any number of examples fit the outputs of some."""
    resolved = _resolve(loss)
    if resolved.exact and isinstance(outputs, Tensor) and outputs.ndim > 0:
        outputs = outputs[:1].expand(labels.shape[0], *outputs.shape[1:])
    resolved.check(outputs, labels)


def check_class_labels(labels: Tensor, outputs: Any) -> None:
    """Raise DataError unless every example has one class, and the outputs are its logits.

    For what needs a class per example, such as margins: no positions, nothing ignored.
    """
    if isinstance(outputs, Tensor) and outputs.ndim != 2:
        raise DataError(
            f"expected outputs of shape (n, classes), got {tuple(outputs.shape)}: this needs one "
            "class per example"
        )
    check_labels(labels, outputs, "cross_entropy")
    if bool((labels == IGNORED).any()):
        raise DataError(
            f"{int((labels == IGNORED).sum())} labels are {IGNORED}, which a loss ignores: this "
            "needs a class for every example; leave those examples out"
        )


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits, exact also where the network is certain of the right class.

    With d_j = z_j − z_y the loss of one example is softplus(logsumexp_{j≠y} d_j). The usual form,
    −log softmax(z)_y, has the gradient p_y − 1 in the true class, which rounds to 0 as soon as
    p_y > 1 − 6e-8 in float32: the direction of steepest ascent is then wrong. Here every
    probability keeps its relative precision down to the smallest representable number.

    Args:
        outputs: Logits of shape (n, classes) or (n, positions, classes), any floating dtype.
        labels: Class indices of shape (n,) or (n, positions), int64, each in [0, classes), or
            −100 where there is none.

    Returns:
        Tensor: The mean over labelled positions, a scalar of the dtype of `outputs`.

    Source:
        The identity −log p_y = log(1 + Σ_{j≠y} exp(z_j − z_y)).

    Example:
        >>> import torch
        >>> z = torch.tensor([[30.0, 0.0]])
        >>> cross_entropy(z, torch.tensor([0])).item()  # exp(-30)
        9.357...e-14
        >>> torch.nn.functional.cross_entropy(z, torch.tensor([0])).item()
        0.0
    """
    return _NAMED["cross_entropy"].terms(outputs, labels)[0]


def mean_squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean over examples of half the squared distance, ½‖f(x) − y‖²; labels shaped as outputs.

    Example:
        >>> import torch
        >>> mean_squared_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])).item()
        2.5
    """
    return _NAMED["mse"].terms(outputs, labels)[0]


def _half_squared(outputs: Tensor, labels: Tensor) -> Terms:
    check_same_shape(outputs, labels)
    distances = (outputs - labels.to(outputs.dtype)).square().flatten(1).sum(1)
    return 0.5 * distances.mean(), count(outputs)


_NAMED = {
    "cross_entropy": class_formula(nn.CrossEntropyLoss(ignore_index=IGNORED), axis=-1),
    "mse": Formula(_half_squared, check_same_shape),
}


def _resolve(loss: Loss) -> MeanLoss:
    if isinstance(loss, MeanLoss):
        return loss
    if isinstance(loss, str) and loss in _NAMED:
        return MeanLoss(loss, True, _NAMED[loss])
    if isinstance(loss, str) or not callable(loss):
        raise ArgumentError(
            f"unknown loss {loss!r}: expected one of {sorted(_NAMED)}, a loss module of torch's, "
            "or a callable (outputs, labels) -> mean loss, or (sums, weights)"
        )
    if isinstance(loss, type):
        raise ArgumentError(f"the loss is the class {loss.__name__}: give {loss.__name__}()")
    module = _module(loss)
    formula = None if module is None else formula_of(module)
    if module is not None and module.reduction == "none":
        raise ArgumentError(
            f'{type(module).__name__}(reduction="none") gives no single loss: use reduction="mean"'
        )
    if formula is not None:
        return MeanLoss(loss, True, formula)
    return MeanLoss(loss, False, Formula(partial(_called_terms, loss), _no_check))


def _module(loss: Loss) -> nn.Module | None:
    """The loss as a module of torch's whose formula is known."""
    loss = getattr(loss, "_orig_mod", loss)  # of torch.compile
    module = loss if isinstance(loss, nn.Module) else module_of(loss)
    return module if module is not None and formula_of(module) is not None else None


def _no_check(outputs: Any, labels: Tensor) -> None:
    """A loss of unknown form says itself what it takes."""


def _called_terms(loss: Callable[[Any, Tensor], Any], outputs: Any, labels: Tensor) -> Terms:
    result = loss(outputs, labels)
    if isinstance(result, Tensor):
        if result.numel() != 1:
            raise ModelError(
                f"the loss must be a scalar, got {tuple(result.shape)}: reduce it to its mean over "
                "examples, or return (sums, weights)"
            )
        return result.reshape(()), count(labels)
    if not (
        isinstance(result, tuple | list)
        and len(result) == 2
        and all(isinstance(part, Tensor) for part in result)
    ):
        raise ModelError(
            f"the loss must return a scalar tensor, its mean over examples, or a pair of tensors "
            f"(sums, weights), got {type(result).__name__}"
        )
    sums, weights = result
    if weights.requires_grad:
        raise ModelError(
            "the weights in (sums, weights) depend on the outputs, so the loss is not linear in "
            "the sums: detach them if they are meant as constants"
        )
    return mean_and_weight(sums, weights.sum(dtype=torch.float64))
