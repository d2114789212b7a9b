"""Modules as users hand them over: wrappers taken off, inputs passed in, outputs read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from sharpkit.contract.examples import Inputs
from sharpkit.errors import ModelError

# fields of an output beside its logits that no loss is meant to train
_BESIDE_LOGITS = (
    "hidden_state", "attentions", "past_key_values", "mems", "rope_deltas", "image_embeds",
    "text_embeds", "cache_params", "states",
)  # fmt: skip


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside wrappers that compile or distribute it; its parameters are the same.

    Raises:
        ModelError: If a parameter has no values yet (a lazy module before its first call).

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> unwrapped(DataParallel(linear)) is linear
        True
    """
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            break
    for prefix, module in model.named_modules():
        for key, tensor in own_tensors(module):
            if is_lazy(tensor):
                raise ModelError(
                    f"{full_name(prefix, key)!r} has no values yet: call the model once on a "
                    "batch, so that its lazy modules take their shapes"
                )
    return model


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Inside, hooks that have been registered are in place; then they are removed."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters and buffers of a module itself; torch's iterators take ten times as long."""
    items = (*module._parameters.items(), *module._buffers.items())
    return [(key, tensor) for key, tensor in items if tensor is not None]


def full_name(prefix: str, key: str) -> str:
    """The name that a module's tensor has in the whole model."""
    return f"{prefix}.{key}" if prefix else key


def wrapper_prefix(model: nn.Module) -> str:
    """What the names of a wrapped model's parameters begin with, such as "module."."""
    inner = unwrapped(model)
    names = {id(p): name for name, p in model.named_parameters()}
    for name, parameter in inner.named_parameters():
        return names[id(parameter)].removesuffix(name)
    return ""


def call_module(model: nn.Module, inputs: Inputs) -> Any:
    """The model's own output: a dict of inputs gives keywords, a tuple or list positions."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def read_outputs(model: nn.Module, output: Any, *, whole: bool) -> Any:
    """What a loss gets: the tensor of outputs, the logits of an output that holds them, or all.

    Args:
        model: For messages.
        output: What the model returned.
        whole: Whether the loss takes outputs of any structure (a user's callable does).

    Returns:
        A tensor; or, if `whole` allows it, the structure that the model returned, where it has
        more than logits (auxiliary outputs in training mode) or none.

    Raises:
        ModelError: If a part of the output would be left out in silence.

    Example:
        >>> import torch
        >>> read_outputs(nn.Identity(), (torch.zeros(2), torch.zeros(2)), whole=False)
        Traceback (most recent call last):
        ...
        sharpkit.errors.ModelError: Identity returned a tuple, ...
    """
    if isinstance(output, Tensor):
        return output
    logits, others = getattr(output, "logits", None), _auxiliary(output)
    if isinstance(logits, Tensor) and not others:
        return logits
    if whole and any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(output)):
        return output
    name = type(model).__name__
    if isinstance(logits, Tensor):
        raise ModelError(
            f"{name} returned {', '.join(others)} beside its logits: give a loss callable, which "
            "gets the whole output, or switch the auxiliary outputs off"
        )
    raise ModelError(
        f"{name} returned a {type(output).__name__}, but this loss takes a tensor of outputs, or "
        "an object with `logits`: give a loss callable, which gets the whole output"
    )


def _auxiliary(output: Any) -> list[str]:
    """The names of tensors beside the logits that a loss may be meant to train."""
    if isinstance(output, Mapping):
        items = dict(output)
    elif hasattr(output, "_asdict"):
        items = output._asdict()
    elif is_dataclass(output):
        items = {f.name: getattr(output, f.name) for f in fields(output)}
    else:
        items = vars(output) if hasattr(output, "__dict__") else {}
    return [
        name
        for name, value in items.items()
        if name not in ("logits", "loss")
        and not any(known in name for known in _BESIDE_LOGITS)
        and any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
    ]
