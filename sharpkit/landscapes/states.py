"""The weights of other models, or of checkpoints, by the names of a model's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from sharpkit.contract.embeddings import renormalised
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.modules import unwrapped
from sharpkit.contract.state import parts_of
from sharpkit.errors import ArgumentError, ModelError

Tensors: TypeAlias = dict[str, Tensor]
State: TypeAlias = "nn.Module | Mapping[str, Tensor]"


def as_states(given: object, what: str) -> list[State]:
    """One model or state dict, or several, as a list; ArgumentError for anything else."""
    items = [given] if isinstance(given, nn.Module | Mapping) else given
    if not isinstance(items, Iterable):
        raise ArgumentError(f"{what}: found {type(given).__name__}, expected models or state dicts")
    found = list(items)
    if not found:
        raise ArgumentError(f"{what} is empty: expected one model or state dict, or more")
    for item in found:
        if not isinstance(item, nn.Module | Mapping):
            raise ArgumentError(
                f"{what}: found {type(item).__name__}, expected models or state dicts of tensors"
            )
    return found


def read_weights(
    state: State, function: FunctionalModel, names: Iterable[str], what: str
) -> Tensors:
    """The values of some parameters in another model, in the form in which they are measured.

    Raises:
        ModelError: If one is missing, of another shape, NaN or infinite.
    """
    own: dict[str, Tensor] = {}
    if isinstance(state, nn.Module):
        other = FunctionalModel(state)  # which knows scaled embeddings
        own |= dict(other.model.named_parameters(remove_duplicate=False))
        own |= {name: other.native(name, other.value(name)) for name in other.names}
    else:
        if renormalised(function.model):
            raise ModelError(
                f"{what} is a state dict, but the model scales an embedding (max_norm) when it is "
                "called: load it into a model, and give that"
            )
        own = _without_prefix(state, function.model)
    like = dict(function.model.named_parameters())
    return {name: function.real(name, _fitting(own, name, like[name], what)) for name in names}


def read_buffers(state: State, function: FunctionalModel, what: str) -> Tensors:
    """The buffers of real numbers of another model, such as running statistics."""
    own: Mapping[str, Tensor]
    if isinstance(state, nn.Module):
        own = dict(unwrapped(state).named_buffers())
    else:
        own = _without_prefix(state, function.model)
    kept = set(function.model.state_dict())
    return {
        name: _fitting(own, name, buffer, what)
        for name, buffer in function.model.named_buffers()
        # what is not in state dicts is the same in all models
        if buffer.is_floating_point() and (name in own or name in kept)
    }


def require_same_integers(state: State, function: FunctionalModel, what: str) -> None:
    """Raise ModelError if parameters that are no real numbers differ: nothing is between them."""
    other = state.state_dict() if isinstance(state, nn.Module) else state
    own = _without_prefix(other, function.model)
    for name, parameter in function.model.named_parameters():
        real = parameter.is_floating_point() or parameter.is_complex()
        if not real and not parameter.equal(_fitting(own, name, parameter, what)):
            raise ModelError(
                f"{what}: {name!r} is {parameter.dtype} and differs from the model's: there is no "
                "line between integers; compare the models before they are quantised"
            )


def _without_prefix(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Names as the model has them, without what wrappers have put before them."""
    known = dict(model.named_parameters())
    names = list(state)
    for prefix in ("module.", "_orig_mod."):
        if known.keys().isdisjoint(names):
            names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, state.values(), strict=True))


def _fitting(own: Mapping[str, Tensor], name: str, like: Tensor, what: str) -> Tensor:
    found = own.get(name)
    if not isinstance(found, Tensor):
        raise ModelError(f"{what} has no {name!r}, which the model has: expected the same layers")
    if found.shape != like.shape:
        raise ModelError(
            f"{what}: {name!r} has shape {tuple(found.shape)}, in the model {tuple(like.shape)}: "
            "expected the same layers"
        )
    value = found.detach().to(like.device, like.dtype)
    if not bool(torch.isfinite(parts_of(value)[-1]).all()):
        raise ModelError(f"{what}: {name!r} has NaN or infinite entries")
    return value
