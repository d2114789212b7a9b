"""Losses and other arguments as text, so that a run can tell whether they are still the same."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from sharpkit.contract.losses import MeanLoss
from sharpkit.digests import described, digest


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
    return f"{loss_name(loss)} {digest(_walk(loss, set()))[:16]}"


def _walk(value: Any, seen: set[int]) -> Iterator[str | Tensor]:
    """All that a value consists of, for `digest`; `seen` stops at what refers to itself."""
    yield f"<{type(value).__module__}.{type(value).__qualname__}>"
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        yield repr(value)
    elif isinstance(value, Tensor):
        yield from described([value])
    elif id(value) not in seen:
        seen.add(id(value))
        for part in _parts(value):
            yield from _walk(part, seen)
        yield "</>"


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
