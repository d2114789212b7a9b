"""The hyperparameter grid of a task: which settings its models have, and which are missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain, islice, product
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = 3  # settings listed in a message
_MAX_LISTED = 100_000  # grids larger than this are counted, not enumerated


def check_grid(model_configs: Mapping[str, Any]) -> list[str]:
    """What is incomplete or doubled in the hyperparameter grid of a task.

    Scores that condition on hyperparameters compare models that differ in few of them; a missing
    or doubled setting silently shifts what is compared; the same number of models for every setting
    does not. Values are compared by `str()`.

    Args:
        model_configs: The parsed model_configs.json: id -> {"hparams": {name: {"possible_values",
            "current_value"}}, ...}. Entries without usable `hparams` are left out here.

    Returns:
        list: One sentence for each finding; empty for a complete grid.

    Example:
        >>> def entry(depth):
        ...     depths = {"possible_values": [1, 2, 3], "current_value": depth}
        ...     return {"hparams": {"depth": depths}}
        >>> check_grid({"0": entry(1), "1": entry(2), "2": entry(2)})
        ['2 models share the setting depth=2: 1, 2', '1 of 3 settings has no model: depth=3']
    """
    grids = {id_: grid for id_, e in model_configs.items() if (grid := _hyperparameters(e))}
    if not grids:
        return []
    names = list(next(iter(grids.values())))
    odd = [id_ for id_, grid in grids.items() if set(grid) != set(names)]
    if odd:
        return [f"models have different hyperparameters; compare {_some(odd)} with {names}"]
    possible = possible_values(model_configs)
    settings = {
        id_: tuple(str(grid[n]["current_value"]) for n in names) for id_, grid in grids.items()
    }
    return [
        *_disagreeing(grids, names),
        *_outside(settings, names, possible),
        *_uneven(settings, names),
        *_missing(settings, names, possible),
    ]


def possible_values(model_configs: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The values that each hyperparameter can take, in the order in which the file lists them.

    Returns:
        dict: Hyperparameter name to its values; the union over models, each value once by `str()`.

    Example:
        >>> possible_values({"0": {"hparams": {"lr": {"possible_values": [0.1, 1.0],
        ...                                           "current_value": 0.1}}}})
        {'lr': [0.1, 1.0]}
    """
    union: dict[str, dict[str, Any]] = {}
    for name, lists in _different_lists(map(_hyperparameters, model_configs.values())).items():
        seen = union.setdefault(name, {})
        for value in chain.from_iterable(lists):
            seen.setdefault(str(value), value)
    return {name: list(values.values()) for name, values in union.items()}


def model_configs(
    hyperparameters: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """What a `Task` of any format has as its `model_configs`, from two plain mappings.

    Args:
        hyperparameters: Model id -> hyperparameter -> value, the same hyperparameters for all.
        metrics: Model id -> train_acc, test_acc, ... -> value.

    Example:
        >>> model_configs({"a": {"lr": 0.1}, "b": {"lr": 1.0}}, {"a": {}, "b": {}})["b"]["hparams"]
        {'lr': {'possible_values': [0.1, 1.0], 'current_value': 1.0}}
    """
    values: dict[str, dict[str, Any]] = {}  # each once by str(), as everywhere in a grid
    for setting in hyperparameters.values():
        for name, value in setting.items():
            values.setdefault(name, {}).setdefault(str(value), value)
    lists = {name: [*found.values()] for name, found in values.items()}  # shared by all models
    return {
        id_: {
            "hparams": {
                name: {"possible_values": lists[name], "current_value": value}
                for name, value in setting.items()
            },
            "metrics": dict(metrics[id_]),
        }
        for id_, setting in hyperparameters.items()
    }


def models_frame(name: str, configs: Mapping[str, Any]) -> pd.DataFrame:
    """The `frame` of a task of any format: task, model, hyperparameters, metrics.

    A hyperparameter and a metric of the same name are two columns.

    Example:
        >>> models_frame("toy", model_configs({"a": {"lr": 0.1}}, {"a": {"test_acc": 0.9}}))
          task model   lr  test_acc
        0  toy     a  0.1       0.9
    """
    import pandas as pd

    ids = [{"task": name, "model": id_} for id_ in configs]
    settings = [
        {name: h["current_value"] for name, h in c["hparams"].items()} for c in configs.values()
    ]
    metrics = [c["metrics"] for c in configs.values()]
    return pd.concat([pd.DataFrame(rows) for rows in (ids, settings, metrics)], axis=1)


def _hyperparameters(entry: Any) -> dict[str, dict[str, Any]]:
    """The usable `hparams` of an entry, else nothing."""
    hparams = entry.get("hparams") if isinstance(entry, Mapping) else None
    if not isinstance(hparams, Mapping):
        return {}
    return {
        str(name): dict(h)
        for name, h in hparams.items()
        if isinstance(h, Mapping)
        and isinstance(h.get("possible_values"), list)
        and "current_value" in h
    }


def _disagreeing(grids: dict[str, dict[str, dict[str, Any]]], names: list[str]) -> list[str]:
    lists = _different_lists(grids.values())
    return [
        f"models list different possible values of {name!r}"
        for name in names
        if len({frozenset(map(str, values)) for values in lists[name]}) > 1
    ]


def _different_lists(grids: Iterable[dict[str, dict[str, Any]]]) -> dict[str, list[list[Any]]]:
    """Hyperparameter -> its lists of possible values; one that models share stands once."""
    lists: dict[str, dict[int, list[Any]]] = {}
    for grid in grids:
        for name, h in grid.items():
            lists.setdefault(name, {})[id(h["possible_values"])] = h["possible_values"]
    return {name: list(found.values()) for name, found in lists.items()}


def _outside(
    settings: dict[str, tuple[str, ...]], names: list[str], possible: dict[str, list[Any]]
) -> list[str]:
    messages = []
    for i, name in enumerate(names):
        allowed = set(map(str, possible[name]))
        odd = [id_ for id_, setting in settings.items() if setting[i] not in allowed]
        if odd:
            value = settings[odd[0]][i]
            messages.append(
                f"{name}={value} of model {odd[0]} is not among the possible values "
                f"{possible[name]} ({len(odd)} such models)"
            )
    return messages


def _uneven(settings: dict[str, tuple[str, ...]], names: list[str]) -> list[str]:
    """Settings with more models than most have, or with fewer: replicates of all are no fault."""
    counts = Counter(settings.values())
    often = Counter(counts.values())
    usual = min(often, key=lambda count: (-often[count], count))
    doubled = [s for s, count in counts.items() if count > usual]
    messages = []
    for setting in doubled[:_SHOWN]:
        ids = [id_ for id_, s in settings.items() if s == setting]
        messages.append(
            f"{len(ids)} models share the setting {_text(names, setting)}: {_some(ids)}"
        )
    if len(doubled) > _SHOWN:
        messages.append(f"{len(doubled) - _SHOWN} further settings are shared by several models")
    if fewer := [s for s, count in counts.items() if count < usual]:
        verb = "has" if len(fewer) == 1 else "have"
        message = f"{len(fewer)} of {len(counts)} settings {verb} fewer than {usual} models"
        messages.append(f"{message}: {_first(names, fewer)}")
    return messages


def _missing(
    settings: dict[str, tuple[str, ...]], names: list[str], possible: dict[str, list[Any]]
) -> list[str]:
    axes = [dict.fromkeys(map(str, possible[name])) for name in names]
    total, present = prod(map(len, axes)), set(settings.values())
    inside = sum(all(v in axis for v, axis in zip(s, axes, strict=True)) for s in present)
    if inside >= total:
        return []
    missing = total - inside
    verb = "has" if missing == 1 else "have"
    message = f"{missing} of {total} settings {verb} no model"
    if total > _MAX_LISTED:
        return [message]
    return [f"{message}: {_first(names, (s for s in product(*axes) if s not in present))}"]


def _first(names: list[str], settings: Iterable[tuple[str, ...]]) -> str:
    some = list(islice(settings, _SHOWN + 1))
    text = "; ".join(_text(names, s) for s in some[:_SHOWN])
    return text + ", ..." if len(some) > _SHOWN else text


def _text(names: list[str], setting: tuple[str, ...]) -> str:
    return " ".join(f"{n}={v}" for n, v in zip(names, setting, strict=True))


def _some(ids: list[str]) -> str:
    return ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
