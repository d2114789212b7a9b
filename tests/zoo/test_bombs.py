"""A small file that would take gigabytes or hours is refused while that is cheap."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("how much memory a process took is measured as on Linux", allow_module_level=True)

import bombs

pytestmark = pytest.mark.slow

# Of one processor (less than 2 s on an idle machine) and beyond what the imports take.
SECONDS, MEBIBYTES = 6, 256
NAMES = [(kind, name) for kind, (makers, _) in bombs.KINDS.items() for name in makers]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Kind and name of each bomb -> what came of reading it, all in processes of their own."""
    command = [sys.executable, str(Path(bombs.__file__)), str(tmp_path_factory.mktemp("bombs"))]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    results = {}
    for line in done.stdout.splitlines():
        head, result, status = line.split("\t")
        kind, name, made = json.loads(head)
        assert made == 0, f"{kind} {name} could not be made: {done.stderr}"
        results[kind, name] = json.loads(result or "{}") | {"status": int(status)}
    return results


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_a_bomb_is_refused_within_time_and_memory(outcomes, kind, name):
    outcome = outcomes[kind, name]
    assert outcome["status"] == 0, outcome
    assert outcome["outcome"].startswith("refused: "), outcome
    assert outcome["seconds"] <= SECONDS, outcome
    assert outcome["memory"] <= MEBIBYTES, outcome
