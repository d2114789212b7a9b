"""What a model and a loss take from Python, in a form that tells whether it has changed.

Code that was traced has the numbers and switches that modules had then: the slope of an activation,
a weight in the loss. Where they have changed, it is code of something else.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from sharpkit.contract.modules import own_tensors

_OF_TORCH = frozenset(vars(nn.Module())) | {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS: list[dict[int, Any]] = [getattr(torch_module, f"_global{kind}") for kind in _HOOKS]
_DEPTH = 5  # of containers that are looked into
_MOST = 64  # entries of one; longer ones are data


def python_state(model: nn.Module, loss: Any) -> Hashable:
    """Everything but the values of tensors: equal for equal settings.

    Settings are the attributes of modules, and of a loss that is a function the values from around
    it that it names; the parameters and buffers of the model stand by their form. What is global is
    not looked at for modules.

    Example:
        >>> layer = nn.LeakyReLU(0.1)
        >>> before = python_state(layer, "mse")
        >>> layer.negative_slope = 0.2
        >>> python_state(layer, "mse") == before
        False
    """
    states = _States()
    return states.of_modules(model, _form), states.of(loss)


def hooked_modules(model: nn.Module, ours: Iterable[nn.Module] = ()) -> list[str]:
    """The names of modules with hooks; `ours` have one before and one after their forward pass.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> handle = layer.register_forward_hook(print)
        >>> hooked_modules(nn.Sequential(nn.ReLU(), layer))
        ['1']
    """
    own = set(ours)
    found = [
        name
        for name, module in model.named_modules()
        if sum(len(getattr(module, kind)) for kind in _HOOKS) > (2 if module in own else 0)
    ]
    return [*found, *(["every module"] if any(map(len, _GLOBAL_HOOKS)) else [])]


def contents(model: nn.Module) -> dict[tuple[str, str], bytes]:
    """The attributes of modules, as bytes that tell whether what they hold has changed.

    For what objects do to themselves, such as a generator that draws. What has no bytes is left
    out.

    Example:
        >>> import random
        >>> layer = nn.Identity()
        >>> layer.generator = random.Random(0)
        >>> before = contents(layer)
        >>> _ = layer.generator.random()
        >>> [name for name, found in contents(layer).items() if found != before[name]]
        [('', 'generator')]
    """
    found = {}
    for prefix, module in model.named_modules():
        for key, value in _attributes(module):
            if not isinstance(value, nn.Module):
                with suppress(Exception):  # of any kind: it is the object's own code
                    found[prefix, key] = pickle.dumps(value)
    return found


class _States:
    """States of values, in which every module is looked into once."""

    def __init__(self) -> None:
        self._seen: set[nn.Module] = set()

    def of_modules(self, model: nn.Module, of_tensor: Callable[[Tensor], Hashable]) -> Hashable:
        modules = [module for module in model.modules() if module not in self._seen]
        self._seen.update(modules)
        return tuple(
            (
                type(module),
                tuple((key, of_tensor(tensor)) for key, tensor in own_tensors(module)),
                self._named(_attributes(module), _DEPTH),
            )
            for module in modules
        )

    def of(self, value: Any, depth: int = _DEPTH) -> Hashable:
        if value is None or isinstance(value, bool | int | float | complex | str | bytes):
            return type(value), value
        if isinstance(value, Tensor):
            return _one(value)
        if not depth or isinstance(value, type | ModuleType):
            return id(value)
        if isinstance(value, nn.Module):
            return id(value), self.of_modules(value, _one)
        if isinstance(value, tuple | list) and len(value) <= _MOST:
            return type(value), self._named(((None, part) for part in value), depth)
        if isinstance(value, dict) and len(value) <= _MOST:
            return tuple((self.of(k, 1), self.of(v, depth - 1)) for k, v in value.items())
        if isinstance(value, partial):
            parts = (*((None, part) for part in value.args), *value.keywords.items())
            return self.of(value.func, depth), self._named(parts, depth)
        if isinstance(value, MethodType):
            return self.of(value.__func__, depth), self.of(value.__self__, depth)
        if isinstance(value, FunctionType):
            return value.__code__, self._named(_enclosed(value), depth)
        return id(value), self.of(getattr(value, "__dict__", None), depth - 1)

    def _named(self, parts: Iterable[tuple[Any, Any]], depth: int) -> Hashable:
        return tuple((name, self.of(part, depth - 1)) for name, part in parts)


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in module.__dict__.items() if key not in _OF_TORCH)


def _enclosed(function: FunctionType) -> list[tuple[Any, Any]]:
    """What a function takes from around it: defaults, enclosed and global values that it names."""
    defaults: list[tuple[Any, Any]] = [(None, value) for value in function.__defaults__ or ()]
    defaults += (function.__kwdefaults__ or {}).items()
    with suppress(ValueError):  # of a variable that has no value yet
        found = inspect.getclosurevars(function)
        return [*defaults, *found.nonlocals.items(), *found.globals.items()]
    return defaults


def _one(tensor: Tensor) -> Hashable:
    return id(tensor), _form(tensor)


def _form(tensor: Tensor) -> Hashable:
    return tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad
