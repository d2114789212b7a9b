"""The model_configs of tasks with many models, whose hyperparameters may be continuous."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sharpkit.zoo.grid import model_configs


def varying_configs(
    settings: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """As `grid.model_configs`, without what does not vary."""
    names = {name for setting in settings.values() for name in setting}
    found = {n: {str(s[n]) for s in settings.values() if n in s} for n in names}
    varying = {name for name, values in found.items() if len(values) > 1}
    if len(found.get("seed", ())) == len(settings):
        varying.discard("seed")  # one each: it names the network, and conditions on everything
    return model_configs(
        {
            id_: {name: value for name, value in setting.items() if name in varying}
            for id_, setting in settings.items()
        },
        metrics,
    )
