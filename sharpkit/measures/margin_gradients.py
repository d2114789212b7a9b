"""Margins of examples, and how fast they change with the representation at one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit.contract.losses import check_class_labels
from sharpkit.contract.parameters import floating_parameters
from sharpkit.errors import DataError, ModelError
from sharpkit.measures.margins import margins
from sharpkit.measures.passes import Setup


@dataclass(frozen=True)
class LayerMargins:
    """What `layer_margins` gives, one row an example, float64 on the CPU."""

    margins: Tensor  # γ = z_y − max_{j≠y} z_j, shape (n,)
    slopes: Tensor  # ‖∂γ / ∂h‖₂, shape (n,)
    rows: Tensor  # h, the representation, shape (n, d)


def layer_margins(
    run: Setup, model: nn.Module, module: nn.Module, *, output: bool = False
) -> LayerMargins:
    """Margins, their slopes and the representations h at the input or output of a module.

    Of a module that is called several times the first call counts. Cost: one gradient pass.

    Raises:
        DataError: For labels that do not fit the outputs, or a single output.
        ModelError: If the module is not called, or examples have no row each.
    """
    leaves = {k: p.detach().requires_grad_() for k, p in floating_parameters(model).items()}
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with _held(module, output) as take:
        for batch in run.batches():
            with torch.enable_grad():
                inputs = batch.inputs
                if isinstance(inputs, Tensor) and inputs.is_floating_point():
                    inputs = inputs.detach().requires_grad_()
                logits = run.function(leaves, inputs)
                check_class_labels(batch.labels, logits)
                gamma = checked_margins(logits, batch.labels)
                h = take(len(batch))
                (slope,) = torch.autograd.grad(gamma.sum(), h, materialize_grads=True)
            found.append(
                (
                    gamma.detach().double().cpu(),
                    slope.flatten(1).double().norm(dim=1).cpu(),
                    h.detach().flatten(1).double().cpu(),
                )
            )
    return LayerMargins(*(torch.cat(part) for part in zip(*found, strict=True)))


def checked_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The margins, differentiable.

    Raises:
        DataError: For a single output.
        ModelError: For NaN or infinite outputs.
    """
    if logits.shape[1] < 2:
        raise DataError("a margin needs at least two outputs, got 1")
    if not bool(torch.isfinite(logits).all()):
        raise ModelError("the model has NaN or infinite outputs")
    return margins(logits, labels)


@contextmanager
def _held(module: nn.Module, output: bool) -> Iterator[Callable[[int], Tensor]]:
    """Inside, a call after each forward pass gives what a module first received or returned."""
    kept: list[Any] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...], *result: Any) -> None:
        kept.append(result[0] if output else inputs[0])

    def take(count: int) -> Tensor:
        first = kept[0] if kept else None
        kept.clear()
        if not isinstance(first, Tensor) or len(first) != count or not first.requires_grad:
            raise ModelError(
                f"{type(module).__name__}: expected a representation with one row for each of "
                f"{count} examples, on which the output depends"
            )
        return first

    register = module.register_forward_hook if output else module.register_forward_pre_hook
    handle = register(keep)
    try:
        yield take
    finally:
        handle.remove()
