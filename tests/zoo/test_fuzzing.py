"""Damaged files load or are refused; benchmarks/fuzz.py does the same for 20,000 and more."""

from __future__ import annotations

from collections import Counter
from functools import partial

from fuzzing import KINDS, try_case, write_seeds

from sharpkit.workers import Failure, run_items


def case(folder, item, device):
    return try_case(folder, *item)


def test_damaged_files_load_or_are_refused_within_time_and_memory(tmp_path):
    write_seeds(tmp_path)
    items = [(kind, seed) for kind in KINDS for seed in range(100)]
    outcomes = Counter()
    for item, outcome in run_items(
        partial(case, tmp_path),
        items,
        backend="processes",
        workers=1,
        timeout=10,
        memory=2**30,
    ):
        assert not isinstance(outcome, Failure), (item, outcome)
        assert not outcome.startswith("ESCAPED"), outcome
        outcomes[item[0], outcome == "loaded"] += 1
    for kind in KINDS:  # else the damage is too small or too large to find anything
        assert outcomes[kind, False] >= 20, kind
    assert sum(count for (_, loaded), count in outcomes.items() if loaded) >= 20
