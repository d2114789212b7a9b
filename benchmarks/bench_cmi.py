"""Time and memory of scoring measures, beside the definitions written out as loops over pairs.

    OMP_NUM_THREADS=1 python benchmarks/bench_cmi.py

Each measurement has a fresh process. Memory is what it needed beyond its size before.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from timing import Case, Record, parser, run_cases

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "evaluation"))

SHAPES = {
    96: (3, 2, 2, 2, 2, 2, 1),
    1000: (5, 5, 5, 2, 2, 2),
    5000: (5, 5, 5, 5, 2, 2, 2),
}


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


def loop(models: int, definition: str) -> Callable[[], Any]:
    import evaluation_zoos

    zoo = random_zoo(SHAPES[models])
    measure = random_measures(zoo, 1)[0].to_dict()
    function = getattr(evaluation_zoos, f"slow_{definition}")
    return lambda: function(measure, zoo)


def statistics_table(models: int, measures: int) -> Callable[[], Any]:
    from sharpkit.evaluation import rate_measures

    zoo = random_zoo(SHAPES[models])
    values = random_measures(zoo, measures)
    return lambda: rate_measures(values, zoo, resamples=1000)


def null(models: int, measures: int) -> Callable[[], Any]:
    from sharpkit.evaluation.grid import read_configs
    from sharpkit.evaluation.null import cmi_nulls

    zoo = random_zoo(SHAPES[models])
    values = random_measures(zoo, measures).to_numpy()
    grid = read_configs(zoo)
    return lambda: cmi_nulls(values, grid, 1000, 0)


def tau(models: int) -> Callable[[], Any]:
    from sharpkit.evaluation import kendall_tau

    x, y = np.random.default_rng(0).normal(size=(2, models))
    return lambda: kendall_tau(x, y)


def measure_here(
    make: Callable[..., Callable[[], Any]], sizes: tuple[Any, ...], runs: int, cpu: bool = False
) -> tuple[list[float], float]:
    """Seconds of each run, of the processor if `cpu`, and the peak in MiB."""
    clock = time.process_time if cpu else time.perf_counter
    warnings.simplefilter("ignore")
    call = make(*sizes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    seconds = []
    for _ in range(runs):
        start = clock()
        call()
        seconds.append(clock() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return seconds, peak / 1024


def measure(
    make: Callable[..., Any], *sizes: Any, runs: int, cpu: bool = False
) -> tuple[list[float], float]:
    """The same in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure_here, make, sizes, runs, cpu).result()


def small(arguments: argparse.Namespace) -> Iterator[Record]:
    for definition in ("pgdl", "jiang"):
        case = f"{definition} score, 96 models x 7 hyperparameters"
        for contender, make, runs in (("sharpkit", score, 200), ("plain loop", loop, 3)):
            seconds, _ = measure(make, 96, definition, runs=3 if arguments.quick else runs)
            target = "<= 5" if contender == "sharpkit" else ""
            yield Record(case, contender, "ms", [1e3 * s for s in seconds], target)


def large(arguments: argparse.Namespace) -> Iterator[Record]:
    for definition in ("pgdl", "jiang"):
        case = f"{definition} score, 5,000 models x 7 hyperparameters"
        seconds, peak = measure(score, 5000, definition, runs=1 if arguments.quick else 5)
        yield Record(case, "sharpkit", "s", seconds, "<= 60")
        yield Record(f"{case}, extra memory", "sharpkit", "MiB", [peak], "<= 4096")


def everything(arguments: argparse.Namespace) -> Iterator[Record]:
    seconds, _ = measure(statistics_table, 96, 40, runs=1 if arguments.quick else 5)
    case = "all statistics, 1,000 resamples, 96 models x 40 measures"
    yield Record(case, "sharpkit", "s", seconds, "<= 60")


def nulls(arguments: argparse.Namespace) -> Iterator[Record]:
    for models, measures, target in ((96, 40, "<= 20"), (1000, 5, "<= 60")):
        seconds, _ = measure(null, models, measures, runs=1 if arguments.quick else 3, cpu=True)
        case = f"both nulls, 1,000 shuffles, {models} models x {measures} measures, CPU time"
        yield Record(case, "sharpkit", "s", seconds, target)


def taus(arguments: argparse.Namespace) -> Iterator[Record]:
    for models in (1000, 100_000):
        seconds, _ = measure(tau, models, runs=3 if arguments.quick else 10)
        yield Record(
            f"Kendall's tau, {models:,} models", "sharpkit", "ms", [1e3 * s for s in seconds]
        )


CASES: dict[str, Case] = {
    "small": small,
    "large": large,
    "everything": everything,
    "nulls": nulls,
    "taus": taus,
}

if __name__ == "__main__":
    run_cases(parser(__doc__, CASES).parse_args(), CASES)
