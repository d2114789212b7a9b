"""The model_configs of tasks with many models, whose hyperparameters may be continuous."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LISTED = 64  # values of a hyperparameter that are listed with every model


def varying_configs(
    settings: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """As `grid.model_configs`, without what does not vary, and without long lists of values."""
    values: dict[str, dict[str, Any]] = {}
    for setting in settings.values():
        for name, value in setting.items():
            values.setdefault(name, {}).setdefault(str(value), value)
    lists = {name: [*found.values()] for name, found in values.items() if len(found) > 1}
    if len(lists.get("seed", ())) == len(settings):
        lists.pop("seed", None)  # one each: it names the network, and conditions on everything
    return {
        id_: {
            "hparams": {
                name: {
                    "possible_values": lists[name] if len(lists[name]) <= _LISTED else [value],
                    "current_value": value,
                }
                for name, value in setting.items()
                if name in lists
            },
            "metrics": dict(metrics[id_]),
        }
        for id_, setting in settings.items()
    }
