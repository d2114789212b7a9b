"""Entries of model_configs as JSON in which a list of possible values stands once, not per model.

In a zoo of n models with a continuous hyperparameter there are up to n lists of n values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sharpkit.zoo.files import json_text

_AT = "possible_values_at"


def pack(entries: Iterable[Any]) -> tuple[list[Any], list[list[Any]]]:
    """Entries in which the possible values of a hyperparameter are a place, and the lists there.

    Example:
        >>> entry = {"hparams": {"lr": {"possible_values": [0.1, 1.0], "current_value": 1.0}}}
        >>> pack([entry])
        ([{'hparams': {'lr': {'possible_values_at': 0, 'current_value': 1.0}}}], [[0.1, 1.0]])
    """
    lists: list[list[Any]] = []
    by_text: dict[str, int] = {}
    by_identity: dict[int, int] = {}  # a long list that all entries share is written once

    def place(values: list[Any]) -> int:
        if id(values) not in by_identity:
            at = by_text.setdefault(json_text(values), len(lists))
            if at == len(lists):
                lists.append(values)
            by_identity[id(values)] = at
        return by_identity[id(values)]

    def packed(h: Any) -> Any:
        if not isinstance(h, Mapping) or not isinstance(h.get("possible_values"), list):
            return h  # nothing that the zoo's readers take
        rest = {key: value for key, value in h.items() if key != "possible_values"}
        return {_AT: place(h["possible_values"]), **rest}

    kept = list(entries)  # so that no identity is used again
    return [_with_hparams(entry, packed) for entry in kept], lists


def unpack(entry: Any, lists: Sequence[Any]) -> Any:
    """The entry as it was; entries share the lists.

    Example:
        >>> unpack({"hparams": {"lr": {"possible_values_at": 0, "current_value": 1}}}, [[0, 1]])
        {'hparams': {'lr': {'possible_values': [0, 1], 'current_value': 1}}}
    """

    def unpacked(h: Any) -> Any:
        if not isinstance(h, Mapping) or _AT not in h:
            return h
        rest = {key: value for key, value in h.items() if key != _AT}
        return {"possible_values": lists[h[_AT]], **rest}

    return _with_hparams(entry, unpacked)


def _with_hparams(entry: Any, change: Callable[[Any], Any]) -> Any:
    hparams = entry.get("hparams") if isinstance(entry, Mapping) else None
    if not isinstance(hparams, Mapping):
        return entry  # as damaged as it came
    return {**entry, "hparams": {name: change(h) for name, h in hparams.items()}}
