"""Which parameters of a model are measured."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sharpkit.errors import ArgumentError, ModelError

Parameters: TypeAlias = "str | Iterable[str] | nn.Module | Iterable[nn.Module] | None"


def select_parameters(model: nn.Module, parameters: Parameters = None) -> dict[str, Tensor]:
    """The parameters of a model that are measured, by name, detached; shared ones once.

    Args:
        model: Any module.
        parameters: None for all; a name, a glob pattern ("*.weight") or several; a module of the
            model or several.

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
    """
    check_finite_weights(model)
    everything = dict(model.named_parameters())
    if not everything:
        raise ModelError(f"{type(model).__name__} has no parameters")
    if parameters is None:
        return {name: p.detach() for name, p in everything.items()}
    chosen: set[int] = set()
    # a shared parameter answers to each of its names
    all_names = list(model.named_parameters(remove_duplicate=False))
    wanted: list[Any] = (
        [parameters] if isinstance(parameters, str | nn.Module) else list(parameters)
    )
    for item in wanted:
        if isinstance(item, nn.Module):
            hits = [id(p) for p in item.parameters()]
            if not set(hits) & {id(p) for p in everything.values()}:
                raise ArgumentError(f"module {type(item).__name__} has no parameter of the model")
        elif isinstance(item, str):
            hits = [id(p) for name, p in all_names if fnmatch.fnmatchcase(name, item)]
            if not hits:
                raise ArgumentError(
                    f"no parameter matches {item!r}; the model has {', '.join(everything)}"
                )
        else:
            raise ArgumentError(f"expected names, patterns or modules, got {type(item).__name__}")
        chosen.update(hits)
    selected = {name: p.detach() for name, p in everything.items() if id(p) in chosen}
    if not selected:
        raise ArgumentError("no parameter is selected")
    return selected


def floating_parameters(model: nn.Module, parameters: Parameters = None) -> dict[str, Tensor]:
    """Those of `select_parameters` that have gradients: integers, as of quantised layers, do not.

    Example:
        >>> from torch import nn
        >>> list(floating_parameters(nn.Linear(3, 4)))
        ['weight', 'bias']
    """
    chosen = select_parameters(model, parameters)
    return {name: p for name, p in chosen.items() if p.is_floating_point()}


def check_finite_weights(model: nn.Module) -> None:
    """Raise ModelError that names the first parameter or buffer with NaN or infinite entries."""
    for kind, tensors in (
        ("parameter", model.named_parameters()),
        ("buffer", model.named_buffers()),
    ):
        for name, tensor in tensors:
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise ModelError(
                    f"{kind} {name!r} has {bad} NaN or infinite entries of {tensor.numel()}"
                )
