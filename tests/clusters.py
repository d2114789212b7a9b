"""A Ray cluster of this machine, for the tests that need one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def local_ray(num_cpus: int) -> Iterator[Any]:
    """Ray, started, whose workers import the tests' own modules; a skip where it is missing."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'sharpkit[ray]'")
    ray.init(
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
    )
    try:
        yield ray
    finally:
        ray.shutdown()
