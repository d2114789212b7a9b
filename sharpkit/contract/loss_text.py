"""Losses and other arguments as text, so that a run can tell whether they are still the same."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sharpkit.contract.examples import add_to_digest
from sharpkit.contract.losses import MeanLoss


def loss_name(loss: Any) -> str:
    """A short name of a loss: as it was given, or that of its class or function.

    Example:
        >>> from torch import nn
        >>> loss_name("mse"), loss_name(nn.HuberLoss(delta=2.0)), loss_name(lambda f, y: f.mean())
        ('mse', 'HuberLoss', 'loss')
    """
    if isinstance(loss, MeanLoss):
        return loss_name(loss.given)
    if isinstance(loss, str):
        return loss
    if isinstance(loss, functools.partial):
        return loss_name(loss.func)
    loss = getattr(loss, "_orig_mod", loss)  # of torch.compile
    name = getattr(loss, "__name__", type(loss).__name__)
    return "loss" if name == "<lambda>" else str(name)


def loss_text(loss: Any) -> str:
    """A loss, or another argument, as text for the configuration of a run.

    That is its name, with a digest if it is a callable.

    The digest is of a module's attributes and tensors, and of a function's code, defaults and the
    variables that it closes over. What the code itself calls is not looked into.

    Example:
        >>> from torch import nn
        >>> loss_text("mse")
        'mse'
        >>> texts = [loss_text(nn.CrossEntropyLoss(label_smoothing=s)) for s in (0.0, 0.1, 0.1)]
        >>> texts[0] == texts[1], texts[1] == texts[2]
        (False, True)
    """
    if isinstance(loss, MeanLoss):
        return loss_text(loss.given)
    if isinstance(loss, str):
        return loss
    whole = hashlib.sha256()
    _feed(whole, loss, set())
    return f"{loss_name(loss)} {whole.hexdigest()[:16]}"


def _feed(digest: hashlib._Hash, value: Any, seen: set[int]) -> None:
    """Feed a hash with all that a value consists of; `seen` stops at what refers to itself."""
    digest.update(f"<{type(value).__module__}.{type(value).__qualname__}>".encode())
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        digest.update(repr(value).encode())
        return
    if isinstance(value, Tensor):
        add_to_digest(digest, value)
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    for part in _parts(value):
        _feed(digest, part, seen)
    digest.update(b"</>")


def _parts(value: Any) -> list[Any]:
    if isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
        return [getattr(value, "__module__", None), getattr(value, "__qualname__", str(value))]
    if isinstance(value, types.FunctionType):
        cells = [_content(cell) for cell in value.__closure__ or ()]
        return [value.__code__, value.__defaults__, value.__kwdefaults__, cells]
    if isinstance(value, types.CodeType):
        return [value.co_code, list(value.co_consts), list(value.co_names)]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, Mapping):
        return [part for item in value.items() for part in item]
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if hasattr(value, "tolist"):  # numpy's
        return [value.tolist()]
    return [dict(getattr(value, "__dict__", {}))]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of a variable that has no value yet
        return None
