"""Runs whose processes are killed or stopped at random moments: do they end, with the same numbers?

    python benchmarks/kills.py --cases 200 --out runs/kills

Every case starts a command, sends SIGKILL or SIGSTOP to its driver or to one of its workers at a
random moment (a stopped driver goes on a second later; a stopped worker never does), and waits for
the end. What is then not finished is run once more. A case is good if no run takes longer than
`--limit` seconds, no process is left behind, and the results are those of a run left alone, digit
by digit. The outcomes are appended to `--out`/kills.jsonl; a second call goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch

import sharpkit as sk
from sharpkit.zoo import ZooWriter, build_model, read_weights

GRID = """
task = "toy"
seed = 3
[data]
name = "{data}"
[recipe]
dense_units = 8
batch_size = 8
stop_at_loss = 0.8
[grid]
width = [3, 5]
dropout = [0.0, 0.3]
"""
FIGURE = """
[data]
name = "embedded"
train_size = 64
[training]
architecture = "nin-4x1"
epochs = 2
batch_size = 32
lr = [0.05]
m = [32]
rho = [0.05]
seeds = [0]
[spectra]
epochs = [2]
m = 32
rho = 0.05
n = 32
steps = 8
probes = 1
[power]
zoo = "{zoo}"
rho = 0.1
m = [1, 4]
"""
TABLES = ("spectra.csv", "test_error.csv", "predictive_power.csv", "density.csv")
TRIES = 3  # to meet a command before it is over
STARTED = 0.05  # seconds between looks for a worker
LEFT = 30.0  # seconds in which the processes of a killed driver must be gone


@dataclass(frozen=True)
class Command:
    """A command that writes into a folder, and what its results are known by."""

    name: str
    arguments: tuple[str, ...]
    results: Callable[[Path], bytes]
    has_workers: bool = True


@dataclass(frozen=True)
class Case:
    """Who gets which signal, at which share of the command's own time."""

    number: int
    command: str
    victim: str  # "driver" or "worker"
    sent: str
    moment: float


@dataclass(frozen=True)
class Outcome:
    """What became of a case; `good` if nothing is wrong with it."""

    case: Case
    seconds: tuple[float, ...]  # of each run
    codes: tuple[int, ...]
    hit: bool  # whether there was still a process to send the signal to
    problem: str = ""


def inputs(folder: Path) -> Path:
    """A zoo of eight networks, data, a grid and the settings of a figure."""
    if (folder / "figure.toml").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    zoo = write_zoo(folder / "zoo")
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 48), ("test", 12)):
        labels = np.arange(count) % 3
        noise = 0.3 * rng.standard_normal((count, 1, 6, 6))
        arrays[f"x_{split}"] = (noise + labels.reshape(-1, 1, 1, 1) - 1).astype(np.float32)
        arrays[f"y_{split}"] = labels
    np.savez(folder / "blobs.npz", **arrays)
    (folder / "grid.toml").write_text(GRID.format(data=folder / "blobs.npz"))
    (folder / "figure.toml").write_text(FIGURE.format(zoo=zoo))
    return folder


def write_zoo(path: Path) -> Path:
    """Eight dense networks on random data."""
    writer, grid = ZooWriter(path), {"width": [4, 8], "depth": [1, 2], "seed": [0, 1]}
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        labels = torch.randint(0, 3, (64,), generator=generator)
        writer.write_dataset("small", split, torch.randn(64, 5, generator=generator), labels)
    for i, values in enumerate(itertools.product(*grid.values())):
        setting = dict(zip(grid, values, strict=True))
        hidden = {"layer_name": "Dense", "units": setting["width"], "activation": "relu"}
        layers = [hidden] * setting["depth"] + [{"layer_name": "Dense", "units": 3}]
        config = {"input_shape": [5], "model_config": layers}
        torch.manual_seed(i)
        first, last = build_model(config), build_model(config)
        accuracies = {"train_acc": 0.99, "test_acc": 0.9 - i / 40}
        writer.write_model(
            "small", i, last, initial=first, hyperparameters=setting, possible_values=grid,
            metrics=accuracies,
        )  # fmt: skip
    return path


def commands(folder: Path) -> dict[str, Command]:
    """All commands, by name; those of Ray where it is installed."""
    zoo, grid, figure = (str(folder / name) for name in ("zoo", "grid.toml", "figure.toml"))
    score = ("score", zoo, "--m", "1,4,16", "--rho", "0.05,0.1", "--workers", "2")
    every = [
        Command("score", (*score, "--backend", "processes"), _scores),
        Command("train", ("zoo", "train", grid, "--workers", "2"), _weights),
        Command("figure3", ("figure3", "--preset", figure, "--workers", "2"), _tables),
        Command(
            "spectrum",
            ("spectrum", zoo, "--model", "0", "--model", "3", "--steps", "60"),
            _spectra,
            has_workers=False,
        ),
    ]
    if importlib.util.find_spec("ray"):
        every.append(Command("score on Ray", (*score, "--backend", "ray"), _scores))
        on_ray = ("zoo", "train", grid, "--workers", "2", "--backend", "ray")
        every.append(Command("train on Ray", on_ray, _weights))
    return {command.name: command for command in every}


def _scores(out: Path) -> bytes:
    scores = sk.Scores.open(out)
    try:
        return scores.frame().to_csv().encode() + scores.failures.to_csv().encode()
    finally:
        scores.close()


def _weights(out: Path) -> bytes:
    files = sorted(out.rglob("*.hdf5"))
    content = [array.tobytes() for path in files for layer in read_weights(path) for array in layer]
    configs = [path.read_bytes() for path in sorted(out.rglob("model_configs.json"))]
    return b"".join([*content, *configs])


def _tables(out: Path) -> bytes:
    tables = [pd.read_csv(out / name) for name in TABLES]
    return b"".join(t.drop(columns="seconds", errors="ignore").to_csv().encode() for t in tables)


def _spectra(out: Path) -> bytes:
    return b"".join((out / name).read_bytes() for name in ("density.csv", "nodes.csv"))


def cases(count: int, known: Sequence[Command], seed: int) -> list[Case]:
    """So many cases, drawn from a seed; the commands in turn."""
    choose = random.Random(seed)
    found = []
    for number in range(count):
        command = known[number % len(known)]
        victim = choose.choice(("driver", "worker", "worker")) if command.has_workers else "driver"
        sent = choose.choice(("SIGKILL", "SIGSTOP"))
        found.append(Case(number, command.name, victim, sent, choose.random()))
    return found


def run(command: Command, out: Path, limit: float, at: tuple[Case, float] | None = None):
    """(seconds, exit code or None if it took too long, whether a signal was sent, who was left)."""
    line = [sys.executable, "-m", "sharpkit", *command.arguments, "--out", str(out)]
    began = time.monotonic()
    with Path(f"{out}.log").open("ab") as log:
        driver = psutil.Popen(line, stdout=log, stderr=log, start_new_session=True)
    hit = at is not None and strike(driver, *at)
    processes = descendants(driver)
    try:
        code = driver.wait(timeout=limit)
    except psutil.TimeoutExpired:
        code = None
        processes += descendants(driver)
    seconds = time.monotonic() - began
    _, left = psutil.wait_procs(processes, timeout=LEFT if code is not None else 0)
    for process in [driver, *left]:
        if process.is_running():
            process.kill()
    return seconds, code, hit, len(left)


def strike(driver: psutil.Popen, case: Case, usual: float) -> bool:
    """Send the signal at its moment; False if the command was over before."""
    deadline = time.monotonic() + case.moment * usual
    while time.monotonic() < deadline:
        if driver.poll() is not None:
            return False
        time.sleep(STARTED)
    choose = random.Random(case.number)
    while driver.poll() is None:
        found = [driver] if case.victim == "driver" else workers(driver)
        if found:
            victim = choose.choice(found)
            try:
                victim.send_signal(getattr(signal, case.sent))
                if case.victim == "driver" and case.sent == "SIGSTOP":
                    time.sleep(1)
                    victim.send_signal(signal.SIGCONT)
            except psutil.NoSuchProcess:
                continue
            return True
        time.sleep(STARTED)
    return False


def descendants(driver: psutil.Popen) -> list[psutil.Process]:
    try:
        return driver.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def workers(driver: psutil.Popen) -> list[psutil.Process]:
    """Those that compute, or are about to."""
    found = []
    for process in descendants(driver):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if "spawn_main" in line or line.startswith("ray::"):
            found.append(process)
    return found


def try_case(case: Case, command: Command, folder: Path, expected: str, usual: float, limit: float):
    """The outcome of one case; its folder stays if something is wrong."""
    out = folder / f"case-{case.number}"
    for _ in range(TRIES):
        seconds, code, hit, left = run(command, out, limit, (case, usual))
        if hit or code != 0 or left:
            break
        usual = seconds  # it was over before: it is faster now
        shutil.rmtree(out)
    runs, codes = [seconds], [code]
    problem = "" if code is not None else "the first run did not end"
    if left and "Ray" not in case.command:
        problem = f"{left} processes were left behind"
    if not problem and code != 0:
        seconds, code, _, _ = run(command, out, limit)
        runs.append(seconds)
        codes.append(code)
        problem = "" if code == 0 else f"the second run ended with {code}"
    if not problem and hit and digest(command, out) != expected:
        problem = "other results"
    if not problem:
        shutil.rmtree(out, ignore_errors=True)
        Path(f"{out}.log").unlink()
    return Outcome(case, tuple(round(s, 1) for s in runs), tuple(codes), hit, problem)


def digest(command: Command, out: Path) -> str:
    return hashlib.sha256(command.results(out)).hexdigest()


def campaign(count: int, folder: Path, seed: int, limit: float, only: str = "") -> list[Outcome]:
    """All outcomes; those in the folder are not computed again."""
    known = [c for c in commands(inputs(folder / "inputs")).values() if only in c.name]
    alone: dict[str, tuple[str, float]] = {}
    log = folder / "kills.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    done = {record["case"]["number"]: record for record in map(json.loads, lines)}
    outcomes = []
    for case in cases(count, known, seed):
        if (record := done.get(case.number)) is not None:
            outcomes.append(Outcome(**record | {"case": Case(**record["case"])}))
            continue
        command = next(c for c in known if c.name == case.command)
        if command.name not in alone:
            out = folder / f"alone-{command.name.replace(' ', '-')}"
            shutil.rmtree(out, ignore_errors=True)
            seconds, code, *_ = run(command, out, limit)
            if code != 0:
                raise SystemExit(f"{command.name}: ended with {code}, left alone; see {out}.log")
            alone[command.name] = digest(command, out), seconds
        outcome = try_case(case, command, folder, *alone[command.name], limit)
        with log.open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        print(outcome, flush=True)
        outcomes.append(outcome)
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """By command, victim and signal: cases, those that hit, runs needed, longest run, problems."""
    lines = ["| command | victim | signal | cases | hit | run twice | longest run (s) | problems |"]
    lines.append("| --- |" + " --- |" * 7)
    keys = Counter((o.case.command, o.case.victim, o.case.sent) for o in outcomes)
    for key in sorted(keys):
        of = [o for o in outcomes if (o.case.command, o.case.victim, o.case.sent) == key]
        twice, hits = sum(len(o.codes) > 1 for o in of), sum(o.hit for o in of)
        longest, bad = max(max(o.seconds) for o in of), sum(bool(o.problem) for o in of)
        numbers = f"{len(of)} | {hits} | {twice} | {longest:.0f} | {bad}"
        lines.append(f"| {' | '.join(key)} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    """Run the campaign and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of one run")
    parser.add_argument("--only", default="", help="commands with this in their name")
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    out = arguments.out.resolve()
    outcomes = campaign(arguments.cases, out, arguments.seed, arguments.limit, arguments.only)
    print(table(outcomes))
    if any(outcome.problem for outcome in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
