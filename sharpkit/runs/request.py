"""What a run is asked to compute: checked, and as its store keeps it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from sharpkit.contract.measuring_rules import measuring_rules
from sharpkit.digests import digest_of_settings
from sharpkit.errors import ArgumentError
from sharpkit.measures.measure import Measure, describe
from sharpkit.runs.scores import STORE_NAME, Scores
from sharpkit.runs.store import TEST_METRICS

# settings that determine the values of every measure
_COMMON = ("n", "seed", "device", "threads", "rules", "precision")
_LATER = ("stack",)  # the same, which not every run has


def run_config(
    measures: Mapping[str, Measure],
    n: int | None,
    seed: int,
    device: str | torch.device,
    threads: int,
    tasks: Mapping[str, str | None],
) -> dict[str, Any]:
    """What a run computes, as the store keeps it; a task that is in no file has no place."""
    return {
        "measures": {name: describe(measure)[1] for name, measure in measures.items()},
        "n": n,
        "seed": seed,
        "device": torch.device(device).type,
        "threads": threads,
        **measuring_rules(),
        "tasks": dict(tasks),
    }


def settings_hashes(config: Mapping[str, Any]) -> dict[str, str]:
    """Measure -> SHA-256 of all settings that determine its values."""
    common = {key: config[key] for key in _COMMON} | {k: config[k] for k in _LATER if k in config}
    return {
        name: digest_of_settings({"name": name, "measure": measure} | common)
        for name, measure in config["measures"].items()
    }


def named_measures(measures: Measure | Sequence[Measure]) -> dict[str, Measure]:
    """The measures by name; ArgumentError if there is none, or two have the same name."""
    listed = isinstance(measures, Sequence) and not isinstance(measures, str)
    several = cast("Sequence[Measure]", measures if listed else [measures])
    names = [describe(measure)[0] for measure in several]
    if not names:
        raise ArgumentError("no measure is given")
    if TEST_METRICS in names:
        raise ArgumentError(f"{TEST_METRICS!r} is no name for a measure: runs use it themselves")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ArgumentError(
            f"two measures have the same name, {twice[0]!r}: give one of them another `name`, such "
            f"as MSharpness(..., name={twice[0] + '_2'!r}) or make_measure(..., name=...)"
        )
    return dict(zip(names, several, strict=True))


def check_request(measures: Mapping[str, Measure], n: int | None, limit: int | None = None) -> None:
    """ArgumentError if a number is below 1 or a measure has groups of more than n examples."""
    for label, number in (("n", n), ("limit", limit)):
        if number is not None and number < 1:
            raise ArgumentError(f"{label} must be at least 1, got {number}")
    for name, measure in measures.items():
        m = getattr(measure, "m", 1)
        largest = max(m) if isinstance(m, Sequence) else m
        if n is not None and largest > n:
            raise ArgumentError(f"{name}: m = {largest} is larger than n = {n} examples")


def recorded(run: Path | None) -> dict[str, Any]:
    """The configuration that a run was started with; empty if there is none."""
    if run is None or not (run / STORE_NAME).is_file():
        return {}
    scores = Scores.open(run)
    config = dict(scores.config)
    scores.close()
    return config
