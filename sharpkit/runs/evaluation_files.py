"""The tables that `sharpkit evaluate` leaves in a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpkit.evaluation.legend import write_with_legend
from sharpkit.files import write_csv
from sharpkit.runs.evaluate import combine, evaluate
from sharpkit.runs.scores import Scores
from sharpkit.runs.summary import summary
from sharpkit.runs.targets import selection_regret

if TYPE_CHECKING:
    import pandas as pd


def write_evaluation(run: Path, target: str | None = None, **options: Any) -> str:
    """Evaluate a run, write its tables as CSV, and sum them up in words.

    Args:
        run: Directory of a run. It gets evaluation.csv and, for several measures, combined.csv;
            with a target evaluation_TARGET.csv and regret_TARGET.csv.
        target: A recorded column to predict instead of the gap.
        options: Of `evaluate`: resamples, seed, test_size.

    Returns:
        str: The main columns, the further tables, and the first file's path.

    Raises:
        RunError: If the directory holds no run.
        ScoreError: If there is nothing to evaluate.
    """
    scores = Scores.open(run)
    table = evaluate(scores, target=target, **options)
    path = run / ("evaluation.csv" if target is None else f"evaluation_{target}.csv")
    write_with_legend(table, path)
    parts = [summary(table)]
    if target is not None:
        regret = selection_regret(scores, target=target)
        write_csv(regret, run / f"regret_{target}.csv")
        title = f"\n{target} lost by picking the model that a measure thinks best:"
        parts += [title, _text(regret)]
    else:
        together = combine(scores, resamples=options["resamples"], seed=options["seed"])
        if len(together):
            write_with_legend(together, run / "combined.csv")
            parts += ["\nAll measures together, on held-out models:", _text(together)]
    return "\n".join([*parts, str(path)])


def _text(table: pd.DataFrame) -> str:
    return table.to_string(index=False, float_format=lambda value: f"{value:.4g}")
