"""What `sharpkit evaluate` leaves in a run directory, and the main of it as text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpkit.evaluation.legend import write_with_legend
from sharpkit.evaluation.number_of_draws import draws_note
from sharpkit.evaluation.statistics import TABLE, Statistic
from sharpkit.files import write_csv
from sharpkit.runs.evaluate import combine, evaluate
from sharpkit.runs.scores import Scores
from sharpkit.runs.targets import selection_regret

if TYPE_CHECKING:
    import pandas as pd

_KEYS = ("task", "measure", "m", "rho", "form", "models")


def write_evaluation(run: Path, target: str | None = None, **options: Any) -> str:
    """Evaluate a run, write its tables as CSV, and sum them up in words.

    Args:
        run: Directory of a run. It gets evaluation.csv and, for several measures, combined.csv;
            with a target evaluation_TARGET.csv and regret_TARGET.csv.
        target: A recorded column to predict instead of the gap.
        options: Of `evaluate`: resamples, seed, test_size.
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


def summary(table: pd.DataFrame) -> str:
    """The main columns of `evaluate` as text, and below them what is not defined, and why.

    Example:
        >>> import pandas as pd
        >>> row = {"task": "t", "measure": "s", "models": 96, "cmi_pgdl": 0.0084}
        >>> row |= {"cmi_pgdl_low": 0.0, "cmi_pgdl_high": 0.0248, "cmi_pgdl_null_mean": 0.0042}
        >>> row |= {"cmi_pgdl_p_value": 0.09, "cmi_pgdl_adjusted": 0.0042, "cmi_jiang": 0.031}
        >>> print(summary(pd.DataFrame([row])))
        task t
        measure models cmi_pgdl (%)     interval noise    p adjusted cmi_jiang (%)
              s     96         0.84 0.00 to 2.48  0.42 0.09     0.42          3.10
        noise: what a measure has on average that knows only the hyperparameters
    """
    import pandas as pd

    there = [name for name in table if table[name].notna().any()]
    one_task = table["task"].nunique() == 1
    keys = [name for name in _KEYS if name in there and not (name == "task" and one_task)]
    shown = [(name, [_plain(value) for value in table[name]]) for name in keys]
    statistics = [s for s in TABLE.values() if "summary" in s.shown and s.name in there]
    informed = [s for s in statistics if s.definition]
    for statistic in (s for s in statistics if s.p_value):
        found = _with_noise(table, statistic)
        if statistic in informed[1:]:  # the second definition, in brief
            found = [part for part in found if part[0] not in ("interval", "adjusted")]
        shown += found
    for name in (s.name for s in statistics if not s.p_value):
        shown.append((name, [_number(v, 3) for v in table[name]]))
    text = pd.DataFrame(dict(enumerate(column for _, column in shown)))
    lines = [f"task {table['task'].iloc[0]}"] if one_task else []
    lines.append(text.to_string(index=False, header=[head for head, _ in shown]))
    note = draws_note(table)
    return "\n".join(lines + _remarks(table) + ([note] if note else []))


def _with_noise(table: pd.DataFrame, statistic: Statistic) -> list[tuple[str, list[str]]]:
    """The statistic, its interval, and null mean, p-value and adjusted value where it has them."""
    name, unit = statistic.name, statistic.factor
    title = f"{name} (%)" if statistic.percent else name
    found = [(title, [_number(unit * v, 2) for v in table[name]])]
    if f"{name}_low" in table:
        ends = zip(unit * table[f"{name}_low"], unit * table[f"{name}_high"], strict=True)
        found.append(("interval", [_interval(low, high) for low, high in ends]))
    for column, head in (
        (f"{name}_null_mean", "noise"),
        (statistic.p_value, "p"),
        (f"{name}_adjusted", "adjusted"),
    ):
        if column in table and table[column].notna().any():
            numbers = table[column]
            texts = [_p(v) if head == "p" else _number(unit * v, 2) for v in numbers]
            found.append((head, texts))
    return found


def _remarks(table: pd.DataFrame) -> list[str]:
    """Statistics that no row has, and each reason for a missing interval once."""
    lines = []
    if "interval_note" in table:
        notes = table["interval_note"].dropna()
        parts = {part for note in notes for part in str(note).split("; ") if part}
        lines += [f"no interval, {part}" for part in sorted(parts)]
    if "binned" in table:
        parts = {str(text) for text in table["binned"].dropna()}
        lines += [f"mutual informations: given {text}" for text in sorted(parts)]
    nulls = [f"{s.name}_null_mean" for s in TABLE.values() if s.definition]
    if any(table[null].notna().any() for null in nulls if null in table):
        lines.append("noise: what a measure has on average that knows only the hyperparameters")
    return lines


def _plain(value: object) -> str:
    if value is None or value != value:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if value == value else "-"


def _p(value: float) -> str:
    return f"{value:.2g}" if value == value else "-"


def _interval(low: float, high: float) -> str:
    return f"{low:.2f} to {high:.2f}" if low == low and high == high else "-"


def _text(table: pd.DataFrame) -> str:
    return table.to_string(index=False, float_format=lambda value: f"{value:.4g}")
