"""Workers that die or stop at any moment: the driver notices, tries again once, and then tells."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from cores import slow_beyond

from sharpkit.errors import RunError
from sharpkit.workers import Failure, Workers, run_items, worker

ONE_PROCESS = Workers(1, "processes")

pytestmark = pytest.mark.skipif(not hasattr(os, "waitid"), reason="the system does not tell")


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch):
    """A worker that has been seen stopped three times is given up."""
    monkeypatch.setattr(worker, "MOST_STOPPED", 3)


def in_half_a_message(do):
    """From now on, this process does something in the middle of what it sends."""

    def send(self, content):
        os.write(self.fileno(), len(content).to_bytes(4, "big") + content[: len(content) // 2])
        do()

    Connection._send_bytes = send


def work(item, device):
    """End or stop this process at the moment that the item names, the first time it is tried."""
    moment, sent, marker = item[:3]
    if moment == "quick":
        return "done"
    if moment == "native":
        time.sleep(1000)
    tried = Path(marker).exists()
    Path(marker).touch()
    if tried:
        return "done"

    def do():
        os.kill(os.getpid(), sent)

    if moment == "computing":
        do()
    if moment == "sending":
        in_half_a_message(do)
        return bytes(2**20)
    if moment == "receiving":  # the next item, which is too large for any buffer
        receive = Connection.recv_bytes
        Connection.recv_bytes = lambda self: (do(), receive(self))[1]
    if moment == "with a child":  # which holds the connection
        if os.fork() == 0:
            time.sleep(100)
            os._exit(0)
        do()
    return "done"


class AtLoading:
    """A function that ends or stops the process which loads it, the first time."""

    def __init__(self, sent, marker):
        self.arguments = sent, str(marker)

    def __reduce__(self):
        return _load, self.arguments


def _load(sent, marker):
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), sent)
    return work


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize(
    "moment", slow_beyond(2, ["computing", "receiving", "sending", "with a child"])
)
def test_an_item_whose_worker_is_lost_is_done_by_another(tmp_path, moment, sent):
    large = ("quick", 0, "", bytes(2**23))
    items = [(moment, sent, str(tmp_path / "tried")), large, ("quick", 1, "")]
    results = list(run_items(work, items, ONE_PROCESS))
    assert {result for _, result in results} == {"done"}
    assert len(results) == len(items)  # none is lost, none is doubled


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_lost_while_it_starts_is_replaced(tmp_path, sent):
    function = AtLoading(sent, tmp_path / "tried")
    items = [("quick", k, "") for k in range(3)]
    results = list(run_items(function, items, ONE_PROCESS))
    assert [result for _, result in results] == ["done"] * 3


def test_a_worker_that_never_gets_ready_is_no_endless_wait(monkeypatch):
    from sharpkit.workers import processes

    monkeypatch.setattr(processes, "_LEAST_START", 0.2)
    monkeypatch.setattr(processes, "_MOST_FAILED_STARTS", 1)
    with pytest.raises(RunError, match=r"do not start \(not ready after 0.2 s\)"):
        list(run_items(work, [("quick", 0, "")], Workers(1, "processes", timeout=0.1)))


def test_many_quick_items_do_not_hide_one_that_hangs():
    items = itertools.chain([("native", 0, "")], (("quick", k, "") for k in itertools.count()))
    results = run_items(work, items, Workers(2, timeout=1.0))
    assert next(r for item, r in results if item[0] == "native") == Failure("stopped after 1 s")
    results.close()


def test_what_cannot_be_pickled_is_told_for_its_item_alone():
    class Unreadable:
        def __reduce__(self):
            return int, ("many",)

    items = [("quick", 0, "", (k for k in ())), ("quick", 1, "", Unreadable()), ("quick", 2, "")]
    results = [r for _, r in run_items(work, items, ONE_PROCESS)]
    assert "cannot be sent to a worker" in results[0].message
    assert "its worker cannot read it: ValueError" in results[1].message
    assert results[2] == "done"


def test_a_function_that_workers_cannot_load_is_told_with_the_reason():
    class Unloadable:
        def __reduce__(self):
            return int, ("many",)

        def __call__(self, item, device):
            raise AssertionError

    with pytest.raises(RunError, match=r"cannot load what they shall do.*invalid literal"):
        list(run_items(Unloadable(), [0], ONE_PROCESS))


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from sharpkit.workers import Workers, run_items\n\n"
        "large = bytes(2**20)  # more than a pipe takes at once\n"
        "list(run_items(lambda item, device: large[item], [0, 1], Workers(backend='processes')))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'needs `if __name__ == "__main__":`' in done.stderr
