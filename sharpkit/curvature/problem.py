"""What a curvature operator is about: a model at fixed weights, a mean loss, and examples.

Everything that could make the numbers wrong is refused here, with its cause, before any product
is computed.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import TensorDataset

from sharpkit.contract.examples import Data, Examples, Inputs, load_examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.losses import Loss, check_labels, resolve_loss
from sharpkit.contract.parameters import Parameters, select_parameters
from sharpkit.errors import ArgumentError, DataError, ModelError

_PROBED = 64  # examples on which determinism is tested


@dataclass(frozen=True)
class Problem:
    """A model at the weights it had, a loss and the examples; unaffected by later training.

    Attributes:
        model: The module; only its code is used.
        function: The module as a function of its parameters.
        weights: The selected parameters, copied, as leaves that require gradients.
        others: The remaining parameters, copied.
        loss: The loss as given.
        loss_fn: (outputs, labels) -> mean loss.
        examples: All examples, in order.
    """

    model: nn.Module
    function: FunctionalModel
    weights: dict[str, Tensor]
    others: dict[str, Tensor]
    loss: Loss
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    examples: Examples

    def outputs(self, weights: Sequence[Tensor], inputs: Inputs) -> Tensor:
        """The model's outputs at other values of the selected parameters, in their order."""
        return self.function(
            {**self.others, **dict(zip(self.weights, weights, strict=True))}, inputs
        )

    def examples_between(self, start: int, stop: int) -> Examples:
        """Examples start to stop on the model's device, in its dtype."""
        return self.examples.slice(start, stop).to(self.function.device, self.function.dtype)


def make_problem(
    model: nn.Module,
    data: Data,
    loss: Loss,
    parameters: Parameters,
    n: int | None,
    seed: int | None,
) -> Problem:
    """Collect and check; the model must be inside `frozen` already.

    Raises:
        ArgumentError: For an empty selection, mixed or half-precision parameters, or a bad n.
        DataError: For data that differ between two passes, or labels that do not fit.
        ModelError: For random or batch-dependent outputs, or a loss that is not a finite mean.
    """
    selected = _select(model, parameters)
    function = FunctionalModel(model)
    weights = {name: w.clone().requires_grad_() for name, w in selected.items()}
    others = {
        name: p.detach().clone() for name, p in model.named_parameters() if name not in weights
    }
    examples = _load_twice(data, n, seed)
    problem = Problem(model, function, weights, others, loss, resolve_loss(loss), examples)
    _check_outputs(problem)
    return problem


def refuse_training_mode(model: nn.Module) -> None:
    """Raise ModelError if a layer in training mode would make the loss random or batch-dependent.

    Example:
        >>> refuse_training_mode(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
        Traceback (most recent call last):
        ...
        sharpkit.errors.ModelError: '1' (BatchNorm1d) is in training mode, ...: call model.eval()
    """
    for name, module in model.named_modules():
        described = f"{name!r} ({type(module).__name__})"
        if isinstance(module, nn.modules.batchnorm._NormBase):
            if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise ModelError(
                    f"{described} is in training mode, where the loss of an example depends on "
                    "its batch and has no Hessian of its own: call model.eval()"
                )
            if module.running_mean is None and isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise ModelError(
                    f"{described} keeps no running statistics, so the loss of an example depends "
                    "on its batch also in eval mode: use track_running_stats=True"
                )
        rate = getattr(
            module, "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "dropout", 0.0
        )
        if module.training and isinstance(rate, float) and rate > 0:
            raise ModelError(
                f"{described} drops units at random in training mode: call model.eval()"
            )


def missing_derivative(error: BaseException) -> str | None:
    """The operation that lacks a derivative, if that is what an error of autograd is about.

    Example:
        >>> missing_derivative(RuntimeError("derivative for aten::foo_backward is not implemented"))
        'aten::foo_backward'
    """
    text = str(error)
    for pattern in (
        r"derivative for (\S+) is not implemented",
        r"[Ff]orward AD with (\S+) that does not support it",
        r"implement.*(?:jvp|vjp|forward mode).*for (\S+)",
        r"(CuDNN RNN)",
        r"(once_differentiable)",
        r"(?:custom )?(autograd\.Function)[^.]*(?:jvp|forward|setup_context)",
    ):
        found = re.search(pattern, text)
        if found:
            return found.group(1).rstrip(".,:")
    if isinstance(error, NotImplementedError) or "jvp" in text or "backward function" in text:
        return "a custom autograd.Function"
    return None


def _select(model: nn.Module, parameters: Parameters) -> dict[str, Tensor]:
    if not isinstance(parameters, str | nn.Module | None):
        parameters = _listed(parameters)
    selected = select_parameters(model, parameters)
    if parameters is None:
        fixed = [name for name, p in model.named_parameters() if not p.requires_grad]
        selected = {name: w for name, w in selected.items() if name not in set(fixed)}
        if not selected:
            raise ArgumentError(
                "no parameter is selected: all have requires_grad=False; "
                'name the ones to measure, or parameters="*" for all'
            )
        if fixed:
            warnings.warn(
                f"frozen parameters (requires_grad=False) are left out: {_some(fixed)}; "
                'parameters="*" measures them too',
                stacklevel=5,
            )
    kinds = {w.dtype for w in selected.values()}
    if len(kinds) != 1 or not kinds <= {torch.float32, torch.float64}:
        raise ArgumentError(
            f"the selected parameters are {', '.join(sorted(map(str, kinds)))}: expected all "
            "float32 or all float64; call model.float() or model.double()"
        )
    devices = {w.device for w in selected.values()}
    if len(devices) != 1:
        raise ArgumentError(
            f"the selected parameters are on several devices: {sorted(map(str, devices))}"
        )
    return selected


def _listed(parameters: Iterable[str] | Iterable[nn.Module]) -> list[str] | list[nn.Module]:
    listed = list(parameters)
    if not listed:
        raise ArgumentError("no parameter is selected: the selection is empty")
    return listed  # type: ignore[return-value]


def _load_twice(data: Data, n: int | None, seed: int | None) -> Examples:
    """The examples, after a second pass over anything that could give others."""
    examples = load_examples(data, n=n, seed=seed)
    if isinstance(data, tuple | list | TensorDataset):
        return examples
    again = load_examples(data, n=n, seed=seed)
    pairs = zip(
        pytree.tree_leaves((examples.inputs, examples.labels)),
        pytree.tree_leaves((again.inputs, again.labels)),
        strict=True,
    )
    if not all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs):
        raise DataError(
            "the data differ between two passes: a sampler that shuffles, or a random "
            "transformation; every product of an operator must see the same examples"
        )
    return examples


def _check_outputs(problem: Problem) -> None:
    """Raise unless outputs are repeatable rows and the loss is their finite mean."""
    few = problem.examples_between(0, min(_PROBED, len(problem.examples)))
    weights = list(problem.weights.values())
    with torch.no_grad():
        outputs = problem.outputs(weights, few.inputs)
        if outputs.ndim == 0 or outputs.shape[0] != len(few):
            raise ModelError(
                f"the model returned outputs of shape {tuple(outputs.shape)} for {len(few)} "
                "examples: expected one row of outputs per example"
            )
        check_labels(problem.examples.labels, outputs, problem.loss)
        if not _close(outputs, problem.outputs(weights, few.inputs)):
            raise ModelError(
                "the model is random: two passes over the same examples differ "
                "(dropout that ignores eval mode?)"
            )
        one = problem.examples_between(0, 1)
        if not _close(outputs[:1], problem.outputs(weights, one.inputs)):
            raise ModelError(
                "the outputs of an example depend on the others in its batch "
                "(batch statistics?), so the loss is not a mean over examples"
            )
        _check_loss(problem, outputs, few.labels)


def _check_loss(problem: Problem, outputs: Tensor, labels: Tensor) -> None:
    value = problem.loss_fn(outputs, labels)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ModelError(f"the loss must be a scalar, got {got}: reduce it to its mean")
    if not bool(torch.isfinite(value).all()):
        raise ModelError(
            f"the loss of the first {len(labels)} examples is {float(value)}: expected a finite "
            "number"
        )
    twice = problem.loss_fn(torch.cat([outputs, outputs]), torch.cat([labels, labels]))
    if not _close(twice.reshape(1), value.reshape(1)):
        raise ModelError(
            f"the loss is not a mean over examples: with every example given twice it is "
            f"{float(twice):.6g} instead of {float(value):.6g}; use a mean reduction"
        )


def _close(a: Tensor, b: Tensor) -> bool:
    if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
        return True  # what is not finite is reported by the check of the loss
    scale = float(a.abs().max()) if a.numel() else 0.0
    return bool((a - b).abs().max() <= 1e3 * torch.finfo(a.dtype).eps * max(scale, 1e-30))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
