"""Curvature of a cross-entropy by its logits, in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharpkit.contract.losses import MeanLoss
from sharpkit.contract.torch_losses import module_of


@dataclass(frozen=True)
class SoftmaxLoss:
    """What a cross-entropy with labels that name classes is made of."""

    axis: int  # of the classes, where the outputs have another shape than the labels allow: last
    ignored: int  # a label that does not count
    weight: Tensor | None  # of the classes
    smoothing: float

    @property
    def plain(self) -> bool:
        """Whether it is the negative log-likelihood of the labels."""
        return self.weight is None and not self.smoothing


def softmax_loss(loss: MeanLoss) -> SoftmaxLoss | None:
    """How a loss is a cross-entropy; None for any other.

    Example:
        >>> from sharpkit.contract.losses import resolve_loss
        >>> softmax_loss(resolve_loss("cross_entropy"))
        SoftmaxLoss(axis=-1, ignored=-100, weight=None, smoothing=0.0)
        >>> softmax_loss(resolve_loss("mse"))
    """
    given = getattr(loss.given, "_orig_mod", loss.given)
    if given == "cross_entropy":
        return SoftmaxLoss(-1, nn.CrossEntropyLoss().ignore_index, None, 0.0)
    module = given if isinstance(given, nn.Module) else module_of(given)
    if not (loss.exact and isinstance(module, nn.CrossEntropyLoss)):
        return None
    return SoftmaxLoss(1, module.ignore_index, module.weight, module.label_smoothing)


class SoftmaxCurvature:
    """The Hessian of a mean cross-entropy by its logits, as a map of vectors.

    At each position t with probabilities p, and w_t its weight over the sum of all weights (0 where
    the label is ignored),

        u -> w_t (p ∘ u − p (p·u)),

    which takes p and one more tensor of the size of the logits, and forms no (classes x classes).
    Smoothing of the labels is linear in the logits and changes nothing, if classes have no weights.
    The entry of u at the most probable class is subtracted first, which changes nothing either, but
    leaves no difference of nearly equal numbers where p rounds to 1.

    Args:
        loss: With class weights, or smoothing, or neither, not both.
        outputs: Logits of shape (n, classes, ...) or (n, ..., classes).
        labels: Integers of the shape without the classes.

    Example:
        Two classes of probability 1/2:

        >>> loss = SoftmaxLoss(-1, -100, None, 0.0)
        >>> matrix = SoftmaxCurvature(loss, torch.zeros(1, 2), torch.tensor([0]))
        >>> matrix(torch.tensor([[1.0, 0.0]]))
        tensor([[ 0.2500, -0.2500]])
    """

    def __init__(self, loss: SoftmaxLoss, outputs: Tensor, labels: Tensor) -> None:
        fits = labels.shape == outputs.shape[:1] + outputs.shape[2:]
        self._axis = loss.axis if loss.axis == -1 or fits else -1
        self.p = outputs.detach().movedim(self._axis, -1).softmax(-1)
        counted = labels != loss.ignored
        weights = counted.to(self.p.dtype)
        if loss.weight is not None:
            weights = weights * loss.weight.detach().to(self.p)[labels.where(counted, 0).long()]
        total = weights.sum()
        self._share = (weights / torch.where(total > 0, total, 1.0)).unsqueeze(-1)
        self._top = self.p.argmax(-1, keepdim=True)

    def __call__(self, u: Tensor) -> Tensor:
        """The product with u of the shape of the logits."""
        u = u.movedim(self._axis, -1)
        moved = u - u.gather(-1, self._top)
        mean = (self.p.unsqueeze(-2) @ moved.unsqueeze(-1)).squeeze(-1)
        return moved.sub_(mean).mul_(self.p).mul_(self._share).movedim(-1, self._axis)


OutputMatrix = tuple[Callable[[Tensor], Tensor], tuple[Tensor, ...]]
"""A map u -> M u, and the tensors that it keeps beside an autograd graph."""
