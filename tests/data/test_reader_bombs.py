"""Files that ask for far more than they are long are refused in little time and memory.

Both are of the process that reads, in processor time: less than 2 s on an idle machine. Where cores
and caches are shared the same work took half as much again, so the limit is well above.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from reader_bombs import BOMBS

SECONDS, MEMORY = 6.0, 256 * 2**20
HERE = Path(__file__).parent
PATHS = os.pathsep.join(
    map(str, [HERE, HERE.parent, *filter(None, [os.environ.get("PYTHONPATH")])])
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only"),
    pytest.mark.timeout(1800),  # 25 s of processor time, however long they take
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Name to what reading the file took, of a process of its own that reads them all."""
    done = subprocess.run(
        [sys.executable, HERE / "reader_bombs.py", tmp_path_factory.mktemp("bombs")],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": PATHS},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    return {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(measured, name):
    found = measured[name]
    assert "Error: " in found["found"]
    assert found["seconds"] < SECONDS, found
    assert found["bytes"] < MEMORY, found


def test_memory_that_a_reader_takes_is_seen(tmp_path):
    """Else the limit above would mean nothing."""
    code = (
        "from reader_bombs import measured\n"
        "taken = measured(lambda: len(bytearray(300 * 2**20)))\n"
        "assert taken['bytes'] > 290 * 2**20, taken"
    )
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": PATHS}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
