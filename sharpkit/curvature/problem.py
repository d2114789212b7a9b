"""What a curvature operator is about: a model at fixed weights, a mean loss, and examples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sharpkit.contract.checks import Probe, close, examine
from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.holding import frozen, held
from sharpkit.contract.loading import Data
from sharpkit.contract.losses import Loss, MeanLoss, resolve_loss
from sharpkit.contract.modules import unwrapped
from sharpkit.contract.parameters import Parameters, floating_parameters, left_out
from sharpkit.contract.shares import read_share
from sharpkit.contract.state import Found
from sharpkit.contract.terms import Terms
from sharpkit.curvature.memory import require_memory
from sharpkit.errors import ArgumentError, ModelError

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """A model at the weights it had, a loss and the examples; unaffected by later training."""

    function: FunctionalModel  # the module, or a copy of it; of the module only the code is used
    copied: bool  # whether it is a copy whose own parameters are the leaves
    weights: dict[str, Tensor]  # the selected parameters, copied, complex ones as pairs of reals
    # the same as leaves for autograd; complex ones are complex in a copied model
    leaves: list[Tensor]
    fixed: dict[str, Tensor]  # the remaining parameters, copied
    loss: MeanLoss  # the loss with its weights
    examples: Examples  # all examples, in order
    probe: Probe  # a few examples with the outputs that the model had for them
    left_out: tuple[str, ...]  # names of the parameters that are not selected

    def run(self, body: Callable[[], T], leaves: Sequence[Tensor] | None = None) -> T:
        """What `body` returns while the model holds its leaves, or these values instead."""
        if not self.copied:
            chosen = dict(zip(self.weights, leaves or self.leaves, strict=True))
            return self.function.within({**self._fixed_as(chosen), **chosen}, body)
        if leaves is not None:
            raise NotImplementedError(self.function.habits.not_functional)
        with self.function.assigned({}):
            return body()

    def at(self, values: Sequence[Tensor], body: Callable[[Sequence[Tensor]], T]) -> T:
        """What `body` returns for other values, given as leaves that the model holds meanwhile."""
        if self.copied:
            with self.function.assigned(dict(zip(self.weights, values, strict=True))) as leaves:
                return body(leaves)
        leaves = [v.detach().requires_grad_() for v in values]
        return self.run(lambda: body(leaves), leaves)

    @contextmanager
    def still(self, restoring: bool) -> Iterator[None]:
        """Hold the model while products are computed; restore what forward passes change."""
        with frozen(self.function.model) if restoring else held(self.function.model):
            yield

    def terms(self, chunk: Examples) -> Terms:
        """The mean loss of some examples and its weight, at what the model holds."""
        return self.loss.terms(self.function.outputs(chunk.inputs), chunk.labels)

    def slopes(self, leaves: Sequence[Tensor], chunk: Examples) -> list[Tensor]:
        """The gradient of the mean loss of some examples, by leaves that the model holds."""
        with torch.enable_grad():
            mean = self.terms(chunk)[0]
            found: Sequence[Tensor | None] = [None] * len(leaves)
            if mean.requires_grad:
                found = torch.autograd.grad(mean, leaves, allow_unused=True)
        return [g.detach() for g in self.filled(self.real(found))]

    def filled(self, parts: Sequence[Tensor | None]) -> list[Tensor]:
        """With zeros for what is None."""
        weights = self.weights.values()
        return [
            torch.zeros_like(w) if p is None else p for p, w in zip(parts, weights, strict=True)
        ]

    def real(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients by the leaves in the form of the weights."""
        if not self.copied:
            return list(gradients)
        named = zip(self.weights, gradients, strict=True)
        return [None if g is None else self.function.real(name, g) for name, g in named]

    def on_device(self, examples: Examples) -> Examples:
        """Copies of uniform examples on the model's device, in its dtype: graphs keep them."""
        moved = examples.to(self.function.device, self.function.dtype)
        copied = partial(torch.clone, memory_format=torch.contiguous_format)
        return Examples(pytree.tree_map(copied, moved.inputs), copied(moved.labels))

    def few(self, k: int) -> Examples:
        """At most k examples of one shape, with labels as different as there are."""
        return self.on_device(max(self.examples.diverse(k).chunks(k), key=len))

    def _fixed_as(self, chosen: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is not selected; in float64, buffers as well, where the chosen weights are."""
        dtype = next(iter(chosen.values())).dtype
        if dtype == self.function.dtype:
            return self.fixed
        return {
            name: _in_precision(tensor, dtype)
            for name, tensor in {**self.fixed, **self.function.buffers()}.items()
        }


def make_problem(
    model: nn.Module,
    data: Data,
    loss: Loss,
    parameters: Parameters,
    n: int | None,
    seed: int | None,
    found: Found,
) -> Problem:
    """Collect and check; the model must be inside `frozen` already, which gave `found`.

    Raises:
        ArgumentError: For an empty selection, parameters in several precisions, a bad n, or
            copies that do not fit the memory.
        DataError: For data that differ between two passes, or labels that do not fit.
        ModelError: For random or batch-dependent outputs, a loss that is no mean, or a model that
            cannot be held at given weights.
    """
    loss_fn = resolve_loss(loss)
    selected = _select(model, parameters)
    _require_copies(model, selected)
    names = list(selected)
    function = FunctionalModel(model, whole=not loss_fn.exact)
    examples = read_share(data, n=n, seed=seed, twice=True).examples
    probe = examine(function, loss_fn, examples, found)
    outside = left_out(model, names)
    if probe.try_swapping():
        function = _copy_of(function, loss_fn, examples, probe)
        own = dict(function.model.named_parameters())
        for name, parameter in own.items():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(name in set(names))
        leaves: list[Tensor] = [own[name] for name in names]
        weights = {name: function.value(name) for name in names}
        return Problem(function, True, weights, leaves, {}, loss_fn, examples, probe, outside)
    weights = {name: function.value(name).clone().requires_grad_() for name in names}
    fixed = {name: function.value(name).clone() for name in function.names if name not in weights}
    leaves = list(weights.values())
    return Problem(function, False, weights, leaves, fixed, loss_fn, examples, probe, outside)


def refuse_training_mode(model: nn.Module) -> None:
    """Raise ModelError if a layer in training mode would make the loss random or batch-dependent.

    Example:
        >>> refuse_training_mode(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
        Traceback (most recent call last):
        ...
        sharpkit.errors.ModelError: '1' (BatchNorm1d) is in training mode, ...: call model.eval()
    """
    for name, module in unwrapped(model).named_modules():
        described = f"{name!r} ({type(module).__name__})"
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if norm and module.training:
            raise ModelError(
                f"{described} is in training mode, where the loss of an example depends on "
                "its batch and has no Hessian of its own: call model.eval()"
            )
        if norm and module.running_mean is None:
            raise ModelError(
                f"{described} keeps no running statistics, so the loss of an example depends "
                "on its batch also in eval mode: use track_running_stats=True"
            )
        dropout = isinstance(module, nn.modules.dropout._DropoutNd)
        rate = getattr(module, "p" if dropout else "dropout", 0.0)
        if module.training and isinstance(rate, float) and rate > 0:
            raise ModelError(
                f"{described} drops units at random in training mode: call model.eval()"
            )


def _in_precision(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _select(model: nn.Module, parameters: Parameters) -> dict[str, Tensor]:
    selected = floating_parameters(model, parameters)
    if not selected:
        raise ArgumentError("no parameter is selected: those asked for are integers")
    kinds = {w.dtype for w in selected.values()}
    if len(kinds) != 1:  # half precision is float32 by now
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


def _require_copies(model: nn.Module, selected: Mapping[str, Tensor]) -> None:
    """Raise ArgumentError unless the memory has room for the operator's weights and vectors."""
    numbers, size = (sum(f(w) for w in selected.values()) for f in (Tensor.numel, _bytes))
    require_memory(
        sum(map(_bytes, unwrapped(model).parameters())) + 2 * size,
        next(iter(selected.values())).device,
        f"an operator of {numbers:,} parameters (a copy of all, a gradient and a product)",
        "select fewer with parameters=",
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _copy_of(
    function: FunctionalModel, loss: MeanLoss, examples: Examples, probe: Probe
) -> FunctionalModel:
    """A copy of a model that cannot be held at given weights; its parameters are its own."""
    why = function.habits.not_functional
    advice = "read weights as attributes of the modules that own them, inside forward"
    try:
        model = copy.deepcopy(function.model)
    except Exception as error:
        raise ModelError(
            f"{why}, so an operator needs a copy of the model, and it cannot be copied "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}): {advice}"
        ) from error
    copied = FunctionalModel(model, whole=function.whole)
    for name, parameter in model.named_parameters():
        parameter.data = copied.native(name, copied.value(name).clone())
    with frozen(model) as found:
        examine(copied, loss, examples, found)
        if not close(_elsewhere(function, loss, probe), _elsewhere(copied, loss, probe)):
            raise ModelError(f"{why}, also in a copy of the model: {advice}")
    return copied


def _elsewhere(function: FunctionalModel, loss: MeanLoss, probe: Probe) -> Any:
    """Outputs and loss of the probe at other weights, which are assigned."""
    moved = {
        name: 1.1 * function.value(name) + 0.01
        for name in function.names
        if function.value(name).is_floating_point()
    }
    few = probe.examples
    with function.evaluating(), function.assigned(moved):
        outputs = function.outputs(few.inputs)
        return outputs, loss(outputs, few.labels)
