"""Commands whose processes are killed or stopped at random moments; more in benchmarks/kills.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pace import start_seconds

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from kills import campaign, table

pytestmark = pytest.mark.slow


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which processes are stopped")
def test_no_kill_or_stop_costs_a_result_or_leaves_a_process(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'sharpkit[ray]'")
    outcomes = campaign(12, tmp_path, seed=1, limit=120 + 60 * start_seconds())
    assert not [outcome for outcome in outcomes if outcome.problem], table(outcomes)
    assert sum(outcome.hit for outcome in outcomes) >= 6
    assert len({outcome.case.command for outcome in outcomes}) == 6
