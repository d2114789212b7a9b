"""Evaluation and report of many models and of many measures: time, memory, size of the page.

    python benchmarks/bench_load.py

Each measurement has a fresh process. Memory is its peak, the imports included. The report is of a
run that was evaluated before; what is left of the evaluation in it is given as well. The page is
opened in a headless Chromium, where there is one, until its last figure is drawn.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from timing import Case, Record, parser, run_cases

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / part) for part in ("report", "")]

SHAPES = {96: (3, 2, 2, 2, 2, 2), 1000: (5, 5, 2, 2, 5, 2), 5000: (5, 5, 5, 4, 5, 2)}


def write_run(folder: Path, models: int, measures: int, ties: bool) -> None:
    """A recorded run of a complete grid; measures from nearly perfect to useless."""
    from sharpkit.runs.store import Estimate, Outcome, Store

    generator = np.random.default_rng(0)
    shape = SHAPES[models]
    settings = list(itertools.product(*map(range, shape)))
    effect = np.array(settings) @ generator.normal(size=len(shape))
    gaps = 0.3 / (1 + np.exp(-(effect + generator.normal(size=models)) / 3))
    noise = generator.normal(size=(models, measures)) * np.geomspace(0.3, 100, measures)
    values = 10 * gaps[:, None] + noise
    if ties:
        values, gaps = np.round(values, 1), np.round(gaps, 3)
    store = Store(None, {"n": 100, "seed": 0})  # in memory, then copied: no write per model
    store.add_task(
        "task", dict(zip(map(str, range(models)), _entries(shape, settings, gaps), strict=True))
    )
    for k, row in enumerate(values.tolist()):
        found = {f"form={j}": Estimate(value, 0.0) for j, value in enumerate(row)}
        store.add("task", str(k), "measure", Outcome(values=found, seconds=0.1))
    folder.mkdir(parents=True, exist_ok=True)
    store._db.execute("VACUUM INTO ?", (str(folder / "results.sqlite"),))
    store.close()


def _entries(shape: tuple[int, ...], settings: list[tuple[int, ...]], gaps: np.ndarray) -> Iterator:
    for setting, gap in zip(settings, gaps.tolist(), strict=True):
        hyperparameters = {
            f"h{i}": {"possible_values": list(range(size)), "current_value": setting[i]}
            for i, size in enumerate(shape)
        }
        yield {"hparams": hyperparameters, "metrics": {"train_acc": 1.0, "test_acc": 1.0 - gap}}


def evaluation(folder: Path) -> float:
    """Seconds of `evaluate`."""
    from sharpkit.runs import Scores, evaluate

    start = time.perf_counter()
    evaluate(Scores.open(folder))
    return time.perf_counter() - start


def report(folder: Path) -> tuple[float, float]:
    """Seconds of `write_report`, and of the evaluation in it."""
    from sharpkit.report import page, write_report

    inside = []
    own = page.evaluate

    def timed(*arguments: object, **options: object) -> object:
        start = time.perf_counter()
        table = own(*arguments, **options)
        inside.append(time.perf_counter() - start)
        return table

    page.evaluate = timed
    start = time.perf_counter()
    write_report(folder)
    return time.perf_counter() - start, sum(inside)


def opening(folder: Path) -> float:
    """Seconds until the page is loaded and every figure drawn."""
    from browser import chromium

    with chromium(folder / "profile") as browser:
        browser.open("about:blank")
        start = time.perf_counter()
        browser.open((folder / "report.html").as_uri())
        drawn = "return [...document.querySelectorAll('.plot')].every(p => p.querySelector('svg'))"
        while not browser.js(drawn):
            time.sleep(0.02)
        return time.perf_counter() - start


def fresh(function: Callable, *arguments: object) -> tuple:
    """What the function gives in a fresh process, with the peak memory of that in MiB."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_with_peak, function, arguments).result()


def _with_peak(function: Callable, arguments: tuple) -> tuple:
    warnings.simplefilter("ignore")
    found = function(*arguments)
    return found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def both(models: int, measures: int, targets: tuple[str, str], ties: bool = False) -> Iterator:
    case = f"{models:,} models x {measures} measures{', with ties' if ties else ''}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_run(folder, models, measures, ties)
        seconds, peak = fresh(evaluation, folder)
        yield Record(f"evaluate, {case}", "sharpkit", "s", [seconds], targets[0])
        yield Record(f"evaluate, {case}, peak memory", "sharpkit", "MiB", [peak], "<= 4096")
        (seconds, inside), peak = fresh(report, folder)
        yield Record(f"report, {case}", "sharpkit", "s", [seconds], targets[1])
        yield Record(f"report, {case}, without the evaluation", "sharpkit", "s", [seconds - inside])
        yield Record(f"report, {case}, peak memory", "sharpkit", "MiB", [peak], "<= 4096")
        size = (folder / "report.html").stat().st_size / 2**20
        yield Record(f"report, {case}, page", "sharpkit", "MiB", [size], "<= 15")
        if shutil.which("chromium") or shutil.which("google-chrome"):
            opened = [opening(folder) for _ in range(3)]
            yield Record(f"report, {case}, opening the page", "sharpkit", "s", opened, "<= 5")


def many_models(arguments: argparse.Namespace) -> Iterator[Record]:
    models, measures = (1000, 3) if arguments.quick else (5000, 60)
    yield from both(models, measures, ("<= 600", "<= 120"))


def tied(arguments: argparse.Namespace) -> Iterator[Record]:
    models, measures = (1000, 3) if arguments.quick else (5000, 60)
    yield from both(models, measures, ("<= 600", "<= 120"), ties=True)


def many_measures(arguments: argparse.Namespace) -> Iterator[Record]:
    yield from both(96, 20 if arguments.quick else 500, ("<= 23", "<= 68"))


CASES: dict[str, Case] = {"models": many_models, "ties": tied, "measures": many_measures}

if __name__ == "__main__":
    run_cases(parser(__doc__, CASES).parse_args(), CASES)
