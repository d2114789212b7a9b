"""What the columns of an evaluation mean, and writing a table with that beside it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sharpkit.evaluation.statistics import TABLE
from sharpkit.files import write_csv

if TYPE_CHECKING:
    import pandas as pd

_DIGITS = "%.6g"  # intervals are good for two or three
_COLUMNS = {
    "task": ("task of the zoo", ""),
    "target": ("what is predicted instead of the generalization gap", ""),
    "measure": ("measure", ""),
    "measures": ("measures combined", "count"),
    "m": ("group size of m-sharpness", "examples"),
    "rho": ("radius of the perturbation", "that of the norm of the weights"),
    "form": ("which of the measure's values", ""),
    "n": ("training examples that the measures saw; empty for all", "examples"),
    "seed": ("of the examples and of the measures' random choices", ""),
    "models": ("models with a value and a gap", "count"),
    "left_out": ("models without one", "model ids"),
    "direction": ("1: a large value should mean a large gap; -1: a small one; empty: neither", ""),
    "p_value": ("share of shuffles with such a Kendall's tau, in the expected direction", "share"),
    "p_value_holm": ("p_value, corrected for the number of rows", "share"),
    "resamples": ("bootstrap resamples, and shuffles of the mutual informations' null", "count"),
    "permutations": ("shuffles of all other p-values", "count"),
    "binned": ("continuous hyperparameters, in bins for the mutual informations only", ""),
    "interval_note": ("statistics without an interval, and why", ""),
}
_ENDS = {
    "_low": "lower end of the 95 % interval of {}",
    "_high": "upper end of the 95 % interval of {}",
    "_set": "hyperparameters given which {} is smallest",
    "_null_mean": "{} of measures that know only the hyperparameters, on average",
    "_null_95": "{} of measures that know only the hyperparameters, 95th percentile",
    "_p_value": "share of such measures that reach this {}",
    "_p_value_holm": "the same share, corrected for the number of rows",
    "_adjusted": "({} - null mean) / (1 - null mean)",
}


def legend(table: pd.DataFrame) -> pd.DataFrame:
    """Meaning and unit of every column of a table of `evaluate`, `combine` or `rate_measures`.

    Returns:
        pandas.DataFrame: One row per column of `table`: column, meaning, unit. A column that is
        none of theirs is a setting of a measure.

    Example:
        >>> import pandas as pd
        >>> legend(pd.DataFrame(columns=["m", "cmi_pgdl", "cmi_pgdl_null_95"])).iloc[2]["meaning"]
        'mutual information, PGDL of measures that know only the hyperparameters, 95th percentile'
    """
    import pandas as pd

    rows = [(str(name), *_described(str(name))) for name in table.columns]
    return pd.DataFrame(rows, columns=["column", "meaning", "unit"])


def legend_path(path: Path) -> Path:
    """Where the legend of a table is: `evaluation_columns.csv` for `evaluation.csv`."""
    return path.with_name(f"{path.stem}_columns.csv")


def write_with_legend(table: pd.DataFrame, path: Path) -> None:
    """Write a table of `evaluate` with six digits, and the meaning of its columns beside it."""
    write_csv(in_whole_numbers(table, "m", "n"), path, digits=_DIGITS)
    write_csv(legend(table), legend_path(path))


def in_whole_numbers(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """A table with integers in those of the columns where gaps have made floats of them."""
    whole = {}
    for name in table.columns.intersection(list(columns)):
        with suppress(TypeError, ValueError):
            if (table[name].dropna().astype(float) % 1 == 0).all():
                whole[name] = table[name].astype("Int64")
    return table.assign(**whole)


def _described(column: str) -> tuple[str, str]:
    if column in _COLUMNS:
        return _COLUMNS[column]
    if column in TABLE:
        described = TABLE[column]
        least = "lower is better" if described.lower_is_better else "higher is better"
        return described.label, f"{described.low:g} to {described.high:g}, {least}"
    for name in sorted(TABLE, key=len, reverse=True):
        end = column.removeprefix(name)
        if column.startswith(name) and end in _ENDS:
            unit = "share" if "p_value" in end else ("" if end == "_set" else f"as {name}")
            return _ENDS[end].format(TABLE[name].label), unit
    return "setting of the measure", ""
