"""What is known of a model beside the measures: its loss, and its accuracy if it has one."""

from __future__ import annotations

from torch import nn

from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import as_data
from sharpkit.contract.losses import MeanLoss
from sharpkit.contract.mean_loss import loss_of
from sharpkit.contract.parameters import check_finite_weights
from sharpkit.measures.passes import setup, single_terms, weighted_mean
from sharpkit.training.loop import classifies


def accuracy_and_loss(model: nn.Module, examples: Examples, loss: MeanLoss) -> dict[str, float]:
    """The mean loss, and the share of examples classified rightly where that has a meaning.

    Returns:
        dict: "loss"; and "acc", if outputs are (n, classes) and labels integers (n,).

    Raises:
        ModelError: If a weight, an output or the loss is NaN or infinite.
        DataError: If the outputs do not fit the labels.

    Example:
        >>> import torch
        >>> from sharpkit.contract.losses import resolve_loss
        >>> model = nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.eye(2)
        >>> examples = Examples(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
        >>> both = accuracy_and_loss(model, examples, resolve_loss("cross_entropy"))
        >>> both["acc"], round(both["loss"], 4)  # (log(1 + e⁻²) + log(1 + e²)) / 2
        (0.5, 1.1269)
    """
    check_finite_weights(model)
    if not _classifies(model, examples, loss):
        return {"loss": loss_of(model, examples, loss)}
    if not examples.in_memory:
        with frozen(model) as found:
            right = setup(model, as_data(examples), found, loss).accuracy()
        return {"acc": right, "loss": loss_of(model, examples, loss)}
    with frozen(model) as found:
        run = setup(model, (examples.inputs, examples.labels), found, loss)
        outputs = run.logits()
    right = float((outputs.argmax(1) == run.labels).double().mean())
    if loss.given != "cross_entropy":
        return {"acc": right, "loss": loss_of(model, examples, loss)}
    mean = weighted_mean(*single_terms("cross_entropy")(outputs, run.labels))
    return {"acc": right, "loss": mean.value}


def _classifies(model: nn.Module, examples: Examples, loss: MeanLoss) -> bool:
    """Whether a model has a logit for every class and an example one class as its label."""
    if not examples.uniform:
        return False
    with frozen(model):
        function = FunctionalModel(model, whole=not loss.exact)
        with function.evaluating():
            one = examples.slice(0, 1).to(function.device, function.dtype)
            outputs = function({}, one.inputs)
    return classifies(outputs, one.labels)
