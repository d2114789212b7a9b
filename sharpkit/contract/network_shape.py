"""What networks of one shape have in common, so that one module runs with the tensors of each."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit.contract.modules import full_name, own_tensors, unwrapped

_OF_TORCH = frozenset(vars(nn.Module()))
_PLAIN = str | bytes | int | float | complex | torch.dtype | torch.device | None
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_DEEP = 6  # containers within containers


def network_shape(model: nn.Module) -> Hashable:
    """The same for modules that differ in the values of their parameters and buffers alone.

    Classes, printed settings and plain attributes of all modules, but for rates of dropout, which
    mean nothing in eval mode; names, shapes, dtypes, devices of all tensors, which of them are
    shared and which require gradients. Of functions and other objects among the attributes only
    the kind is looked at. A tensor among them, which is neither parameter nor buffer, is like no
    other module's. A module that has a text `eval_settings` says itself what it computes, beside
    its tensors and modules.

    Example:
        >>> a, b, c = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 2)
        >>> network_shape(a) == network_shape(b), network_shape(a) == network_shape(c)
        (True, False)
    """
    model = unwrapped(model)
    names: dict[int, str] = {}
    tensors: list[Hashable] = []
    for prefix, module in model.named_modules():
        for key, tensor in own_tensors(module):
            first = names.setdefault(id(tensor), full_name(prefix, key))
            kind = type(tensor), tuple(tensor.shape), tensor.dtype, tensor.device, tensor.layout
            tensors.append((full_name(prefix, key), first, *kind, tensor.requires_grad))
    modules: list[Hashable] = []
    for prefix, module in model.named_modules():
        settings: Hashable = getattr(module, "eval_settings", None)
        if settings is None and type(module) not in _DROPOUT:
            attributes = {k: v for k, v in vars(module).items() if k not in _OF_TORCH}
            settings = module.extra_repr(), _form(attributes, names, _DEEP)
        modules.append((prefix, type(module), module.training, settings))
    return tuple(modules), tuple(tensors)


def _form(value: Any, names: Mapping[int, str], depth: int) -> Hashable:
    """An attribute as something that can be compared; of a tensor of the module's own, its name."""
    if isinstance(value, _PLAIN):
        return type(value), repr(value)
    if isinstance(value, Tensor) or not depth:
        return type(value), names.get(id(value), id(value))
    if isinstance(value, Mapping):
        items = value.items()
        return type(value), tuple((repr(k), _form(v, names, depth - 1)) for k, v in items)
    if isinstance(value, list | tuple):
        return type(value), tuple(_form(v, names, depth - 1) for v in value)
    if isinstance(value, set | frozenset):
        return type(value), frozenset(_form(v, names, depth - 1) for v in value)
    return type(value), getattr(value, "__qualname__", "")
