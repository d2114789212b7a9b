"""Which parameters of a model are measured."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sharpkit.contract.modules import unwrapped, wrapper_prefix
from sharpkit.contract.normalisation import norm_parameters
from sharpkit.contract.state import parts_of
from sharpkit.errors import ArgumentError, ModelError

NORM = "norm"  # stands for the parameters of normalisation layers
Parameters: TypeAlias = "str | Iterable[str] | nn.Module | Iterable[nn.Module] | None"


def select_parameters(model: nn.Module, parameters: Parameters = None) -> dict[str, Tensor]:
    """The parameters of a model that are measured, by name, detached; shared ones once.

    Args:
        model: Any module.
        parameters: None for those with requires_grad=True, or all if none has; a name, a glob
            pattern ("*.weight"; "*" for all) or several; "norm" for those of normalisation layers;
            a module of the model or several.

    Returns:
        dict: Name to tensor, in the model's order, without gradient history.

    Raises:
        ArgumentError: If a name, pattern or module matches nothing.
        ModelError: If a weight or buffer of the model is NaN or infinite.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> list(select_parameters(model, "*.bias"))
        ['0.bias', '2.bias']
        >>> list(select_parameters(model, model[2]))
        ['2.weight', '2.bias']
        >>> _ = model[0].requires_grad_(False)
        >>> list(select_parameters(model))
        ['2.weight', '2.bias']
    """
    prefix, model = wrapper_prefix(model), unwrapped(model)
    check_finite_weights(model)
    everything = dict(model.named_parameters())
    if not everything:
        raise ModelError(f"{type(model).__name__} has no parameters")
    if parameters is None:
        trained = {name: p.detach() for name, p in everything.items() if p.requires_grad}
        return trained or {name: p.detach() for name, p in everything.items()}
    chosen: set[int] = set()
    # a shared parameter answers to each of its names
    all_names = list(model.named_parameters(remove_duplicate=False))
    wanted: list[Any] = [parameters]
    if isinstance(parameters, Iterable) and not isinstance(parameters, str | nn.Module | Tensor):
        wanted = list(parameters)
    for item in wanted:
        if isinstance(item, nn.Module):
            hits = [id(p) for p in item.parameters()]
            if not set(hits) & {id(p) for p in everything.values()}:
                raise ArgumentError(f"module {type(item).__name__} has no parameter of the model")
        elif isinstance(item, str):
            hits = [
                id(p)
                for name, p in all_names
                if fnmatch.fnmatchcase(name, item) or fnmatch.fnmatchcase(prefix + name, item)
            ]
            if item == NORM and not hits:  # a parameter may have this very name
                hits = [id(p) for p in norm_parameters(model)]
            if not hits:
                what = "is of a normalisation layer" if item == NORM else f"matches {item!r}"
                raise ArgumentError(f"no parameter {what}; the model has {some(everything)}")
        else:
            raise ArgumentError(f"expected names, patterns or modules, got {type(item).__name__}")
        chosen.update(hits)
    selected = {name: p.detach() for name, p in everything.items() if id(p) in chosen}
    if not selected:
        raise ArgumentError("no parameter is selected: the selection is empty")
    return selected


def floating_parameters(model: nn.Module, parameters: Parameters = None) -> dict[str, Tensor]:
    """Those of `select_parameters` that have gradients: integers, as of quantised layers, do not.

    Complex ones are pairs of reals, of shape (..., 2).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> list(floating_parameters(nn.Linear(3, 4)))
        ['weight', 'bias']
        >>> floating_parameters(nn.Linear(3, 4, dtype=torch.cfloat))["bias"].shape
        torch.Size([4, 2])
    """
    chosen = select_parameters(model, parameters)
    return {
        name: torch.view_as_real(p.resolve_conj()) if p.is_complex() else p
        for name, p in chosen.items()
        if p.is_floating_point() or p.is_complex()
    }


def left_out(model: nn.Module, measured: Iterable[str]) -> tuple[str, ...]:
    """The names of the parameters that are not among those measured.

    Example:
        >>> from torch import nn
        >>> left_out(nn.Linear(3, 4), ["weight"])
        ('bias',)
    """
    names = set(measured)
    return tuple(name for name, _ in unwrapped(model).named_parameters() if name not in names)


def some(names: Iterable[str]) -> str:
    """The first names of a list, and how many more there are.

    Example:
        >>> some(["a", "b", "c", "d", "e", "f", "g"])
        'a, b, c, d, e and 2 more'
    """
    names = list(names)
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def check_finite_weights(model: nn.Module) -> None:
    """Raise ModelError that names the first parameter or buffer with NaN or infinite entries."""
    tensors: list[tuple[str, str, Tensor]] = []
    tensors += (("parameter", name, p) for name, p in model.named_parameters())
    tensors += (("buffer", name, b) for name, b in model.named_buffers())
    real = [t for t in tensors if t[2].is_floating_point() or t[2].is_complex()]
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for _, _, tensor in real:
        values = parts_of(tensor)[-1].detach()
        if values.numel():
            alike.setdefault((tensor.device, tensor.dtype), []).append(values)
    sums = [torch.stack(torch._foreach_norm(some, 1)) for some in alike.values()]
    if all(bool(torch.isfinite(total).all()) for total in sums):  # a wait for each device
        return  # else an entry is not finite, or a sum only
    for kind, name, tensor in real:
        bad = int((~torch.isfinite(parts_of(tensor)[-1])).sum())
        if bad:
            raise ModelError(
                f"{kind} {name!r} has {bad} NaN or infinite entries of {tensor.numel()}"
            )
