"""Every statistic under many weightings of the same models at once: of resamples, for intervals.

Copies of one model are not compared with each other, and a cell of a conditioning set that a
resample leaves empty is not averaged. Of many models the pairs are not formed but counted by
sorting.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from sharpkit.evaluation.compared_pairs import Compared
from sharpkit.evaluation.grid import Floats, Grid, Ints
from sharpkit.evaluation.resampled_by_pairs import AllPairs
from sharpkit.evaluation.resampled_by_sorting import SortedModels
from sharpkit.evaluation.resampled_formulas import Counting, Draws
from sharpkit.evaluation.sign_errors import Environments
from sharpkit.evaluation.sorted_pairs import MANY
from sharpkit.evaluation.statistics import TABLE, computations
from sharpkit.evaluation.threads import in_threads
from sharpkit.progress import progress_bar

_MEASURES = 16  # handed to the threads together
_BATCH = 128  # weightings handled together; small enough for the cache


def weighted_statistics(
    values: Floats,
    grid: Grid,
    weights: Ints,
    statistics: Sequence[str] | None = None,
    *,
    environments: Environments | None = None,
    hyperparameter: int | None = None,
    drawn_together: bool = False,
) -> dict[str, Floats]:
    """Statistics of each measure under each weighting.

    Args:
        values: One column per measure (models, measures), no NaN.
        grid: The models.
        weights: Multiplicities (weightings, models), whole numbers.
        statistics: Which; None for all.
        environments: What the sign-errors count; None for the default.
        hyperparameter: Column of the only one that may differ between the models that granulated
            Kendall and the sign-errors compare; None for all in turn.
        drawn_together: Draw sign-errors together, towards those of the models as they are; see
            `resampled_formulas.drawn_together`.

    Returns:
        dict: Statistic -> array (weightings, measures).
    """
    statistics = list(TABLE) if statistics is None else statistics
    compared = Compared(
        grid,
        grid.varying() if hyperparameter is None else [hyperparameter],
        environments or Environments(),
        {TABLE[name].definition for name in statistics},
        drawn_together,
    )
    many = len(grid) > MANY
    counting: Counting = (SortedModels if many else AllPairs).of(compared)
    rows = [slice(start, start + _BATCH) for start in range(0, len(weights), _BATCH)]
    batches = []
    for part in rows:
        draws = Draws.of(compared, counting, weights[part])
        batches.append([(c, c.resampled(draws)) for c in computations(statistics)])

    def of_measure(column: Floats) -> list[dict[str, Floats]]:
        """The statistics of each batch."""
        sums = counting.of_measure(column)
        found = [{computed: of(sums) for computed, of in batch} for batch in batches]
        return [
            {name: of[TABLE[name].computation][TABLE[name].result] for name in statistics}
            for of in found
        ]

    result = {name: np.full((len(weights), values.shape[1]), np.nan) for name in statistics}
    bar = iter(
        progress_bar(
            iterable=values.T, desc="evaluate", unit="measure", delay=2, leave=False, progress=True
        )
    )
    done = 0
    # of many models the sums of one measure share the cores instead
    while some := list(itertools.islice(bar, 1 if many else _MEASURES)):
        for k, of_column in enumerate(in_threads(of_measure, some), done):
            for part, of_batch in zip(rows, of_column, strict=True):
                for name in statistics:
                    result[name][part, k] = of_batch[name]
        done += len(some)
    return result
