"""A zoo scored by worker processes or Ray: the table of this process, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from clusters import local_ray
from cores import slow_beyond
from pace import start_seconds
from zoos import finished_models, write_image_zoo, write_small_zoo

import sharpkit as sk
from sharpkit.runs.shared_data import share, shared

MEASURES = [sk.MSharpness(m=[1, 4], rho=0.1), sk.measures.make_measure("distance_from_initial")]


@dataclass(frozen=True)
class Deadly:
    """Kills its process on the first model, once; hangs on the second; measures the others."""

    marker: str
    name: str = "deadly"

    def __call__(self, model, data, *, seed):
        first = float(next(model.parameters()).detach()[0, 0])
        marker = Path(self.marker)
        is_first = first == torch.load(self.marker + ".first", weights_only=True)
        if is_first and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if first == torch.load(self.marker + ".second", weights_only=True):
            time.sleep(100_000)
        return first


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return sk.load_zoo(write_small_zoo(tmp_path_factory.mktemp("zoo"), tasks=("a", "b")))


@pytest.fixture(scope="module")
def table(zoo):
    return sk.score_zoo(zoo, MEASURES, n=20, workers=sk.Workers(threads=1), progress=False).frame()


def assert_same_bits(scores, table):
    pd.testing.assert_frame_equal(scores.frame(), table, check_exact=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_give_the_same_bits_and_leave_no_data_behind(
    zoo, table, tmp_path, workers
):
    out = tmp_path / "run"
    scores = sk.score_zoo(
        zoo, MEASURES, out=out, n=20, workers=sk.Workers(workers, "processes"), progress=False
    )
    assert_same_bits(scores, table)
    assert scores.config["threads"] == 1
    assert (scores.provenance()["peak_memory"] > 2**20).all()
    names = {path.name for path in out.iterdir()}
    store = {"results.sqlite", "results.sqlite-wal", "results.sqlite-shm", ".lock"}
    assert names - store == {"scores.csv", "scores_columns.csv"}


@pytest.fixture(scope="module", params=slow_beyond(1, [3, 1]), ids=["colour", "grey"])
def images(request, tmp_path_factory):
    """A zoo of images, and what this process makes of every standard measure."""
    path = tmp_path_factory.mktemp("images") / "zoo"
    zoo = sk.load_zoo(write_image_zoo(path, channels=request.param))
    return zoo, every_measure(zoo, sk.Workers(threads=1))


def every_measure(zoo, workers):
    measures = [m for m in sk.measures.standard_measures() if m.name != "m_sharpness"]
    measures.append(sk.MSharpness(m=[1, 4, 24], rho=0.1))
    scores = sk.score_zoo(zoo, measures, workers=workers, progress=False)
    assert scores.failures.empty
    return scores.frame()


def test_every_measure_has_the_same_bits_in_a_worker(images):
    zoo, expected = images
    found = every_measure(zoo, sk.Workers(1, "processes"))
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_another_backend_goes_on_with_the_same_run(zoo, table, tmp_path):
    out = tmp_path / "run"
    arguments = {"out": out, "n": 20, "progress": False}
    sk.score_zoo(zoo, MEASURES, limit=3, workers=sk.Workers(threads=1), **arguments).close()
    scores = sk.score_zoo(zoo, MEASURES, workers=sk.Workers(1, "processes"), **arguments)
    assert_same_bits(scores, table)
    scores.close()
    finished = sk.score_zoo(zoo, MEASURES, **arguments)  # with the threads of the run
    assert_same_bits(finished, table)


def test_a_model_that_kills_or_hangs_its_worker_costs_nothing_else(zoo, tmp_path):
    marker = str(tmp_path / "marker")
    timeout = round(2 + start_seconds())  # enough for what a first item imports
    for id_, name in (("3", "first"), ("5", "second")):
        weight = next(zoo["a"][id_].load().parameters())
        torch.save(float(weight.detach()[0, 0]), f"{marker}.{name}")
    scores = sk.score_zoo(
        zoo["a"],
        Deadly(marker),
        workers=sk.Workers(2, timeout=timeout),
        progress=False,
    )
    assert scores.failures["model"].tolist() == ["5"]
    assert scores.failures["error"].tolist() == [f"stopped after {timeout} s"]
    assert len(scores.frame()) == 7


def test_workers_see_one_copy_of_the_data(tmp_path):
    data = torch.utils.data.TensorDataset(torch.randn(100, 3), torch.arange(100))
    handle = share(data, "processes", tmp_path / "folder")
    first, again = shared(handle), shared(handle)
    assert first is again
    assert all(torch.equal(a, b) for a, b in zip(first.tensors, data.tensors, strict=True))
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert "folder/inputs.npy" in maps.read_text()  # mapped, not read
    own = shared(share(data, "inline", tmp_path / "unused"))
    assert own.tensors[0].data_ptr() == data.tensors[0].data_ptr()


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_is_finished(tmp_path):
    zoo_path = write_small_zoo(tmp_path / "zoo", tasks=("a", "b", "c"), examples=400)
    command = [sys.executable, "-m", "sharpkit", "score", str(zoo_path)]
    command += ["--out", str(tmp_path / "run"), "--m", "1,2", "--rho", "0.05,0.1", "--workers", "2"]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
        # a shell's background jobs, such as this test may be, inherit that Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as driver:
        while finished_models(tmp_path / "run") < 3 and driver.poll() is None:
            time.sleep(0.02)
        os.killpg(driver.pid, signal.SIGINT)  # as Ctrl-C in a terminal: to workers as well
        message = driver.communicate()[1]
    assert driver.returncode == 130
    assert "the same command goes on" in message
    assert "Traceback" not in message
    assert 3 <= finished_models(tmp_path / "run") < 24


@pytest.fixture(scope="module")
def ray():
    with local_ray(num_cpus=2) as ray:
        yield ray


def test_ray_gives_the_same_bits(ray, zoo, table):
    scores = sk.score_zoo(zoo, MEASURES, n=20, workers=sk.Workers(2, "ray"), progress=False)
    assert_same_bits(scores, table)


@pytest.mark.slow
def test_every_measure_has_the_same_bits_on_ray(ray, images):
    zoo, expected = images
    pd.testing.assert_frame_equal(
        every_measure(zoo, sk.Workers(backend="ray")), expected, check_exact=True
    )


@pytest.mark.slow
def test_ray_survives_a_model_that_kills_or_hangs_its_worker(ray, zoo, tmp_path):
    marker = str(tmp_path / "marker")
    for id_, name in (("3", "first"), ("5", "second")):
        weight = next(zoo["a"][id_].load().parameters())
        torch.save(float(weight.detach()[0, 0]), f"{marker}.{name}")
    timeout = round(5 + 4 * start_seconds())  # an item's time counts from before its process starts
    workers = sk.Workers(backend="ray", timeout=timeout)
    scores = sk.score_zoo(zoo["a"], Deadly(marker), workers=workers, progress=False)
    assert scores.failures["model"].tolist() == ["5"]
    assert scores.failures["error"].tolist() == [f"stopped after {timeout} s"]
    assert len(scores.frame()) == 7
