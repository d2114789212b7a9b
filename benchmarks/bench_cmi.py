"""Time and memory of scoring measures, printed as a Markdown table.

    OMP_NUM_THREADS=1 python benchmarks/bench_cmi.py

Each row is the median of the runs, with their smallest and largest. Memory is what the process
needed beyond its size before the row, from a fresh process for each row.
"""

from __future__ import annotations

import itertools
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import click
import numpy as np

SHAPES = {96: (3, 2, 2, 2, 2, 2, 1), 5000: (5, 5, 5, 5, 2, 2, 2)}


def random_zoo(shape: tuple[int, ...], seed: int = 0) -> dict[str, Any]:
    """A complete grid with gaps that depend on the hyperparameters and on noise."""
    generator = np.random.default_rng(seed)
    settings = list(itertools.product(*map(range, shape)))
    effect = generator.normal(size=len(shape))
    gaps = np.array(settings) @ effect + generator.normal(size=len(settings))
    return {
        str(k): {
            "hparams": {
                f"h{i}": {"possible_values": list(range(size)), "current_value": setting[i]}
                for i, size in enumerate(shape)
            },
            "metrics": {"train_acc": 1.0, "test_acc": 1.0 - float(gap)},
        }
        for k, (setting, gap) in enumerate(zip(settings, gaps, strict=True))
    }


def random_measures(zoo: dict[str, Any], count: int) -> Any:
    """Measures from nearly perfect to useless, one column each."""
    import pandas as pd

    generator = np.random.default_rng(1)
    gap = np.array([1.0 - entry["metrics"]["test_acc"] for entry in zoo.values()])
    noise = generator.normal(size=(len(zoo), count)) * np.geomspace(0.3, 100, count)
    return pd.DataFrame(gap[:, None] + noise, index=list(zoo), columns=range(count))


def score(models: int, definition: str) -> Callable[[], Any]:
    from sharpkit.evaluation import conditional_mutual_information

    zoo = random_zoo(SHAPES[models])
    measure = random_measures(zoo, 1)[0].to_dict()
    return lambda: conditional_mutual_information(measure, zoo, definition)


def table(models: int, measures: int) -> Callable[[], Any]:
    from sharpkit.evaluation import evaluate_measures

    zoo = random_zoo(SHAPES[models])
    values = random_measures(zoo, measures)
    return lambda: evaluate_measures(values, zoo, resamples=1000)


CASES: dict[str, tuple[Callable[..., Callable[[], Any]], tuple[Any, ...], int, str]] = {
    "pgdl score, 96 models x 7 hyperparameters": (score, (96, "pgdl"), 200, "5 ms"),
    "jiang score, 96 models x 7 hyperparameters": (score, (96, "jiang"), 200, "5 ms"),
    "pgdl score, 5,000 models x 7 hyperparameters": (score, (5000, "pgdl"), 5, "60 s, 4 GiB"),
    "jiang score, 5,000 models x 7 hyperparameters": (score, (5000, "jiang"), 5, "60 s, 4 GiB"),
    "all statistics, 1,000 resamples, 96 models x 40 measures": (table, (96, 40), 5, "60 s"),
}


def measure_case(name: str) -> tuple[list[float], float]:
    """Run one case in this process: seconds of each run, and peak MiB."""
    make, arguments, runs, _ = CASES[name]
    warnings.simplefilter("ignore")
    call = make(*arguments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return seconds, peak / 1024


def readable(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds:.2f} s"


@click.command(help=__doc__)
def main() -> None:
    context = multiprocessing.get_context("spawn")
    print("| case | median | smallest - largest | runs | extra memory | target |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (_, _, runs, target) in CASES.items():
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            seconds, peak = pool.submit(measure_case, name).result()
        spread = f"{readable(min(seconds))} - {readable(max(seconds))}"
        middle = readable(float(np.median(seconds)))
        print(f"| {name} | {middle} | {spread} | {runs} | {peak:.0f} MiB | {target} |", flush=True)


if __name__ == "__main__":
    main()
