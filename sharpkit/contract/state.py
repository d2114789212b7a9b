"""What a module consists of besides its code, remembered and put back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_OF_TORCH = frozenset(vars(nn.Module())) | {"training"}


class Attributes:
    """The plain attributes of every module of a model: no parameters, buffers or submodules.

    A forward pass may write some: caches, counters, weights computed by a hook. Containers are
    remembered with their contents, tensors with their values.

    Example:
        >>> layer = nn.Identity()
        >>> layer.cache = {}
        >>> before = Attributes(layer)
        >>> layer.cache["mask"] = 1
        >>> [name for _, name in before.changed()]
        ['cache']
        >>> before.restore()
        >>> layer.cache
        {}
    """

    def __init__(self, model: nn.Module) -> None:
        self._before = {
            module: {name: _Memory(value) for name, value in _plain(module)}
            for module in model.modules()
        }

    def changed(self) -> list[tuple[nn.Module, str]]:
        """The attributes that differ from what they were, also those that came or went."""
        return [
            (module, name)
            for module, before in self._before.items()
            for name in {**before, **dict(_plain(module))}
            if name not in before or not before[name].holds(module.__dict__.get(name, _GONE))
        ]

    def restore(self, attributes: list[tuple[nn.Module, str]] | None = None) -> None:
        """Put these attributes back; None for all that have changed."""
        for module, name in self.changed() if attributes is None else attributes:
            before = self._before[module]
            if name in before:
                module.__dict__[name] = before[name].restored()
            else:
                module.__dict__.pop(name, None)


_GONE = object()
_MOST_REMEMBERED = 4096  # longer containers are data, not state


def _plain(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((k, v) for k, v in module.__dict__.items() if k not in _OF_TORCH)


class _Memory:
    """A value and, for containers and tensors, what is in it."""

    def __init__(self, value: Any, depth: int = 3) -> None:
        self.value = value
        self.parts: Any = None
        if isinstance(value, dict | list | set | deque) and len(value) > _MOST_REMEMBERED:
            return
        if isinstance(value, dict):
            self.parts = {k: _Memory(v, depth - 1) for k, v in value.items()} if depth else None
        elif isinstance(value, list | deque):
            self.parts = [_Memory(v, depth - 1) for v in value] if depth else None
        elif isinstance(value, set):
            self.parts = set(value)
        elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.parts = value.detach().clone()

    def holds(self, value: Any) -> bool:
        if value is not self.value:
            return False
        if self.parts is None:
            return True
        if isinstance(value, Tensor):
            return same_values(value.detach(), self.parts)
        if isinstance(value, set):
            return bool(value == self.parts)
        if len(value) != len(self.parts):
            return False
        if isinstance(value, dict):
            return all(k in self.parts and self.parts[k].holds(v) for k, v in value.items())
        return all(part.holds(v) for part, v in zip(self.parts, value, strict=True))

    def restored(self) -> Any:
        value, parts = self.value, self.parts
        if parts is None:
            return value
        if isinstance(value, Tensor):
            value.detach().copy_(parts)
            return value
        value.clear()
        if isinstance(value, dict):
            value.update({k: part.restored() for k, part in parts.items()})
        elif isinstance(value, set):
            value.update(parts)
        else:
            value.extend(part.restored() for part in parts)
        return value


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values, NaN being the same as NaN."""
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    if a.layout != torch.strided:
        return all(map(same_values, parts_of(a), parts_of(b)))
    if torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    return bool(torch.all((a == b) | (torch.isnan(a) & torch.isnan(b))))


def parts_of(tensor: Tensor) -> list[Tensor]:
    """A tensor as ordinary ones: itself, or the indices and, last, the values of a sparse one.

    Example:
        >>> [part.tolist() for part in parts_of(torch.eye(2).to_sparse())]
        [[[0, 1], [0, 1]], [1.0, 1.0]]
    """
    if tensor.layout == torch.strided:
        return [tensor]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]


_SMALL = 2**20  # entries up to which tensors are compared side by side in one copy


def differing(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[int]:
    """Indices of the pairs of tensors that hold other values, by one look at each device.

    Example:
        >>> differing([(torch.zeros(2), torch.zeros(2)), (torch.zeros(1), torch.ones(1))])
        [1]
    """
    found: list[int] = []
    together: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    large: list[list[int]] = []
    for i, (a, b) in enumerate(pairs):
        alike = (a.shape, a.dtype, a.device, a.layout) == (b.shape, b.dtype, b.device, b.layout)
        if not alike or a.layout != torch.strided:
            found += [] if alike and same_values(a.detach(), b.detach()) else [i]
        elif a.numel() > _SMALL:
            large.append([i])
        else:
            together.setdefault((a.dtype, a.device), []).append(i)
    flags: dict[torch.device, list[tuple[list[int], Tensor]]] = {}
    for some in [*together.values(), *large]:
        a, b = (_beside([pairs[i][k].detach() for i in some]) for k in (0, 1))
        other = (a != b) & ((a == a) | (b == b))  # NaN is the same as NaN
        flags.setdefault(a.device, []).append((some, other.any()))
    for of_device in flags.values():
        raised = torch.stack([flag for _, flag in of_device]).tolist()
        for (some, _), differs in zip(of_device, raised, strict=True):
            if differs:
                found += [i for i in some if not same_values(*(t.detach() for t in pairs[i]))]
    return sorted(found)


def _beside(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])


class Found:
    """A model as it was found, to be compared with and put back.

    It takes memory for one copy of the parameters and buffers: an in-place write through `.data`
    leaves no other trace.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modes = [(module, module.training) for module in model.modules()]
        self._parameters = [
            (name, p, p.detach().clone(), p.requires_grad, p.grad)
            for name, p in model.named_parameters()
        ]
        self._buffers = [
            (name, b, b.detach().clone()) for name, b in model.named_buffers(remove_duplicate=False)
        ]
        self.attributes = Attributes(model)
        self.entered_eval = False  # whether `eval()` was called, and not only the flags set

    @property
    def was_training(self) -> bool:
        """Whether any module was in training mode."""
        return any(mode for _, mode in self._modes)

    def changed_parameters(self) -> list[str]:
        """The names of parameters that hold other values now."""
        changed = differing([(p, copy) for _, p, copy, *_ in self._parameters])
        return [self._parameters[i][0] for i in changed]

    @torch.no_grad()
    def restore(self) -> None:
        """Values, flags, gradients, buffers and attributes as they were."""
        if self.entered_eval:  # an overridden `train` may keep state elsewhere
            self._model.train(self._modes[0][1])
        for module, mode in self._modes:
            module.training = mode
        for i in differing([(p, copy) for _, p, copy, *_ in self._parameters]):
            self._parameters[i][1].data.copy_(self._parameters[i][2])
        for _, parameter, _, flag, gradient in self._parameters:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
            parameter.grad = gradient
        for name, buffer, _ in self._buffers:
            path, _, key = name.rpartition(".")
            owner = self._model.get_submodule(path)
            if owner._buffers.get(key) is not buffer:
                owner._buffers[key] = buffer
        for i in differing([(buffer, copy) for _, buffer, copy in self._buffers]):
            self._buffers[i][1].copy_(self._buffers[i][2])
        self.attributes.restore()
