"""What difference between two measures a zoo of known size can show: stated before it is scored.

    OMP_NUM_THREADS=1 python benchmarks/experiments/power.py --zoos 200

A zoo is the grid of a preset or file with the gap of `coverage.py`: two thirds of its variance
from hyperparameters, one third noise. Two measures of strengths a and b (a times the standardised
gap, the rest other effects of the hyperparameters and noise, half each, as there) share half of
their noise, as m-sharpness at two m shares networks and examples. The table has the mean score of
each, the share of zoos in which the paired comparison finds a difference at 5 %, and that in which
the score of the second is above its null.
"""

from __future__ import annotations

import argparse
import itertools
import math
import warnings

import numpy as np

from sharpkit.evaluation.bootstrap import difference_interval
from sharpkit.evaluation.grid import Floats, Grid
from sharpkit.evaluation.intervals import observed_and_resampled, resample_weights
from sharpkit.evaluation.null import cmi_nulls
from sharpkit.zoo_training.grid_file import read_plan

STATISTICS = ("cmi_pgdl", "kendall_tau")
SHARED = 0.5  # of the variance of two measures' noise


def zoo(
    rng: np.random.Generator, sizes: tuple[int, ...], replicates: int, strengths: Floats
) -> tuple[Floats, Grid]:
    """Measures (models, len(strengths)) and a zoo with these numbers of values."""
    settings = np.array(list(itertools.product(*map(range, sizes)))).repeat(replicates, axis=0)
    x = (settings - settings.mean(0)) / settings.std(0)
    own, other = rng.normal(size=(2, len(sizes)))
    own, other = own / math.sqrt(own @ own), other / math.sqrt(other @ other)
    n = len(x)
    gap = math.sqrt(2 / 3) * (x @ own) + math.sqrt(1 / 3) * rng.standard_normal(n)
    noise = math.sqrt(SHARED) * rng.standard_normal((n, 1))
    noise = noise + math.sqrt(1 - SHARED) * rng.standard_normal((n, len(strengths)))
    rest = math.sqrt(0.5) * (x @ other)[:, None] + math.sqrt(0.5) * noise
    values = strengths * gap[:, None] + np.sqrt(1 - strengths**2) * rest
    levels = tuple(tuple(map(str, range(size))) for size in sizes)
    names = tuple(f"hp_{k}" for k in range(len(sizes)))
    ids = tuple(map(str, range(n)))
    return values, Grid(ids, names, settings.astype(np.int64), levels, levels, gap)


def trial(
    sizes: tuple[int, ...], replicates: int, strengths: Floats, seed: int, resamples: int
) -> Floats:
    """Of one zoo (1 + 2 * len(STATISTICS), strengths): p of the null; values and p of differences.

    The differences are those from the first measure.
    """
    rng = np.random.default_rng([len(sizes), replicates, seed])
    values, grid = zoo(rng, sizes, replicates, strengths)
    weights = resample_weights(len(grid), resamples, seed)
    rows = [[null.p_value for null in cmi_nulls(values, grid, resamples, seed)["pgdl"]]]
    for value, draws in observed_and_resampled(values, grid, weights, STATISTICS).values():
        changes = draws - draws[:, :1]
        p = [
            difference_interval(float(value[k] - value[0]), changes[:, k], 0.95, len(grid), "")[2]
            for k in range(len(strengths))
        ]
        rows += [list(value), p]
    return np.array(rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grids", nargs="+", default=["mini", "medium"], help="presets or files")
    parser.add_argument("--zoos", type=int, default=200, help="per row")
    parser.add_argument("--resamples", type=int, default=199, help="and shuffles, of each zoo")
    parser.add_argument("--first", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--more", type=float, nargs="+", default=[0.0, 0.05, 0.1, 0.2, 0.3])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| models | strengths | scores (%) | found | above null | τ | found |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for name in arguments.grids:
        plan = read_plan(name)
        sizes = tuple(len(v) for v in plan.grid.values() if len(v) > 1)
        for first in arguments.first:
            strengths = np.array([first, *(first + more for more in arguments.more)])
            trials = [
                trial(sizes, plan.replicates, strengths, seed, arguments.resamples)
                for seed in range(arguments.zoos)
            ]
            null, cmi, cmi_p, tau, tau_p = np.stack(trials).transpose(1, 0, 2)
            for k in range(1, len(strengths)):
                print(
                    f"| {math.prod(sizes) * plan.replicates} | {first:g}, {strengths[k]:g} "
                    f"| {100 * cmi[:, 0].mean():.2f}, {100 * cmi[:, k].mean():.2f} "
                    f"| {100 * (cmi_p[:, k] <= 0.05).mean():.0f} % "
                    f"| {100 * (null[:, k] <= 0.05).mean():.0f} % "
                    f"| {tau[:, 0].mean():.2f}, {tau[:, k].mean():.2f} "
                    f"| {100 * (tau_p[:, k] <= 0.05).mean():.0f} % |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
