"""Every statistic of shuffled measures: what chance gives."""

from __future__ import annotations

from collections.abc import Sequence

from sharpkit.evaluation.compared_pairs import Compared
from sharpkit.evaluation.grid import Floats, Grid, Ints
from sharpkit.evaluation.shuffles import Shuffles
from sharpkit.evaluation.sign_errors import Environments
from sharpkit.evaluation.sorted_pairs import MANY
from sharpkit.evaluation.statistics import TABLE, computations


def chance_statistics(
    values: Floats,
    grid: Grid,
    orders: Ints,
    statistics: Sequence[str],
    environments: Environments | None = None,
    *,
    among_all: bool = False,
) -> dict[str, tuple[Floats, Floats]]:
    """Statistics of measures as they are and in each of the orders.

    Args:
        values: One column per measure (models, measures), no NaN.
        grid: The models.
        orders: Of the models (orders, models).
        statistics: Which.
        environments: What the sign-errors count; None for the default.
        among_all: Whether the orders are uniformly random ones of all models. A shuffle then
            forgets which model had which value, so that of many models the measures with the same
            ties share the shuffles of their ranks.

    Returns:
        dict: Statistic -> observed (measures,) and shuffled (orders, measures).
    """
    shared = among_all and len(grid) > MANY
    compared = Compared(grid, grid.varying(), environments or Environments())
    shuffles = Shuffles(compared, orders)
    found = {
        c: (c.shuffled_among_many if shared and c.shuffled_among_many else c.shuffled)(
            values, shuffles
        )
        for c in computations(statistics)
    }
    return {name: found[TABLE[name].computation][TABLE[name].result] for name in statistics}
