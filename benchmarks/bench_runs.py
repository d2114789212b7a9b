"""Runs that are killed, runs of many models, and what the machinery of a run costs.

    python benchmarks/bench_runs.py [--only kills|many|overhead|speedup] [--quick]

`overhead` and `speedup` need a quiet machine; two workers can only be faster on two idle cores.
Every model has one thread.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from timing import Case, Record, parser, run_cases

import sharpkit as sk

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from zoos import write_small_zoo

MEASURE = sk.MSharpness(m=[1, 4, 16, 64, 256], rho=0.05)


DRIVER = """
import json, sys, time
from pathlib import Path

began = time.perf_counter()
import sharpkit as sk
from sharpkit.runs.store import Store

first, memory, add, count = [], [], Store.add, 0


def norm(model, data, *, seed):
    return float(sum(p.detach().square().sum() for p in model.parameters()))


def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) / 1024 for x in lines if x.startswith("VmRSS"))


def watched(self, *arguments):
    global count
    if count == 0:
        first.append(time.perf_counter() - began)
    if count % 1000 == 0:
        memory.append(resident())
    count += 1
    add(self, *arguments)


if __name__ == "__main__":
    Store.add = watched
    zoo = sk.load_zoo(sys.argv[1])
    sk.score_zoo(zoo, norm, out=sys.argv[2], workers=sk.Workers(1, "processes"), progress=False)
    total = time.perf_counter() - began
    print(json.dumps({"first": first, "memory": memory, "total": total}))
"""


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def kills(arguments: argparse.Namespace) -> Iterator[Record]:
    """SIGKILL the driver at random moments; the table must be that of an undisturbed run."""
    with scratch() as folder:
        yield from killed_runs(folder, 3 if arguments.quick else 20)


def killed_runs(folder: Path, times: int) -> Iterator[Record]:
    zoo = write_small_zoo(folder / "zoo", tasks=tuple("abcdefghijklmnop"), examples=4000)
    command = [sys.executable, "-m", "sharpkit", "score", str(zoo), "--m", "1,2,4,8", "--workers"]
    subprocess.run([*command, "2", "--out", str(folder / "whole")], check=True, capture_output=True)
    moments, finished, repeated, kept, working = random.Random(0), {}, [], 0, 0
    for _ in range(times):
        process = subprocess.Popen(
            [*command, "2", "--out", str(folder / "killed")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and len(_rows(folder / "killed")) == len(finished):
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.2))
        working += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        rows = _rows(folder / "killed")
        kept += len(finished)
        repeated.append(sum(rows.get(key) != seconds for key, seconds in finished.items()))
        finished = rows
    subprocess.run(
        [*command, "2", "--out", str(folder / "killed")], check=True, capture_output=True
    )
    tables = [pd.read_csv(folder / name / "scores.csv") for name in ("whole", "killed")]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    case = f"{times} kills, {working} at work, {len(finished)} of 128 models finished"
    yield Record(f"{case}; lost or repeated of {kept}", "sharpkit", "rows", [sum(repeated)], "<= 0")


def _rows(run: Path) -> dict[tuple[str, str], float]:
    """Model -> its seconds, which differ if it is computed again."""
    if not (run / "results.sqlite").is_file():
        return {}
    try:
        scores = sk.Scores.open(run)
    except sk.errors.RunError:  # killed before the tables were there
        return {}
    frame = scores.provenance()
    scores.close()
    assert not frame.duplicated(["task", "model", "measure"]).any()
    return {(row.task, row.model): row.seconds for row in frame.itertuples()}


def many(arguments: argparse.Namespace) -> Iterator[Record]:
    """Start, memory of the driver and resume with many tiny models."""
    with scratch() as folder:
        yield from many_models(folder, 2_000 if arguments.quick else 10_000)


def many_models(folder: Path, models: int) -> Iterator[Record]:
    _tiny_zoo(folder / "zoo", models)
    (folder / "driver.py").write_text(DRIVER)
    for what in ("run", "resume"):
        command = [sys.executable, str(folder / "driver.py"), str(folder / "zoo")]
        done = subprocess.run(
            [*command, str(folder / "run")], check=True, stdout=subprocess.PIPE, text=True
        )
        seen = json.loads(done.stdout)
        case = f"{models:,} tiny models"
        if what == "run":
            assert len(seen["first"]) == 1, "the run computed nothing"
            memory = seen["memory"]
            growth = [m / memory[0] for m in memory]
            yield Record(f"{case}, first result after", "sharpkit", "s", seen["first"], "<= 10")
            yield Record(f"{case}, in all", "sharpkit", "s", [seen["total"]])
            yield Record(f"{case}, memory of the driver", "sharpkit", "MiB", memory)
            yield Record(
                f"{case}, largest memory of the driver",
                "sharpkit",
                "that at its first result",
                [max(growth)],
                "<= 1.05",
            )
        else:
            assert not seen["first"], "the resumed run computed something again"
            yield Record(f"{case}, resume when finished", "sharpkit", "s", [seen["total"]], "<= 5")


def _tiny_zoo(path: Path, models: int) -> None:
    """Copies of one small network."""
    write_small_zoo(path)
    root = path / "input_data" / "small"
    configs = path / "reference_data" / "small" / "model_configs.json"
    entry = json.loads(configs.read_text())["3"]
    for directory in root.glob("model_*"):
        if directory.name != "model_3":
            shutil.rmtree(directory)
    for i in range(models):
        if i != 3:
            shutil.copytree(root / "model_3", root / f"model_{i}")
    configs.write_text(json.dumps({str(i): entry for i in range(models)}))


def measure_seconds(model, data, *, seed) -> float:
    """The measure's own time, the compute of a work item; its values are not needed here."""
    began = time.perf_counter()
    MEASURE(model, data, seed=seed)
    return time.perf_counter() - began


def scored(limit: int | None, measure, backend: str, workers: int):
    """A whole run on disk with one thread per model: wall seconds, and its results."""
    zoo = sk.embedded_zoo()
    with scratch() as folder:
        began = time.perf_counter()
        scores = sk.score_zoo(
            zoo,
            measure,
            out=folder / "run",
            limit=limit,
            workers=sk.Workers(workers, backend, threads=1),
            progress=False,
        )
        wall = time.perf_counter() - began
        assert scores.failures.empty, scores.failures
        found = wall, scores.provenance()["seconds"].sum(), scores.frame()["value"].sum()
        scores.close()
    return found


def overhead(arguments: argparse.Namespace) -> Iterator[Record]:
    """Wall time of a run beyond that of its measures: reading, hashing, storing, handing over."""
    few, several, repeats = (1, 4, 1) if arguments.quick else (2, 34, 3)
    for backend in ("inline", "processes"):
        shares, of_items = [], []
        for _ in range(repeats):
            # the difference of two runs leaves the start out; the value is the measure's own time
            spent = [scored(limit, measure_seconds, backend, 1) for limit in (few, several)]
            wall, items, compute = (b - a for a, b in zip(*spent, strict=True))
            shares.append(100 * (wall / compute - 1))
            of_items.append(100 * (items / compute - 1))
        case = f"overhead of a run, embedded zoo, backend {backend}"
        yield Record(case, "sharpkit", "% of compute", shares, "<= 3")
        yield Record(f"{case}, of which inside the items", "sharpkit", "% of compute", of_items)


def speedup(arguments: argparse.Namespace) -> Iterator[Record]:
    """The embedded zoo with one and with two workers of one thread each."""
    limit, repeats = (4, 1) if arguments.quick else (None, 3)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for workers, times in seconds.items():
            times.append(scored(limit, MEASURE, "processes", workers)[0])
    for workers, times in seconds.items():
        yield Record(f"score the embedded zoo, {workers} worker(s)", "sharpkit", "s", times)
    gain = [one / two for one, two in zip(*seconds.values(), strict=True)]
    yield Record("score the embedded zoo, two workers", "sharpkit", "times as fast", gain, ">= 1.8")


CASES: dict[str, Case] = {"kills": kills, "many": many, "overhead": overhead, "speedup": speedup}

if __name__ == "__main__":
    torch.set_num_threads(1)
    run_cases(parser(__doc__, CASES).parse_args(), CASES)
