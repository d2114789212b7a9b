"""Every statistic of shuffled measures: what chance gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sharpkit.evaluation.compared_pairs import Pairs, changed_pairs, coupled_pairs
from sharpkit.evaluation.correlations import mean_ranks
from sharpkit.evaluation.grid import Floats, Grid, Ints, Weights
from sharpkit.evaluation.resampled_formulas import error_summaries
from sharpkit.evaluation.shuffled_by_sorting import chance_of_many, shuffled_agreement
from sharpkit.evaluation.shuffled_information import ShuffledScores
from sharpkit.evaluation.sign_errors import Environments
from sharpkit.evaluation.sorted_pairs import MANY, dense_ranks
from sharpkit.evaluation.statistics import SIGN_ERRORS, TABLE
from sharpkit.evaluation.threads import in_threads

_SIGNS = 2_000_000  # of pairs held at a time


def chance_statistics(
    values: Floats,
    grid: Grid,
    orders: Ints,
    statistics: Sequence[str],
    environments: Environments | None = None,
) -> dict[str, tuple[Floats, Floats]]:
    """Statistics of measures as they are and in each of the orders.

    Args:
        values: One column per measure (models, measures), no NaN.
        grid: The models.
        orders: Of the models (orders, models).
        statistics: Which.
        environments: What the sign-errors count; None for the default.

    Returns:
        dict: Statistic -> observed (measures,) and shuffled (orders, measures).
    """
    found: dict[str, tuple[Floats, Floats]] = {}
    wanted = set(statistics)
    if wanted & {"kendall_tau", "kendall_tau_b"}:
        observed, shuffled = permuted_kendall(values, grid.gap, orders)
        untied = np.sqrt(_untied(grid.gap[:, None]) * _untied(values))
        with np.errstate(invalid="ignore", divide="ignore"):
            found["kendall_tau"] = observed, shuffled
            found["kendall_tau_b"] = observed / untied, shuffled / untied
    rest = [name for name in statistics if name not in found]
    if rest:
        everything = np.concatenate([np.arange(len(grid))[None], orders])
        zoo = _Zoo.of(grid, rest, environments or Environments())
        columns = in_threads(lambda v: _of_one(v, zoo, everything, rest), list(values.T))
        for name in rest:
            scores = np.stack([column[name] for column in columns], axis=1)
            found[name] = scores[0], scores[1:]
    return {name: found[name] for name in statistics}


def unrestricted_chance(
    values: Floats,
    grid: Grid,
    orders: Ints,
    statistics: Sequence[str],
    environments: Environments | None = None,
) -> dict[str, tuple[Floats, Floats]]:
    """As `chance_statistics`, the measures shuffled among all models.

    Of many models, measures with the same ties share the shuffles of their ranks.
    """
    if len(grid) <= MANY:
        return chance_statistics(values, grid, orders, statistics, environments)
    informed = [name for name in statistics if TABLE[name].conditioning_set]
    rest = [name for name in statistics if name not in informed]
    found = chance_of_many(values, grid, orders, rest, environments or Environments())
    found |= chance_statistics(values, grid, orders, informed, environments)
    return {name: found[name] for name in statistics}


def shuffles(strata: Ints, permutations: int, seed: int) -> Ints:
    """Orders of the models (permutations, models) that keep each model in its stratum."""
    generator, n = np.random.default_rng(seed), len(strata)
    orders = np.empty((permutations, n), dtype=np.int64)
    places = np.argsort(strata, kind="stable")
    step = max(1, _SIGNS // n)
    for start in range(0, permutations, step):
        part = orders[start : start + step]
        part[:, places] = np.argsort(strata + generator.random(part.shape), axis=1)
    return orders


def permuted_kendall(values: Floats, gap: Floats, orders: Ints) -> tuple[Floats, Floats]:
    """Kendall's tau-a of measures (models, measures), and with the gaps in each of the orders.

    Returns:
        tuple: Observed (measures,) and shuffled (permutations, measures).
    """
    n = len(gap)
    pairs = n * (n - 1) // 2
    if n > MANY:
        ranks, itself = dense_ranks(gap), np.arange(n)[None]
        columns = [dense_ranks(column) for column in values.T]
        observed = [shuffled_agreement(ranks, column, itself)[0] for column in columns]
        agreement = [shuffled_agreement(ranks, column, orders) for column in columns]
        return np.array(observed) / pairs, np.stack(agreement, axis=1) / pairs
    dtype = np.float32 if n < 4096 else np.float64  # sums of up to n² signs are exact
    sign = _signs(gap[None], dtype)[0]
    signs = _signs(values.T, dtype).reshape(values.shape[1], n * n).T
    shuffled = np.empty((len(orders), values.shape[1]))
    step = max(1, _SIGNS // n**2)
    for start in range(0, len(orders), step):
        order = orders[start : start + step]
        permuted = sign[order[:, :, None], order[:, None, :]]  # (batch, models, models)
        shuffled[start : start + step] = permuted.reshape(len(order), -1) @ signs
    observed = (sign.reshape(-1) @ signs).astype(np.float64) / (2 * pairs)
    return observed, shuffled / (2 * pairs)


def _signs(values: Floats, dtype: type) -> Weights:
    """Sign of each pair's difference (measures, models, models) of values (measures, models)."""
    larger = values[:, :, None] > values[:, None]
    signs: Weights = larger.astype(dtype) - larger.swapaxes(1, 2)
    return signs


@dataclass(frozen=True)
class _Zoo:
    """What all measures of a zoo share."""

    gap: Floats
    scores: ShuffledScores | None
    coupled: list[Pairs]
    changes: Pairs | None

    @classmethod
    def of(cls, grid: Grid, statistics: Sequence[str], environments: Environments) -> _Zoo:
        wanted, varying = set(statistics), grid.varying()
        informed = wanted & {"cmi_pgdl", "cmi_jiang"}
        return cls(
            grid.gap,
            ShuffledScores.of(grid) if informed else None,
            coupled_pairs(grid, varying) if "granulated_kendall" in wanted else [],
            changed_pairs(grid, varying, environments) if wanted & set(SIGN_ERRORS) else None,
        )


def _of_one(
    values: Floats, zoo: _Zoo, orders: Ints, statistics: Sequence[str]
) -> dict[str, Floats]:
    """Statistics (orders,) of one measure in each of the orders."""
    found: dict[str, Floats] = {}
    wanted = set(statistics)
    if zoo.scores is not None:
        found["cmi_pgdl"], found["cmi_jiang"] = zoo.scores(values[orders])
    if "spearman" in wanted:
        found["spearman"] = _correlations(mean_ranks(values)[orders], mean_ranks(zoo.gap))
    if "pearson" in wanted:
        found["pearson"] = _correlations(values[orders], zoo.gap)
    if "r_squared" in wanted:
        found["r_squared"] = _held_out(values, zoo.gap, orders)
    if "granulated_kendall" in wanted:
        found["granulated_kendall"] = _granulated(values, zoo, orders)
    if wanted & set(SIGN_ERRORS):
        found |= zip(SIGN_ERRORS, _sign_errors(values, zoo, orders), strict=True)
    return {name: found[name] for name in statistics}


def _untied(values: Floats) -> Floats:
    """Share of the pairs that differ (columns,) of values (models, columns)."""
    n = len(values)
    ties = [
        (count * (count - 1)).sum()
        for count in (np.unique(v, return_counts=True)[1] for v in values.T)
    ]
    return 1 - np.array(ties) / (n * (n - 1))


def _correlations(values: Floats, gap: Floats) -> Floats:
    """Linear correlation (orders,) of values (orders, models) with the gaps (models,)."""
    with np.errstate(invalid="ignore", divide="ignore"):  # infinite or constant: NaN
        x = values - values.mean(1, keepdims=True)
        y = gap - gap.mean()
        found: Floats = (x @ y) / np.sqrt((x[0] @ x[0]) * (y @ y))
    return np.where(np.isfinite(found), found, np.nan)


def _held_out(values: Floats, gap: Floats, orders: Ints) -> Floats:
    """R² (orders,), each model predicted from the others; see `r_squared`."""
    n = len(gap)
    nothing = np.full(len(orders), np.nan)
    if not np.isfinite(values).all() or (values == values[0]).all() or (gap == gap[0]).all():
        return nothing
    x = values - values.mean()
    x, y = x / np.abs(x).max(), gap - gap.mean()
    left = 1 - 1 / n - x**2 / (x @ x)  # what a model leaves of the fit without it
    if not (left > 1e-9).all():
        return nothing
    shuffled = x[orders]
    slope = (shuffled @ y) / (x @ x)
    held_out = (y - shuffled * slope[:, None]) / left[orders]
    unexplained: Floats = (held_out**2).sum(1) / ((y @ y) / (1 - 1 / n) ** 2)
    return 1 - unexplained


def _granulated(values: Floats, zoo: _Zoo, orders: Ints) -> Floats:
    if not zoo.coupled:
        return np.full(len(orders), np.nan)
    taus = np.zeros(len(orders))
    for pairs in zoo.coupled:
        members = np.diff(np.append(pairs.starts, len(pairs.first)))
        share = np.repeat(1 / (members * len(members)), members)
        for rows, agreement in _agreements(values, zoo.gap, pairs, orders):
            taus[rows] += agreement @ share
    return taus / len(zoo.coupled)


def _sign_errors(values: Floats, zoo: _Zoo, orders: Ints) -> tuple[Floats, Floats, Floats]:
    pairs = zoo.changes
    if pairs is None:
        nothing = np.full(len(orders), np.nan)
        return nothing, nothing, nothing
    weight = np.broadcast_to(pairs.weight, pairs.first.shape)
    total = pairs.sums(weight[None])
    parts = []
    for _, agreement in _agreements(values, zoo.gap, pairs, orders):
        with np.errstate(invalid="ignore", divide="ignore"):  # an environment without weight
            errors = pairs.sums(weight * (1 - agreement) / 2) / total
        parts.append(error_summaries(errors, np.broadcast_to(total, errors.shape)))
    mean, high, most = (np.concatenate(part) for part in zip(*parts, strict=True))
    return mean, high, most


def _agreements(
    values: Floats, gap: Floats, pairs: Pairs, orders: Ints
) -> Iterator[tuple[slice, Weights]]:
    """Whether each pair is ordered as its gaps (some orders, pairs): 1, -1, or 0 for a tie."""
    ranks, gaps = (np.unique(v, return_inverse=True)[1].astype(np.float32) for v in (values, gap))
    gap_sign = np.sign(gaps[pairs.first] - gaps[pairs.second])
    step = max(1, _SIGNS // max(len(pairs.first), 1))
    for start in range(0, len(orders), step):
        rows = slice(start, start + step)
        shuffled = ranks[orders[rows]]
        difference = shuffled[:, pairs.first] - shuffled[:, pairs.second]
        yield rows, np.sign(difference) * gap_sign
