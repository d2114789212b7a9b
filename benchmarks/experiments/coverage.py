"""How often intervals cover, and how often tests reject, in simulated zoos.

    OMP_NUM_THREADS=1 python benchmarks/experiments/coverage.py --zoos 1000 --workers 2

Every chunk of fifty zoos is a file in `--out`; a second call computes what is missing, and
`--table` prints what is there. A zoo's gap is a sum of hyperparameter effects and noise (shares of
its variance about 2/3 and 1/3); a measure of strength a is a times the standardised gap plus
√(1 − a²) times other effects of the hyperparameters and noise, half each.

Parts:
    intervals: Coverage of 95 % intervals; the truth is the mean of the statistic over the zoos of
        the cell. Paired comparisons of two measures of the same strength with separate noise.
    nulls: Rejections at 5 % of the null of a mutual information, for measures of noise; of
        hyperparameter effects and noise, drawn anew for each zoo; and the same with ties.
    power: Rejections for measures of known strength, beside shuffles among all models.
"""

from __future__ import annotations

import argparse
import itertools
import math
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sharpkit.evaluation import STATISTICS
from sharpkit.evaluation.bootstrap import difference_interval
from sharpkit.evaluation.grid import Floats, Grid
from sharpkit.evaluation.intervals import (
    no_interval,
    observed_and_resampled,
    resample_weights,
)
from sharpkit.evaluation.null import cmi_nulls
from sharpkit.evaluation.number_of_draws import Sampling
from sharpkit.evaluation.permutation import p_values
from sharpkit.evaluation.rating import rate
from sharpkit.evaluation.shuffled_information import ShuffledInformation
from sharpkit.evaluation.shuffles import random_orders
from sharpkit.evaluation.sign_errors import Environments

SHAPES = {
    18: (3, 3, 2),
    24: (3, 2, 2, 2),
    "24, 2 x 3 x 4": (2, 3, 4),
    54: (3, 3, 3, 2),
    96: (3, 2, 2, 2, 2, 2),
    400: (5, 5, 2, 2, 2, 2),
}
STRENGTHS = {"null": 0.0, "weak": 0.3, "strong": 0.8}
CHUNK = 50
DEFINITIONS = ("pgdl", "jiang")


@dataclass(frozen=True)
class Cell:
    """One cell of a table: what is simulated again and again."""

    part: str
    size: int | str
    design: str  # "grid", "random" or "ties"
    relation: str

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.part}-{self.size}-{self.design}-{self.relation}".replace(" ", "")


def cells(models: int) -> Iterator[Cell]:
    """Every cell of one size; those of other small grids go with 24 models."""
    designs = ("grid", "random", "ties")
    for design, relation in itertools.product(designs, ("noise", "hyperparameters")):
        yield Cell("nulls", models, design, relation)
    if models == 24:
        kinds = itertools.product(("grid", "ties"), ("noise", "hyperparameters"))
        for small, (design, relation) in itertools.product((18, "24, 2 x 3 x 4", 54), kinds):
            yield Cell("nulls", small, design, relation)
    for strength in (0.2, 0.4, 0.6):
        yield Cell("power", models, "grid", str(strength))
    for design, relation in itertools.product(designs, STRENGTHS):
        yield Cell("intervals", models, design, relation)


def every_cell() -> list[Cell]:
    """Of all sizes."""
    return [cell for models in (24, 96, 400) for cell in cells(models)]


def zoo(
    rng: np.random.Generator, cell: Cell, strength: float, *, measures: int = 1, effects: str
) -> tuple[Floats, Grid]:
    """Measures (models, measures) and a zoo; effects "fixed", "drawn" or "none" for measures."""
    shape = SHAPES[cell.size]
    settings = np.array(list(itertools.product(*map(range, shape))))
    x = (settings - settings.mean(0)) / settings.std(0)
    if cell.design == "random":
        rows = rng.integers(0, len(x), size=len(x))
        settings, x = settings[rows], x[rows]
    k = len(shape)
    own, other = rng.normal(size=(2, k))
    if effects == "fixed":
        own = np.resize([0.8, 0.3, 0.9, 0.5, 0.2, 0.1], k)
        other = np.resize([0.2, -0.8, 0.1, 0.9, 0.3, -0.5], k)
    own, other = own / math.sqrt(own @ own), other / math.sqrt(other @ other)
    n = len(x)
    gap = math.sqrt(2 / 3) * (x @ own) + math.sqrt(1 / 3) * rng.standard_normal(n)
    noise = rng.standard_normal((n, measures))
    if effects != "none":
        noise = math.sqrt(0.5) * (x @ other)[:, None] + math.sqrt(0.5) * noise
    values = strength * gap[:, None] + math.sqrt(1 - strength**2) * noise
    if cell.design == "ties":
        values, gap = np.round(2 * values) / 2, np.round(2 * gap) / 2
    levels = tuple(tuple(map(str, range(size))) for size in shape)
    ids, names = tuple(map(str, range(n))), tuple("abcdef"[:k])
    return values, Grid(ids, names, settings.astype(np.int64), levels, levels, gap)


def intervals(cell: Cell, rng: np.random.Generator, seed: int, resamples: int) -> dict[str, Floats]:
    """Value and ends of each statistic, and p-values of paired comparisons."""
    values, grid = zoo(rng, cell, STRENGTHS[cell.relation], measures=3, effects="fixed")
    sampling = Sampling(resamples, resamples, 0.95, seed)
    found = rate(values[:, :1], grid, STATISTICS, sampling, [1], Environments())
    weights = resample_weights(len(grid), resamples, seed)
    pairs = observed_and_resampled(values[:, 1:], grid, weights, STATISTICS)
    paired = []
    for name, (value, draws) in pairs.items():
        note = no_interval(name, grid, Environments())
        changes = draws[:, 0] - draws[:, 1]
        paired.append(
            difference_interval(float(value[0] - value[1]), changes, 0.95, len(grid), note)[2]
        )
    ends = [[found[name].value[0], found[name].low[0], found[name].high[0]] for name in STATISTICS]
    return {"ends": np.array(ends), "paired": np.array(paired)}


def nulls(cell: Cell, rng: np.random.Generator, seed: int, shuffled: int) -> dict[str, Floats]:
    """P-values of both definitions."""
    effects = "none" if cell.relation == "noise" else "drawn"
    values, grid = zoo(rng, cell, 0.0, effects=effects)
    found = cmi_nulls(values, grid, shuffled, seed)
    return {"p": np.array([found[name][0].p_value for name in DEFINITIONS])}


def power(cell: Cell, rng: np.random.Generator, seed: int, shuffled: int) -> dict[str, Floats]:
    """P-values of both definitions, and of shuffles among all models."""
    values, grid = zoo(rng, cell, float(cell.relation), effects="drawn")
    found = cmi_nulls(values, grid, shuffled, seed)
    own = [found[name][0].p_value for name in DEFINITIONS]
    orders = random_orders(np.zeros(len(grid), dtype=np.int64), shuffled, seed)
    scores = ShuffledInformation.of(grid)
    chance = scores(values[:, 0][orders])
    observed = scores(values.T)
    everywhere = [float(p_values(o, c[:, None])[0]) for o, c in zip(observed, chance, strict=True)]
    return {"p": np.array([*own, *everywhere])}


PARTS = {"intervals": intervals, "nulls": nulls, "power": power}


def compute(cell: Cell, chunk: int, resamples: int, out: Path) -> Path:
    """One chunk of a cell, if it is not there yet."""
    path = out / f"{cell.name}-{chunk:03}.npz"
    if not path.exists():
        warnings.simplefilter("ignore")
        number = sum(map(ord, cell.name))
        found = [
            PARTS[cell.part](cell, np.random.default_rng([number, chunk, k]), k, resamples)
            for k in range(CHUNK)
        ]
        partial = path.with_suffix(".part.npz")
        np.savez(partial, **{key: np.stack([f[key] for f in found]) for key in found[0]})
        partial.rename(path)
    return path


def load(cell: Cell, out: Path) -> dict[str, Floats]:
    """All chunks of a cell that are there."""
    files = [np.load(path) for path in sorted(out.glob(f"{cell.name}-[0-9][0-9][0-9].npz"))]
    return {key: np.concatenate([f[key] for f in files]) for key in files[0]} if files else {}


def coverage(out: Path) -> Iterator[str]:
    """Rows of a table: coverage, share with an interval, type-I error of comparisons; per cent."""
    yield "| models, zoos | zoos | " + " | ".join(STATISTICS) + " |"
    yield "| --- | --- |" + " --- |" * len(STATISTICS)
    for cell in every_cell():
        found = load(cell, out) if cell.part == "intervals" else {}
        if not found:
            continue
        entries = []
        for k in range(len(STATISTICS)):
            value, low, high = found["ends"][:, k].T
            there = np.isfinite(low)
            truth = np.mean(value[np.isfinite(value)]) if np.isfinite(value).any() else math.nan
            covers = (low <= truth) & (truth <= high)
            compared = np.isfinite(found["paired"][:, k])
            entry = "–"
            if there.mean() >= 0.05:
                entry = f"{100 * covers[there].mean():.1f}"
                entry += "" if there.all() else f" of {100 * there.mean():.0f} %"
            if compared.mean() >= 0.05:
                entry += f" ({100 * (found['paired'][compared, k] <= 0.05).mean():.1f})"
            entries.append(entry)
        head = f"{cell.size}, {cell.design}, {cell.relation} | {len(found['ends'])}"
        yield f"| {head} | " + " | ".join(entries) + " |"


def rejections(part: str, out: Path) -> Iterator[str]:
    """Rows of a table: rejections at 5 % in per cent, for those with a null."""
    extra = " | pgdl, all shuffled | jiang, all shuffled" if part == "power" else ""
    yield f"| models, zoos | zoos | pgdl | jiang{extra} |"
    yield "| --- |" + " --- |" * (5 if part == "power" else 3)
    for cell in every_cell():
        found = load(cell, out) if cell.part == part else {}
        if not found:
            continue
        entries = []
        for p in found["p"].T:
            there = np.isfinite(p)
            share = f"{100 * (p[there] <= 0.05).mean():.1f}" if there.mean() >= 0.05 else "–"
            entries.append(share if there.all() else f"{share} of {100 * there.mean():.0f} %")
        head = f"{cell.size}, {cell.design}, {cell.relation} | {len(found['p'])}"
        yield f"| {head} | " + " | ".join(entries) + " |"


def main() -> None:
    """Compute what is missing, then print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoos", type=int, default=1000, help="per cell")
    parser.add_argument("--resamples", type=int, default=199, help="and shuffles, of each zoo")
    parser.add_argument("--models", type=int, nargs="+", default=[24, 96, 400], help="of the zoos")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/coverage"))
    parser.add_argument("--table", action="store_true", help="compute nothing")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        chunks = range(-(-arguments.zoos // CHUNK))
        wanted = [list(cells(models)) for models in arguments.models]
        with ProcessPoolExecutor(arguments.workers) as pool:
            jobs = [
                pool.submit(compute, cell, chunk, arguments.resamples, arguments.out)
                for some in wanted
                for chunk in chunks
                for cell in some
            ]
            for number, job in enumerate(jobs, 1):
                print(f"{number}/{len(jobs)} {job.result().name}", flush=True)
    for title, rows in (
        (
            "Coverage of 95 % intervals (type-I error of paired comparisons)",
            coverage(arguments.out),
        ),
        ("Rejections at 5 % under nulls", rejections("nulls", arguments.out)),
        ("Power at 5 %", rejections("power", arguments.out)),
    ):
        print(f"\n{title}\n", *rows, sep="\n")


if __name__ == "__main__":
    main()
