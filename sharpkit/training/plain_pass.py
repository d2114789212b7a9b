"""The gradient of a batch in one ordinary pass: the steps of SAM that are not perturbed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharpkit.contract.examples import Inputs
from sharpkit.contract.half_precision import refuse_half
from sharpkit.contract.losses import Loss, MeanLoss, resolve_loss
from sharpkit.contract.modules import call_module, read_outputs
from sharpkit.errors import DivergedError
from sharpkit.training.m_sam import batch_of
from sharpkit.training.parallel import on_any_rank


def accumulate_plain(
    model: nn.Module,
    inputs: Inputs,
    labels: Tensor,
    parameters: Iterable[Tensor],
    *,
    loss: Loss,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Add the gradient of a batch's mean loss to `.grad` of parameters, by one pass.

    Arguments, errors and what is returned are as of `m_sam_gradient`; the batch is not split, and
    modules in training mode move their buffers as ever.
    """
    own = list(parameters)
    refuse_half(own, "SAM")
    loss_fn = resolve_loss(loss)
    kind = next(p for p in own if p.is_floating_point() or p.is_complex())
    examples = batch_of(inputs, labels).to(kind.device, kind.dtype.to_real())
    outputs = outputs_of(model, examples.inputs, loss_fn)
    loss_fn.check(outputs, examples.labels)
    value = loss_fn(outputs, examples.labels)
    found = value.detach()
    diverged = scaler is None and not bool(torch.isfinite(found))
    if isinstance(model, DistributedDataParallel):
        diverged = on_any_rank(model, [diverged])[0]  # or the others would wait for this one
    if diverged:
        raise DivergedError(f"the loss is not finite (here: {float(found)}): training has diverged")
    scaled = value if scaler is None else scaler.scale(value)
    # processes wait for each other's gradients of all parameters
    several = isinstance(model, DistributedDataParallel)
    torch.autograd.backward(scaled, inputs=None if several else own)
    return found


def outputs_of(model: nn.Module, inputs: Any, loss: MeanLoss) -> Any:
    """The outputs, whose every part that could be trained goes into the loss.

    Raises:
        ModelError: If the model returns more than logits, such as auxiliary outputs, and the loss
            is no callable that gets all of it.
    """
    return read_outputs(model, call_module(model, inputs), whole=not loss.exact)
