"""Rules for every test: a limit of processor time, and which skips a run allows.

SHARPKIT_MAY_SKIP is a regular expression of reasons: where it is set, as in .ci/run, a test that is
skipped for another reason fails.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Generator, Iterator
from types import FrameType
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings

LIMIT = 120  # seconds of this process's processors, however busy the machine is
MAY_SKIP = os.environ.get("SHARPKIT_MAY_SKIP")
Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

# Ray gives its workers the lowest rank of all processes: on a busy machine they would not move
os.environ.setdefault("RAY_worker_niceness", "0")
# what these two find depends on what else the machine does
settings.register_profile("any pace", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any pace")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums, and so the last bits, depend on the number of threads, also in another process."""
    from sharpkit.workers.threads import limited_threads

    with limited_threads(1):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest first, or the other processes wait for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_kills.py")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End a test that computes for too long; one that waits for ever, pytest-timeout ends."""

    def stop(signum: int, frame: FrameType | None) -> None:
        pytest.fail(f"{item.nodeid} has computed for {LIMIT} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skip that the run does not allow is a failure."""
    return _without_other_skips((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """So is one of a whole file."""
    return _without_other_skips((yield))


def _without_other_skips(report: Report) -> Report:
    if MAY_SKIP is not None and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not re.search(MAY_SKIP, reason):
            report.outcome = "failed"
            report.longrepr = f"skipped, which SHARPKIT_MAY_SKIP does not allow: {reason}"
    return report
