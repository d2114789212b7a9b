"""How busy the machine is: a unit for the time limits that tests must give."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import cache


@cache
def start_seconds() -> float:
    """Seconds that a new process now takes to import the package: 3 on an idle machine."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import sharpkit.runs.score, torch.nn"], check=True)
    return time.monotonic() - began
