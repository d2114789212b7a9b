"""Forward passes over a data set in batches: what the measures on outputs share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharpkit.contract.examples import Data, Examples, load_in_order
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.losses import Loss, check_labels, resolve_loss
from sharpkit.errors import DataError, ModelError
from sharpkit.measures.measure import Estimate

BATCH = 64  # examples of a forward pass; results depend on it by rounding only


@dataclass(frozen=True)
class Setup:
    """A model as a function, and the examples; made inside `frozen`."""

    function: FunctionalModel
    examples: Examples

    def batches(self, size: int = BATCH) -> Iterator[Examples]:
        """The examples in their own order, on the model's device and in its dtype."""
        for start in range(0, len(self.examples), size):
            batch = self.examples.slice(start, start + size)
            yield batch.to(self.function.device, self.function.dtype)

    def logits(self, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The outputs of all examples, shape (n, classes), without gradients.

        Raises:
            DataError: If labels and outputs are not those of a classification.
            ModelError: If an output is NaN or infinite, at the model's own parameters only.
        """
        with torch.no_grad():
            parts = [self.function(parameters or {}, b.inputs) for b in self.batches()]
        outputs = torch.cat(parts)
        check_labels(self.examples.labels, outputs, "cross_entropy")
        if parameters is None and not bool(torch.isfinite(outputs).all()):
            raise ModelError("the model has NaN or infinite outputs")
        return outputs

    def accuracy(self, parameters: Mapping[str, Tensor] | None = None) -> float:
        """The share of examples whose largest output is that of their label."""
        return float((self.logits(parameters).argmax(1) == self.labels).double().mean())

    @property
    def labels(self) -> Tensor:
        """The labels on the model's device."""
        return self.examples.labels.to(self.function.device)


def setup(model: nn.Module, data: Data) -> Setup:
    """Collect the examples; the model must be inside `frozen`."""
    return Setup(FunctionalModel(model), load_in_order(data))


def images(examples: Examples, what: str) -> Tensor:
    """The inputs, if they are one floating-point tensor.

    Raises:
        DataError: For token indices, dicts or tuples.
    """
    inputs = examples.inputs
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise DataError(f"{what} expects inputs that are one tensor of real numbers")
    return inputs


def single_losses(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of each example, shape (n,), from outputs (n, ...) and labels (n, ...).

    A mean loss is the same for one example as for many, so it is vectorised over rows.
    """
    loss_fn = resolve_loss(loss)
    one = lambda output, label: loss_fn(output.unsqueeze(0), label.unsqueeze(0))  # noqa: E731
    return torch.func.vmap(one)


def mean_of(values: Tensor) -> Estimate:
    """Mean of values of shape (n,) and its standard error (NaN for one value)."""
    values = values.double()
    n = len(values)
    error = float(values.std() / n**0.5) if n > 1 else float("nan")
    return Estimate(float(values.mean()), error)
