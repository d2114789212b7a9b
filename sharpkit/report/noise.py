"""What each statistic is of a measure that knows nothing of the gap: the bands in the figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sharpkit.evaluation.arguments import LEAST, by_direction
from sharpkit.evaluation.grid import Floats, Grid
from sharpkit.evaluation.shuffled_statistics import chance_statistics
from sharpkit.evaluation.shuffles import random_orders
from sharpkit.evaluation.statistics import TABLE

if TYPE_CHECKING:
    import pandas as pd

_SHUFFLES = 400  # the 5th percentile of so many is known to about one per cent of them
ENDS = ("_noise_low", "_noise_mean", "_noise_high")


def noise_bands(
    values: Floats, grid: Grid, table: pd.DataFrame, statistics: Sequence[str], seed: int
) -> pd.DataFrame:
    """Per statistic the mean, 5th and 95th percentile of shuffled measures.

    Those of a mutual information are in the table: its null keeps what the hyperparameters explain,
    and its lower end is 0. All others are shuffled among all models, as for their p-values.

    Args:
        values: Of the measures (models, measures); NaN where there is none.
        table: One row per measure, of `evaluate`.

    Returns:
        DataFrame: Index of the table; statistic + _noise_low, _noise_mean, _noise_high.
    """
    import pandas as pd

    found = np.full((len(table), len(statistics), 3), np.nan)
    usable = np.isfinite(values) & np.isfinite(grid.gap)[:, None]
    shuffled = [name for name in statistics if not TABLE[name].definition]
    directions = [None if pd.isna(d) else int(d) for d in table["direction"]]
    for models in np.unique(usable, axis=1).T:
        if models.sum() < LEAST:
            continue
        members = np.flatnonzero((usable == models[:, None]).all(0))
        some, columns = grid.take(models), values[np.ix_(models, members)]
        orders = random_orders(np.zeros(len(some), dtype=np.int64), _SHUFFLES, seed)
        expected = [directions[k] for k in members]
        for names, turned, known in by_direction(columns, expected, shuffled):
            chance = chance_statistics(turned, some, orders, names, among_all=True)
            for name in names:
                band = _band(chance[name][1], TABLE[name].no_relation)
                found[members[known], statistics.index(name)] = band[known]
    columns = [name + end for name in statistics for end in ENDS]
    bands = pd.DataFrame(found.reshape(len(table), -1), index=table.index, columns=columns)
    for name in statistics:
        if TABLE[name].definition:
            bands[f"{name}_noise_mean"] = table[f"{name}_null_mean"]
            bands[f"{name}_noise_high"] = table[f"{name}_null_95"]
            bands[f"{name}_noise_low"] = np.where(table[f"{name}_null_95"].notna(), 0.0, np.nan)
    return bands


def _band(chance: Floats, expected: float | None) -> Floats:
    """5th percentile, mean and 95th percentile (measures, 3) of shuffles (shuffles, measures).

    The mean is the expected one where that is known.
    """
    band = np.full((chance.shape[1], 3), np.nan)
    known = np.isfinite(chance).all(0)
    if known.any():
        low, high = np.quantile(chance[:, known], (0.05, 0.95), axis=0)
        mean = chance[:, known].mean(0)
        if expected is not None:
            mean = np.full_like(mean, expected)
        band[known] = np.stack([low, mean, high], axis=1)
    return band
