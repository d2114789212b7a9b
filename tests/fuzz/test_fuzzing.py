"""Damaged files load or are refused; benchmarks/fuzz.py does the same for 20,000 and more."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
from fuzzing import KINDS, try_case, write_seeds
from pace import start_seconds

from sharpkit.workers import Failure, Workers, run_items

CASES = 20  # of each kind


def case(folder, item, device):
    return try_case(folder, *item)


@pytest.mark.slow
def test_damaged_files_load_or_are_refused_within_time_and_memory(tmp_path):
    write_seeds(tmp_path)
    items = [(kind, seed) for kind in KINDS for seed in range(CASES)]
    outcomes = Counter()
    for item, outcome in run_items(
        partial(case, tmp_path),
        items,
        # a case takes 10 ms, the first also imports
        Workers(1, "processes", timeout=5 + 2 * start_seconds(), memory=2**30),
    ):
        assert not isinstance(outcome, Failure), (item, outcome)
        assert not outcome.startswith("ESCAPED"), outcome
        outcomes[item[0], outcome == "loaded"] += 1
    assert sum(outcomes.values()) == CASES * len(KINDS) >= 400
    # else the damage is too small or too large to find anything
    refused = sum(count for (_, loaded), count in outcomes.items() if not loaded)
    assert 0.2 < refused / len(items) < 0.9
    recomputed = {"spectrum"}  # what is damaged is computed again
    assert all(outcomes[kind, False] >= 3 for kind in KINDS if kind not in recomputed), outcomes
