"""Work items in worker processes: the same results, and nothing that an item does spreads."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pace import start_seconds

import sharpkit as sk
from sharpkit.curvature.memory import default_budget
from sharpkit.errors import ArgumentError, RunError
from sharpkit.groupwise.memory import default_memory_budget
from sharpkit.memory import available_memory
from sharpkit.workers import Failure, Workers, on_one_thread, run_items


def time_limit():
    """Seconds that a first item, which also imports, needs on this machine, and some more."""
    return round(3 + 2 * start_seconds())


def work(item, device):
    """Does what the item says."""
    kind, *arguments = item
    if kind == "sum":
        generator = torch.Generator().manual_seed(arguments[0])
        x = torch.randn(300, 300, generator=generator)
        return device, torch.get_num_threads(), float((x @ x).sum())
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "die once":
        marker = Path(arguments[0])
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGSEGV)
        return "alive"
    if kind == "hang":
        ctypes.PyDLL(None).sleep(100_000)  # native code that never lets go of the interpreter
    if kind == "raise":
        raise ValueError("two\nlines")
    if kind == "allocate":
        return len(torch.ones(arguments[0]))
    if kind == "meet":
        folder, name, number = arguments
        Path(folder, name).touch()
        deadline = time.monotonic() + 100
        while len(list(Path(folder).iterdir())) < number and time.monotonic() < deadline:
            time.sleep(0.05)
        return os.getpid() if time.monotonic() < deadline else "alone"
    if kind == "unsendable":
        return (k for k in range(3))
    return os.getpid()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One run with two workers and all that can go wrong."""
    marker = tmp_path_factory.mktemp("marker") / "died"
    items = [("sum", 0), ("die",), ("hang",), ("die once", str(marker)), ("raise",)]
    items += [("unsendable",), ("allocate", 2**28), ("allocate", 2**10)]
    items += [("sum", k) for k in range(1, 20)]
    limits = Workers(2, timeout=time_limit(), memory=2**29)
    results = list(run_items(work, items, limits))
    assert len(results) == len(items)  # none is lost, none is doubled
    return dict(results)


def test_results_are_those_of_this_process_bit_for_bit(results):
    sums = [("sum", k) for k in range(20)]
    expected = dict(run_items(work, sums, Workers(threads=1)))
    assert {item: results[item] for item in sums} == expected
    assert all(result[:2] == ("cpu", 1) for result in expected.values())


def test_a_crash_is_tried_once_more_and_then_told(results):
    assert next(r for item, r in results.items() if item[0] == "die once") == "alive"
    message = results["die",].message
    assert "died twice (signal SIGKILL" in message


def test_a_hanging_native_call_is_ended_in_time(results):
    assert results["hang",] == Failure(f"stopped after {time_limit():g} s")


def test_errors_are_told_in_one_line(results):
    assert results["raise",] == Failure("ValueError: two lines")
    assert "cannot be sent" in results["unsendable",].message


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can limit the memory")
def test_too_much_memory_is_refused_with_the_number(results):
    assert str(4 * 2**28) in results["allocate", 2**28].message
    assert results["allocate", 2**10] == 2**10


def wide_convolution():
    """2.4 MB of weights and little else: at m = 1, many groups are worth one chunk."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(256, 256, 3, padding=1)
    return torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Flatten())


def sharpness(memory_budget, device):
    model = wide_convolution()  # seeds what follows
    data = torch.utils.data.TensorDataset(torch.randn(256, 256, 1, 1), torch.arange(256))
    return sk.m_sharpness(model, data, m=1, rho=0.1, memory_budget=memory_budget).value


def budgets(item, device):
    cpu = torch.device(device)
    torch.ones(2**25)  # memory that is free again does not count
    return default_memory_budget(cpu), default_budget(cpu), available_memory(cpu)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can limit the memory")
def test_measures_cut_their_data_to_the_memory_of_the_worker():
    limit = 2**30
    with_limit = Workers(1, "processes", memory=limit)
    ((_, (chunk, kept, free)),) = run_items(budgets, [0], with_limit)
    assert chunk == limit // 2  # what m-sharpness lays its chunks out for
    assert kept <= limit // 2  # the graphs that curvature keeps
    assert limit - 2**27 < free <= limit
    results = dict(run_items(sharpness, [None, 4 * 2**30], with_limit))
    expected = sharpness(2**28, "cpu")
    assert results[None] == pytest.approx(expected, rel=1e-4)  # chunks change the rounding only
    # the whole machine's budget is too much: chunks are halved until they fit
    assert results[4 * 2**30] == pytest.approx(expected, rel=1e-4)


def test_threads_are_as_they_were_before():
    before = torch.get_num_threads()
    assert next(run_items(work, [("sum", 0)], Workers(threads=before + 1)))[1][1] == before + 1
    assert torch.get_num_threads() == before


def test_workers_end_when_the_results_are_not_wanted_any_more():
    results = run_items(work, [("pid",), ("hang",)], Workers(1, "processes"))
    _, pid = next(results)
    results.close()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_driver(tmp_path, sent):
    script = tmp_path / "driver.py"
    script.write_text(
        "import os, time\n"
        "from sharpkit.workers import Workers, run_items\n\n"
        "def work(item, device):\n"
        "    return os.getpid() if item == 0 else time.sleep(100)\n\n"
        'if __name__ == "__main__":\n'
        '    for _, pid in run_items(work, [0, 1], Workers(1, "processes")):\n'
        "        print(pid, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
        # a shell's background jobs, such as this test may be, inherit that Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as driver:
        pid = int(driver.stdout.readline())
        if sent == signal.SIGINT:
            os.killpg(driver.pid, sent)  # as a terminal does: to every process
        else:
            driver.send_signal(sent)
        driver.wait(timeout=20)
        deadline = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path(f"/proc/{pid}").exists()


def test_workers_that_cannot_start_are_an_error_and_no_endless_loop(tmp_path):
    class Unloadable:
        def __reduce__(self):
            return (os._exit, (3,))

        def __call__(self, item, device):
            raise AssertionError

    with pytest.raises(RunError, match=r"do not start \(exit code 3\)"):
        next(run_items(Unloadable(), [1, 2], Workers(1, "processes")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "workers must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"memory": 0, "backend": "processes"}, "memory must be at least 1"),
        ({"timeout": 0.0, "backend": "processes"}, "timeout must be a positive"),
        ({"timeout": float("nan"), "backend": "processes"}, "timeout must be a positive"),
        ({"timeout": 1.0}, 'nothing can end an item of backend "inline"'),
        ({"backend": "threads"}, "backend must be"),
        ({"count": 4, "backend": "inline"}, 'workers = 4, but backend "inline" has only this'),
        ({"count": 4, "address": "auto"}, 'of a Ray cluster, but the backend is "processes"'),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        Workers(**arguments)


@pytest.mark.parametrize("workers", ["4", None, 4.0, {"count": 4}])
def test_workers_are_a_number_or_a_value_of_their_own(workers):
    with pytest.raises(ArgumentError, match=r"expected a number or sharpkit.Workers"):
        run_items(work, [], workers)


def test_a_number_of_workers_is_so_many_processes_at_a_time(tmp_path):
    ((_, pid),) = run_items(work, [("pid",)], 1)
    assert pid == os.getpid()
    found = {
        pid for _, pid in run_items(work, [("meet", tmp_path, str(k), 3) for k in range(3)], 3)
    }
    assert len(found) == 3 and not found & {os.getpid(), "alone"}


def test_trainings_do_not_take_more_threads():
    assert on_one_thread(3) == Workers(3, threads=1)
    with pytest.raises(ArgumentError, match="threads = 2, but a training uses one"):
        on_one_thread(Workers(3, threads=2))
