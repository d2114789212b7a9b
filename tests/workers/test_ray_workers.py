"""Items on Ray whose processes die or stop: tried once more, then told."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from clusters import local_ray

from sharpkit.errors import RunError
from sharpkit.workers import Workers, cluster, run_items

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray():
    with local_ray(num_cpus=1) as ray:
        yield ray


def work(item, device):
    kind, *arguments = item
    if kind == "signal once":
        sent, marker = arguments
        if not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), sent)
    if kind == "signal":
        os.kill(os.getpid(), arguments[0])
    if kind == "unsendable":
        return (k for k in ())
    return "done"


def test_what_happens_to_one_item_is_told_of_it_alone(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "MOST_STOPPED", 3)
    items = [
        ("signal once", signal.SIGKILL, tmp_path / "killed"),
        ("signal once", signal.SIGSTOP, tmp_path / "stopped"),
        ("signal", signal.SIGKILL),
        ("unsendable",),
        ("generator", (k for k in ())),
        *(("plain", k) for k in range(3)),
    ]
    results = {item[0]: result for item, result in run_items(work, items, Workers(backend="ray"))}
    if sys.platform == "linux":
        assert results["signal once"] == "done"
    assert results["plain"] == "done"
    assert "lost twice" in results["signal"].message
    assert "result cannot be sent" in results["unsendable"].message
    assert results["generator"].message.startswith("it cannot be sent to a worker")
    assert len(results["generator"].message) < 300


def test_a_cluster_that_is_not_there_is_told(ray, monkeypatch):
    def refuse(**options):
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(RunError, match=r"no Ray cluster at '192.0.2.1:1': .*nobody answers"):
        list(run_items(work, [("plain", 0)], Workers(backend="ray", address="192.0.2.1:1")))
