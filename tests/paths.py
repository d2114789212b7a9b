"""Where real data lie: the small part that is in the project, and the whole beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

RECORDED = Path(__file__).with_name("recorded")  # its README tells what is in it
SHARED = Path(__file__).parents[2] / "shared" / "data"

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the shared data (../shared/data) are not on this machine"
)

# The zoo that TensorFlow wrote: two models of it are in the project, all eight beside it.
FIXTURE_ZOOS = [
    pytest.param(RECORDED / "pgdl_fixture", id="recorded"),
    pytest.param(SHARED / "pgdl_fixture", id="shared", marks=needs_shared),
]
FIXTURE_REFERENCE = "expected/task1_v4_reference.npz"
