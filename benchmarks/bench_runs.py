"""Runs that are killed, runs of many models, and what the machinery of a run costs.

    python benchmarks/bench_runs.py [--only kills|many|overhead|speedup]

`overhead` and `speedup` need a quiet machine; two workers can only be faster on two idle cores.
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
from pathlib import Path

import pandas as pd
import torch

import sharpkit as sk

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from zoos import write_small_zoo

MEASURE = sk.MSharpness(m=[1, 4, 16, 64, 256], rho=0.05)


def kills(folder: Path, times: int = 20) -> Iterator[str]:
    """SIGKILL the driver at random moments; the table must be that of an undisturbed run."""
    zoo = write_small_zoo(folder / "zoo", tasks=tuple("abcdefghijklmnop"), examples=4000)
    command = [sys.executable, "-m", "sharpkit", "score", str(zoo), "--m", "1,2,4,8", "--workers"]
    subprocess.run([*command, "2", "--out", str(folder / "whole")], check=True, capture_output=True)
    moments, finished, repeated, kept, working = random.Random(0), {}, 0, 0, 0
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
        repeated += sum(rows.get(key) != seconds for key, seconds in finished.items())
        finished = rows
    subprocess.run(
        [*command, "2", "--out", str(folder / "killed")], check=True, capture_output=True
    )
    tables = [pd.read_csv(folder / name / "scores.csv") for name in ("whole", "killed")]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    yield (
        f"{times} kills, {working} of them at work, {len(finished)} of 128 models finished; "
        f"{repeated} of {kept} finished rows lost or computed again; same table"
    )


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


def many(folder: Path, models: int = 10_000) -> Iterator[str]:
    """Start, memory of the driver and resume with many tiny models."""
    _tiny_zoo(folder / "zoo", models)
    script = (
        "import resource, sys, time\n"
        "from pathlib import Path\n"
        "began = time.perf_counter()\n"
        "import sharpkit as sk\n"
        "memory, first = [], []\n"
        "def norm(model, data, *, seed):\n"
        "    return float(sum(p.detach().square().sum() for p in model.parameters()))\n"
        "def resident():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(x.split()[1]) // 1024 for x in lines if x.startswith('VmRSS'))\n"
        "if __name__ == '__main__':\n"
        "    from sharpkit.runs.store import Store\n"
        "    add = Store.add\n"
        "    def watched(self, *arguments):\n"
        "        first.append(time.perf_counter() - began)\n"
        "        if len(first) % 1000 == 1:\n"
        "            memory.append(resident())\n"
        "        add(self, *arguments)\n"
        "    Store.add = watched\n"
        "    zoo = sk.load_zoo(sys.argv[1])\n"
        "    sk.score_zoo(zoo, norm, out=sys.argv[2], backend='processes', workers=1,"
        " progress=False)\n"
        "    total = time.perf_counter() - began\n"
        "    print(f'first result after {first[0]:.1f} s; ' if first else '', end='')\n"
        "    print(f'{total:.1f} s in all; driver {memory} MiB')\n"
    )
    (folder / "driver.py").write_text(script)
    for what in ("run", "resume"):
        command = [sys.executable, str(folder / "driver.py"), str(folder / "zoo")]
        done = subprocess.run(
            [*command, str(folder / "run")], check=True, capture_output=True, text=True
        )
        yield f"{models:,} models, {what}: {done.stdout.strip()}"


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


def overhead(folder: Path, models: int = 16) -> Iterator[str]:
    """Wall time of a run beyond that of its items, one thread."""
    task = sk.embedded_zoo()["fashion_mnist_14x14"]
    for backend in ("inline", "processes"):
        walls = []
        for limit in (1, models):  # the difference leaves the start out
            began = time.perf_counter()
            scores = sk.score_zoo(
                task,
                MEASURE,
                n=1000,
                limit=limit,
                out=folder / f"{backend}{limit}",
                backend=backend,
                workers=1,
                threads=1,
                progress=False,
            )
            walls.append((time.perf_counter() - began, scores.provenance()["seconds"].sum()))
        wall, busy = (b - a for a, b in zip(*walls, strict=True))
        yield (
            f"{backend}: {100 * (wall / busy - 1):.2f} % over {busy:.1f} s of items; "
            f"a run of one model takes {walls[0][0]:.1f} s, of which the item {walls[0][1]:.1f} s"
        )


def speedup(folder: Path) -> Iterator[str]:
    """The embedded zoo with one and with two workers of one thread each."""
    seconds = {}
    for workers in (1, 2, 1, 2):
        began = time.perf_counter()
        sk.score_zoo(
            sk.embedded_zoo(),
            MEASURE,
            out=folder / f"{workers}-{len(seconds)}-{began}",
            backend="processes",
            workers=workers,
            threads=1,
            progress=False,
        )
        seconds.setdefault(workers, []).append(time.perf_counter() - began)
    one, two = min(seconds[1]), min(seconds[2])
    yield f"1 worker {one:.1f} s, 2 workers {two:.1f} s: {one / two:.2f} times as fast"


CASES = {"kills": kills, "many": many, "overhead": overhead, "speedup": speedup}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=CASES, action="append")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.only or CASES:
        with tempfile.TemporaryDirectory() as folder:
            for line in CASES[name](Path(folder)):
                print(f"{name}: {line}", flush=True)


if __name__ == "__main__":
    main()
