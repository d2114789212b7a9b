"""Losses of every kind: what is given to sharpkit, labels for it, and its sums written out.

`sums` is the definition that references use: the loss of a set of examples is the sum of its first
value over them, divided by the sum of the second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES, VALUES, POSITIONS = 3, 2, 4

Sums = Callable[[Any, Tensor], tuple[Tensor, float]]


@dataclass(frozen=True)
class LossCase:
    """A loss: the outputs it takes (see `Head`), labels for n examples, and what it is."""

    name: str
    outputs: str
    labels: Callable[[int], Tensor]
    given: Any
    sums: Sums


def random_loss(name: str, rng: Random) -> LossCase:
    """The loss of that name, its options drawn from `rng` and torch's generator."""
    return LossCase(name, *LOSSES[name](rng))


def _class_labels(n: int) -> Tensor:
    return torch.randint(0, CLASSES, (n,))


def _token_labels(n: int) -> Tensor:
    """Class of every position, many of them ignored; of the second example all."""
    labels = torch.randint(0, CLASSES, (n, POSITIONS))
    labels[torch.rand(n, POSITIONS) < 0.4] = -100
    labels[1] = -100
    labels[0, 0] = 1
    return labels


def _values(n: int) -> Tensor:
    return torch.randn(n, VALUES)


def _bits(n: int) -> Tensor:
    return torch.randint(0, 2, (n, VALUES)).double()


def _probabilities(n: int) -> Tensor:
    return torch.randn(n, CLASSES).softmax(1)


def _over_examples(sum_of: Callable[[Any, Tensor], Tensor]) -> Sums:
    return lambda outputs, labels: (sum_of(outputs, labels), float(len(labels)))


def _cross_entropy_sum(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


def _cross_entropy(rng: Random) -> tuple[Any, ...]:
    return "classes", _class_labels, "cross_entropy", _over_examples(_cross_entropy_sum)


def _token_cross_entropy(rng: Random) -> tuple[Any, ...]:
    def sums(outputs: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        chosen = labels != -100
        return _cross_entropy_sum(outputs[chosen], labels[chosen]), float(chosen.sum())

    return "tokens", _token_labels, "cross_entropy", sums


def _mse(rng: Random) -> tuple[Any, ...]:
    return "values", _values, "mse", _over_examples(lambda o, y: 0.5 * (o - y).square().sum())


def _torch_sums(given: nn.CrossEntropyLoss | nn.NLLLoss) -> Sums:
    """Torch's own sum, and its normaliser written out: Σ class weights of the labels that count."""
    module = type(given)(**{**_options(given), "reduction": "sum"})

    def sums(outputs: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        counted = labels[labels != given.ignore_index]
        weight = torch.ones(CLASSES) if given.weight is None else given.weight
        return module(outputs, labels), float(weight[counted].sum())

    return sums


def _options(module: nn.Module) -> dict[str, Any]:
    names = ("weight", "ignore_index", "label_smoothing")
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def _class_weights() -> Tensor:
    return torch.tensor([5.0, 1.0, 0.2], dtype=torch.float64)


def _weighted_cross_entropy(rng: Random) -> tuple[Any, ...]:
    given = nn.CrossEntropyLoss(weight=_class_weights())
    return "classes", _class_labels, given, _torch_sums(given)


def _ignoring_cross_entropy(rng: Random) -> tuple[Any, ...]:
    given = nn.CrossEntropyLoss(ignore_index=rng.randrange(CLASSES))
    # both an ignored example and others
    labels = lambda n: (torch.arange(n) + rng.randrange(3)) % CLASSES  # noqa: E731
    return "classes", labels, given, _torch_sums(given)


def _smoothed_cross_entropy(rng: Random) -> tuple[Any, ...]:
    weight = rng.choice([None, _class_weights()])
    given = nn.CrossEntropyLoss(weight=weight, label_smoothing=0.2)
    return "classes", _class_labels, given, _torch_sums(given)


def _probability_cross_entropy(rng: Random) -> tuple[Any, ...]:
    weight = rng.choice([None, _class_weights()])
    given = nn.CrossEntropyLoss(weight=weight, label_smoothing=rng.choice([0.0, 0.1]))
    module = nn.CrossEntropyLoss(**{**_options(given), "reduction": "sum"})
    return "classes", _probabilities, given, _over_examples(module)


def _channel_cross_entropy(rng: Random) -> tuple[Any, ...]:
    weight = rng.choice([None, _class_weights()])
    given = nn.CrossEntropyLoss(weight=weight, label_smoothing=rng.choice([0.0, 0.1]))
    return "channels", _token_labels, given, _torch_sums(given)


def _nll(rng: Random) -> tuple[Any, ...]:
    weight = rng.choice([None, _class_weights()])
    given = nn.NLLLoss(weight=weight, ignore_index=rng.choice([-100, 0]))
    labels = lambda n: torch.arange(n) % CLASSES  # noqa: E731
    return "log_classes", labels, given, _torch_sums(given)


def _binary_cross_entropy(rng: Random) -> tuple[Any, ...]:
    weight = torch.tensor([3.0, 0.5], dtype=torch.float64)
    given = nn.BCEWithLogitsLoss(pos_weight=weight)

    def sum_of(outputs: Tensor, labels: Tensor) -> Tensor:
        each = -weight * labels * F.logsigmoid(outputs) - (1 - labels) * F.logsigmoid(-outputs)
        return each.mean(1).sum()

    return "values", _bits, given, _over_examples(sum_of)


def _torch_mse(rng: Random) -> tuple[Any, ...]:
    sum_of = lambda o, y: (o - y).square().mean(1).sum()  # noqa: E731
    return "values", _values, nn.MSELoss(), _over_examples(sum_of)


def _huber(rng: Random) -> tuple[Any, ...]:
    def sum_of(outputs: Tensor, labels: Tensor) -> Tensor:
        distance = (outputs - labels).abs()
        each = torch.where(distance < 0.7, 0.5 * distance**2, 0.7 * (distance - 0.35))
        return each.mean(1).sum()

    return "values", _values, nn.HuberLoss(delta=0.7), _over_examples(sum_of)


def _mean_callable(rng: Random) -> tuple[Any, ...]:
    def given(outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs - labels).pow(4).sum(1).mean() + outputs.exp().mean()

    def sum_of(outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs - labels).pow(4).sum() + outputs.exp().mean(1).sum()

    return "values", _values, given, _over_examples(sum_of)


def _weighted_callable(rng: Random) -> tuple[Any, ...]:
    """Sums and weights of every example; some weights are 0."""
    weights = torch.tensor([2.0, 0.0, 0.5], dtype=torch.float64)

    def given(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        weight = weights[labels]
        return weight * F.cross_entropy(outputs, labels, reduction="none"), weight

    def sums(outputs: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        picked = outputs.log_softmax(1)[torch.arange(len(labels)), labels]
        return -(weights[labels] * picked).sum(), float(weights[labels].sum())

    return "classes", lambda n: torch.arange(n) % CLASSES, given, sums


def _token_callable(rng: Random) -> tuple[Any, ...]:
    """Sums and counts over all tokens of a batch, as two scalars."""

    def given(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        counted = labels != -100
        each = F.cross_entropy(outputs.mT, labels.clamp(min=0), reduction="none")
        return (each * counted).sum(), counted.sum()

    return "tokens", _token_labels, given, _token_cross_entropy(rng)[-1]


def _several_outputs(outputs: str, first: Any, second: Any) -> tuple[Any, ...]:
    def given(outputs: Any, labels: Tensor) -> Tensor:
        smooth = F.cross_entropy(outputs[first], labels)
        return smooth + 0.3 * outputs[second].square().mean()

    def sum_of(outputs: Any, labels: Tensor) -> Tensor:
        picked = outputs[first].log_softmax(1)[torch.arange(len(labels)), labels]
        return -picked.sum() + 0.3 * outputs[second].square().mean(1).sum()

    return outputs, _class_labels, given, _over_examples(sum_of)


LOSSES: dict[str, Callable[[Random], tuple[Any, ...]]] = {
    "cross_entropy": _cross_entropy,
    "token_cross_entropy": _token_cross_entropy,
    "mse": _mse,
    "weighted_cross_entropy": _weighted_cross_entropy,
    "ignoring_cross_entropy": _ignoring_cross_entropy,
    "smoothed_cross_entropy": _smoothed_cross_entropy,
    "probability_cross_entropy": _probability_cross_entropy,
    "channel_cross_entropy": _channel_cross_entropy,
    "nll": _nll,
    "binary_cross_entropy": _binary_cross_entropy,
    "torch_mse": _torch_mse,
    "huber": _huber,
    "mean_callable": _mean_callable,
    "weighted_callable": _weighted_callable,
    "token_callable": _token_callable,
    "tuple_of_outputs": lambda rng: _several_outputs("tuple", 0, 1),
    "dict_of_outputs": lambda rng: _several_outputs("dict", "classes", "values"),
}
