"""The values of a run as a CSV file, with a legend beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sharpkit.evaluation.legend import legend, legend_path
from sharpkit.files import disk_errors, write_csv

if TYPE_CHECKING:
    import pandas as pd

_OWN = {
    "model": ("name or id of the model", ""),
    "value": ("what the measure gave for the model", "that of the measure"),
    "std_error": ("standard error of the value; empty if unknown", "as value"),
    "m": ("group size of m-sharpness", "examples"),
}


def write_scores(frame: pd.DataFrame, run: Path) -> Path:
    """Write `Scores.frame()` as RUN/scores.csv, exactly, and what its columns mean beside it.

    Args:
        frame: Of a run.
        run: Its directory.

    Returns:
        Path: Of scores.csv; scores_columns.csv has one row per column.

    Raises:
        RunError: If they cannot be written, as on a full disk.

    Example:
        >>> import pandas as pd, tempfile
        >>> row = {"task": "t", "model": "0", "measure": "s", "m": 4.0, "value": 0.1}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(write_scores(pd.DataFrame([row]), Path(folder)).read_text())
        task,model,measure,m,value
        t,0,s,4,0.1
    """
    path = run / "scores.csv"
    # group sizes beside measures without one are floats with gaps
    whole = {"m": frame["m"].astype("Int64")} if _is_whole(frame) else {}
    with disk_errors(path):
        write_csv(frame.assign(**whole), path)
    described = legend(frame)
    for column, (meaning, unit) in _OWN.items():
        described.loc[described["column"] == column, ["meaning", "unit"]] = [meaning, unit]
    with disk_errors(path):
        write_csv(described, legend_path(path))
    return path


def _is_whole(frame: pd.DataFrame) -> bool:
    if "m" not in frame:
        return False
    try:
        return bool((frame["m"].dropna().astype(float) % 1 == 0).all())
    except (TypeError, ValueError):
        return False
