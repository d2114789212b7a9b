"""Forward passes over a data set in batches: what the measures on outputs share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sharpkit.contract.checks import Probe, examine
from sharpkit.contract.distributed_data import DistributedData
from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.loading import Data, as_data, load_in_order
from sharpkit.contract.losses import Loss, check_class_labels, resolve_loss
from sharpkit.contract.ranks import ALONE, Team
from sharpkit.contract.shares import read_share
from sharpkit.contract.state import Found
from sharpkit.contract.team_checks import require_same_weights
from sharpkit.errors import DataError, ModelError
from sharpkit.measures.measure import Estimate

BATCH = 64  # examples of a forward pass; results depend on it by rounding only


@dataclass(frozen=True)
class Setup:
    """A model as a function, and the examples; made inside `frozen`."""

    function: FunctionalModel
    examples: Examples
    probe: Probe | None = None  # what the model was examined with
    team: Team = ALONE  # processes that have the other examples, for `mean_loss` and its gradient

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
        # assigned, so that models that reach their weights by references of their own see them
        with self.function.evaluating(), self.function.assigned(parameters or {}):
            parts = [self.function.outputs(b.inputs).detach() for b in self.batches()]
        outputs = torch.cat(parts)
        check_class_labels(self.examples.labels, outputs)
        if parameters is None and not bool(torch.isfinite(outputs).all()):
            raise ModelError("the model has NaN or infinite outputs")
        return outputs

    def accuracy(self, parameters: Mapping[str, Tensor] | None = None) -> float:
        """The share of examples whose largest output is that of their label."""
        if self.examples.in_memory:
            return float((self.logits(parameters).argmax(1) == self.labels).double().mean())
        right = 0
        with self.function.evaluating(), self.function.assigned(parameters or {}):
            for batch in self.batches():
                outputs = self.function.outputs(batch.inputs).detach()
                check_class_labels(batch.labels, outputs)
                if parameters is None and not bool(torch.isfinite(outputs).all()):
                    raise ModelError("the model has NaN or infinite outputs")
                right += int((outputs.argmax(1) == batch.labels).sum())
        return right / len(self.examples)

    @property
    def labels(self) -> Tensor:
        """The labels on the model's device."""
        return self.examples.labels.to(self.function.device)


def setup(model: nn.Module, data: Data, found: Found, loss: Loss = "cross_entropy") -> Setup:
    """Collect the examples and check the contract; the model must be inside `frozen`."""
    loss_fn = resolve_loss(loss)
    function = FunctionalModel(model, whole=not loss_fn.exact)
    examples = load_in_order(data)
    return Setup(function, examples, examine(function, loss_fn, examples, found))


def setup_together(
    model: nn.Module, data: Data | DistributedData, found: Found, loss: Loss = "cross_entropy"
) -> Setup:
    """As `setup`; of `DistributedData` the examples are the share of this process.

    Then only `mean_loss` and `mean_gradient` are those of all examples.
    """
    if not isinstance(data, DistributedData):
        return setup(model, data, found, loss)
    require_same_weights(data.team, model)
    share = read_share(data).examples
    run = data.team.together(lambda: setup(model, as_data(share), found, loss))
    return replace(run, team=data.team)


def images(examples: Examples, what: str) -> Tensor:
    """The inputs, if they are one floating-point tensor.

    Raises:
        DataError: For token indices, dicts or tuples.
    """
    inputs = examples.inputs
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise DataError(f"{what} expects inputs that are one tensor of real numbers")
    return inputs


def mean_loss(run: Setup, parameters: Mapping[str, Tensor], loss: Loss) -> float:
    """The mean loss of all examples at the given parameters, without gradients."""
    loss_fn = resolve_loss(loss)

    def sums() -> tuple[float, float]:
        total = counted = 0.0
        with run.function.evaluating():
            for batch in run.batches():
                mean, weight = loss_fn.terms(run.function(parameters, batch.inputs), batch.labels)
                total += float(mean.detach().double() * weight)
                counted += float(weight)
        return total, counted

    total, counted = map(sum, zip(*run.team.gathered(sums), strict=True))
    return total / counted


def mean_gradient(run: Setup, parameters: Mapping[str, Tensor], loss: Loss) -> dict[str, Tensor]:
    """The gradient of the mean loss at the given parameters, summed in float64.

    Raises:
        ModelError: If it is NaN or infinite.
    """
    loss_fn = resolve_loss(loss)
    leaves = {k: p.detach().requires_grad_() for k, p in parameters.items()}
    sizes = [p.numel() for p in parameters.values()]
    weights: list[float] = []

    def add(out: Tensor) -> None:
        total = dict(zip(leaves, torch.split(out, sizes), strict=True))
        for batch in run.batches():
            with torch.enable_grad():
                mean, weight = loss_fn.terms(run.function(leaves, batch.inputs), batch.labels)
                parts = torch.autograd.grad(mean, list(leaves.values()), materialize_grads=True)
            for name, part in zip(leaves, parts, strict=True):
                total[name] += part.double().reshape(-1) * weight
            weights.append(float(weight))

    like = torch.zeros(0, dtype=torch.float64, device=run.function.device)
    found = run.team.summed(sum(sizes), like, add, same=like)
    if not bool(torch.isfinite(found).all()):
        raise ModelError("a gradient is NaN or infinite")
    counted = sum(run.team.gathered(lambda: sum(weights)))
    parts = zip(parameters.items(), torch.split(found / counted, sizes), strict=True)
    return {k: part.view_as(p) for (k, p), part in parts}


def single_terms(loss: Loss) -> Callable[[Any, Tensor], tuple[Tensor, Tensor]]:
    """The sum and the weight of each example's loss, shape (n,), from outputs and labels (n, ...).

    The loss of any examples is Σ sums / Σ weights; for a plain mean the weights are 1.
    """
    loss_fn = resolve_loss(loss)

    def one(output: Any, label: Tensor) -> tuple[Tensor, Tensor]:
        outputs = pytree.tree_map(lambda t: t.unsqueeze(0) if isinstance(t, Tensor) else t, output)
        mean, weight = loss_fn.terms(outputs, label.unsqueeze(0))
        return mean * weight.to(mean.dtype), weight

    return torch.func.vmap(one)


def weighted_mean(sums: Tensor, weights: Tensor) -> Estimate:
    """Σ sums / Σ weights of shape (n,), and its standard error over examples (NaN for one)."""
    sums, weights = sums.double(), weights.double()
    n, total = len(sums), float(weights.sum())
    if not total > 0:
        raise DataError("no label counts in the loss: all are ignored, or weigh 0")
    value = float(sums.sum()) / total
    off = (sums - value * weights) * (n / total)
    error = float(off.square().sum() / (n - 1) / n) ** 0.5 if n > 1 else float("nan")
    return Estimate(value, error)


def mean_of(values: Tensor) -> Estimate:
    """Mean of values of shape (n,) and its standard error (NaN for one value)."""
    values = values.double()
    n = len(values)
    error = float(values.std() / n**0.5) if n > 1 else float("nan")
    return Estimate(float(values.mean()), error)
