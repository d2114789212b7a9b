"""What a reader must know before the numbers: failures, too few models, orders that reverse."""

from __future__ import annotations

from collections.abc import Sequence
from math import factorial
from typing import TYPE_CHECKING

import numpy as np

from sharpkit.evaluation.arguments import LEAST, LEAST_CERTAIN
from sharpkit.evaluation.cmi import in_bins
from sharpkit.evaluation.grid import Grid, normal_id
from sharpkit.report.limits import COMPARED, drawn
from sharpkit.report.models import reversals

if TYPE_CHECKING:
    import pandas as pd


def of_failures(failures: pd.DataFrame, scored: Sequence[str], grid: Grid) -> list[str]:
    """Models without any value, those that are not `scored`, with the first error of each."""
    if failures.empty:
        return []
    known = {normal_id(name) for name in scored}
    first = failures.assign(id=failures["model"].map(normal_id)).drop_duplicates("id")
    lost = first[~first["id"].isin(known)]
    found = []
    if len(lost):
        which = "No model" if not known else f"{len(lost)} of {len(grid)} models"
        verb = "could be scored" if not known else "could not be scored"
        errors = [f"{row['id']} ({row['error']})" for _, row in lost.head(3).iterrows()]
        more = f"; and {len(lost) - 3} more" if len(lost) > 3 else ""
        found.append(f"{which} {verb}: {'; '.join(errors)}{more}. All errors are under Failures.")
    partly = first["id"].isin(known).sum()
    if partly:
        found.append(f"Some measures failed for {partly} of {len(grid)} models: see Failures.")
    return found


def of_few(models: int, hyperparameters: int) -> list[str]:
    """What so few models with value and gap, or hyperparameters that vary, leave undefined."""
    if models < LEAST:
        has = "1 model has" if models == 1 else f"{models or 'No'} models have"
        return [f"{has} a value and a gap: too few for any statistic, which needs {LEAST}."]
    found = []
    if models < LEAST_CERTAIN:
        pairs = models * (models - 1) // 2
        found.append(
            f"Only {models} models, {pairs} pairs: too few for intervals, and for what noise "
            f"has in mutual information; both need {LEAST_CERTAIN}. Even a perfect order of "
            f"{models} models comes about by chance once in {factorial(models):,} times."
        )
    if hyperparameters < 2:
        found.append(
            f"{('No hyperparameter', 'One hyperparameter')[hyperparameters]} varies: statistics "
            "that need pairs of hyperparameters are left out."
        )
    return found


def of_bins(grid: Grid) -> list[str]:
    """In how many bins a mutual information conditions on continuous hyperparameters."""
    if not grid.bins:
        return []
    several = " No two models differ in one hyperparameter alone, which some statistics need."
    return [
        f"Continuous hyperparameters: the mutual informations are given {in_bins(grid.binned)}. "
        f"All other statistics take the values as they are.{several if len(grid.bins) > 1 else ''}"
    ]


def of_order(
    values: pd.DataFrame, errors: pd.DataFrame, settings: pd.DataFrame, in_grid: bool
) -> list[str]:
    """That sharpness may order models otherwise at another m or ρ, and where it does here."""
    if len(values) < 2 or "m" not in settings or settings["m"].notna().sum() == 0:
        return []
    found: list[str] = []
    rows = drawn(np.ones(len(values), dtype=np.bool_), COMPARED)
    of = f" of {len(rows)} models drawn" if len(rows) < len(values) else " of models"
    values, errors = values.iloc[rows], errors.iloc[rows]
    sharp = settings[settings["m"].notna()]
    for members in sharp.groupby("measure", sort=False).groups.values():
        columns = [int(k) for k in members]
        labels = [str(values.columns[k]) for k in columns]
        some = values.iloc[:, columns].to_numpy(dtype=np.float64)
        noise = errors.iloc[:, columns].to_numpy(dtype=np.float64)
        changed, pairs = reversals(some, noise)
        if changed:
            i, j, one, other = changed[0]
            a, b = (_model(str(values.index[k])) for k in (i, j))
            found.append(
                f"Here {len(changed)} of {pairs} pairs{of} change places, by more than two "
                f"standard errors where these are known: {a} is sharper than {b} by "
                f"{labels[one]}, and flatter by {labels[other]}."
            )
    if in_grid and not found:
        return []
    general = "Across architectures the order by sharpness may reverse with m and ρ: a model is "
    general += "not flat as such, but at an m and a ρ."
    return [" ".join([general, *found])]


def _model(name: str) -> str:
    return f"model {name}" if name.isdecimal() else name
