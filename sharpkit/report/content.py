"""What the page shows of a run, as plain values for the template."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpkit.evaluation import CombinedPredictor, combined_predictor
from sharpkit.evaluation.arguments import LEAST, LEAST_CERTAIN
from sharpkit.evaluation.cmi import EXACT
from sharpkit.evaluation.grid import Grid, read_configs, read_measure, read_measures
from sharpkit.evaluation.number_of_draws import draws_note
from sharpkit.evaluation.regression import LEAST_COMBINED
from sharpkit.evaluation.statistics import HEADLINES, TABLE
from sharpkit.report import figures, notes
from sharpkit.report.labels import decimal, interval_text, measure_label, number, records
from sharpkit.report.limits import MEASURES, said
from sharpkit.report.models import ModelsTable, models_table, percent_gap
from sharpkit.report.noise import noise_bands
from sharpkit.report.ranking import Ranking, ranking_table
from sharpkit.report.scatter import in_order, scatter_data
from sharpkit.runs.measure_values import complete_measures

if TYPE_CHECKING:
    import pandas as pd

SECTIONS = {
    "ranking": "Ranking",
    "m": "Predictive power against m",
    "models": "Models and measures",
    "scatter": "Measure and gap",
    "sets": "Conditioning sets",
    "correlations": "Correlations",
}


@dataclass(frozen=True)
class Choice:
    """A figure in several variants, one of which is shown."""

    name: str  # what the page calls it
    label: str  # of the selector
    options: Mapping[str, str]  # value of the selector -> text
    figures: Mapping[str, str]  # value of the selector -> plotly's JSON


@dataclass(frozen=True)
class Results:
    """What a run has of one task."""

    keys: pd.DataFrame  # measure and setting of each column of the values
    values: pd.DataFrame  # one row per model that has some
    errors: pd.DataFrame  # standard errors of the values, alike
    failures: pd.DataFrame  # model, measure, error
    configs: Mapping[str, Any]  # its model_configs
    table: pd.DataFrame | None  # its rows of the evaluation; None if there are none
    setting: str  # number of examples and seed, in words
    unrated: str  # why no task of the run has rows of the evaluation; empty if one has


@dataclass(frozen=True)
class TaskContent:
    """Everything about one task; `sections` says what of it is shown, and in which order."""

    name: str
    facts: Mapping[str, str]
    hyperparameters: Mapping[str, Sequence[str]]
    notes: Sequence[str]
    sections: Mapping[str, str]
    models: ModelsTable
    scatter: Mapping[str, Any]
    ranking: Ranking | None = None
    choices: Mapping[str, Choice] = field(default_factory=dict)
    correlations: str = ""
    mapped: str = ""
    combined: Mapping[str, Any] | None = None
    not_combined: Sequence[str] = ()


def task_content(name: str, results: Results, *, resamples: int, seed: int) -> TaskContent:
    """What the page shows of one task."""
    grid = read_configs(results.configs)
    labels = [measure_label(key) for key in records(results.keys)]
    values, errors = (f.set_axis(labels, axis=1) for f in (results.values, results.errors))
    columns = read_measures(values, grid)
    comparable = np.isfinite(columns) & np.isfinite(grid.gap)[:, None]
    most = int(comparable.sum(0).max(initial=0))
    varying = [grid.names[h] for h in grid.varying()]
    setting = f"{len(grid)} models, {results.setting}"
    found: dict[str, Any] = {"ranking": None, "choices": {}, "correlations": ""}
    order = _sharpness_first(results.keys)
    table = results.table
    if table is not None:
        settings = [column for column in results.keys.columns if column in table]
        table = table.assign(label=[measure_label(k) for k in records(table[settings])])
        # a measure that failed throughout stands among the models and the failures
        table = _best_first(table[table["label"].isin(labels)])
        found = _rated(table, values, grid, setting, seed)
        found["combined"], found["not_combined"] = _combined(
            values[list(table["label"])], results.configs, resamples, seed
        )
    draws = "" if table is None else draws_note(table)
    scatter = scatter_data(values, table, grid, results.configs)
    return TaskContent(
        name=name,
        facts={
            "Models": str(len(grid)),
            "Measures": str(len(labels)),
            "Gap": _gaps(grid, results.configs),
            "Examples": results.setting,
            **({"Draws": draws.removeprefix("draws: ")} if draws else {}),
        },
        hyperparameters={
            name: in_order(levels) for name, levels in zip(grid.names, grid.levels, strict=True)
        },
        notes=[
            *notes.of_failures(results.failures, list(map(str, values.index)), grid),
            *notes.of_few(most, len(varying)),
            *notes.of_bins(grid),
            *([f"No statistics: {results.unrated}."] if results.unrated and most >= LEAST else []),
            *notes.of_order(values, errors, results.keys, in_grid=bool(grid.names)),
        ],
        sections=_sections(found, scatter, few=most < LEAST_CERTAIN),
        models=models_table(
            values.iloc[:, order],
            errors.iloc[:, order],
            [str(results.keys["measure"].iloc[k]) for k in order],
            results.failures,
            grid,
            results.configs,
        ),
        scatter=scatter,
        **found,
    )


def _sections(found: Mapping[str, Any], scatter: Mapping[str, Any], *, few: bool) -> dict[str, str]:
    """What there is to show: of few models their own numbers first, of many the measures'."""
    shown = {
        "ranking": found["ranking"] is not None,
        "m": "m" in found["choices"],
        "models": True,
        "scatter": bool(scatter["measures"]),
        "sets": "sets" in found["choices"],
        "correlations": bool(found["correlations"]),
    }
    first = ("models", "scatter", "ranking", "m") if few else ("ranking", "m", "scatter")
    order = dict.fromkeys((*first, "sets", "correlations", "models"))
    return {s: SECTIONS[s] for s in order if shown[s]}


def _rated(
    table: pd.DataFrame, values: pd.DataFrame, grid: Grid, setting: str, seed: int
) -> dict[str, Any]:
    """All that rests on the evaluation."""
    ranked = values[list(table["label"])]
    usable = [s for s in TABLE if s in table and np.isfinite(table[s]).any()]
    bands = noise_bands(read_measures(ranked, grid), grid, table, usable, seed)
    table = table.join(bands[[c for c in bands if c not in table]])
    choices = {}
    if usable:
        choices["ranking"] = _choice(
            "ranking", "Statistic", usable, lambda s: figures.ranking(table, s, setting)
        )
        if "m" in table and table["m"].nunique() > 1:
            with_m = table[table["m"].notna()]
            drawable = [s for s in usable if np.isfinite(with_m[s]).any()]
            choices["m"] = _choice(
                "m", "Statistic", drawable, lambda s: figures.against_m(table, s, setting)
            )
    best = ranked.iloc[:, :MEASURES]
    sets = _conditioning(best, grid)
    if sets is not None:
        choices["sets"] = sets
    informative = best.loc[:, best.nunique() > 1]
    correlations = ""
    if informative.shape[1] > 1 and len(informative) >= LEAST:
        correlations = figures.correlations(informative)
    return {
        "ranking": ranking_table(table) if usable else None,
        "choices": choices,
        "correlations": correlations,
        "mapped": said(best.shape[1], ranked.shape[1], "measures", "the best of the ranking"),
    }


def _best_first(table: pd.DataFrame) -> pd.DataFrame:
    """By the first headline that is defined."""
    by = next((s for s in HEADLINES if np.isfinite(table[s]).any()), HEADLINES[-1])
    return table.sort_values(by, ascending=False, na_position="last", kind="stable").reset_index(
        drop=True
    )


def _sharpness_first(keys: pd.DataFrame) -> list[int]:
    """The columns, those of a sharpness before the others."""
    if "m" not in keys:
        return list(range(len(keys)))
    return [int(k) for k in np.argsort(keys["m"].isna().to_numpy(), kind="stable")]


def _choice(name: str, label: str, keys: Sequence[str], draw: Callable[[str], str]) -> Choice:
    first = [k for k in HEADLINES if k in keys][:1]
    ordered = [*first, *(k for k in keys if k not in first)]
    titles = {k: TABLE[k].title for k in ordered}
    return Choice(name, label, titles, {k: draw(k) for k in ordered})


def _conditioning(values: pd.DataFrame, grid: Grid) -> Choice | None:
    """Mutual information by conditioning set; None where nothing varies or is defined."""
    if not grid.varying():
        return None
    titles, drawn = {}, {}
    for statistic in (s for s in TABLE.values() if s.definition):
        exact = EXACT[statistic.definition]
        rows: dict[str, Mapping[tuple[str, ...], float]] = {}
        for label in values:
            column, present = read_measure(values[label], grid)
            present &= ~np.isnan(column) & ~np.isnan(grid.gap)
            if present.sum() < LEAST:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the evaluation has told
                found = exact(column[present], grid.take(present)).conditioning_sets
            rows[str(label)] = _unordered(found)
        known = {k for row in rows.values() for k, v in row.items() if np.isfinite(v)}
        if known - {()}:  # given something
            shown = {
                label: {k: v for k, v in row.items() if k in known} for label, row in rows.items()
            }
            titles[statistic.definition] = statistic.label
            drawn[statistic.definition] = figures.conditioning_sets(shown, "%")
    return Choice("sets", "Definition", titles, drawn) if drawn else None


def _unordered(sets: Mapping[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
    """Sets of which both orders have the same value, once; otherwise both."""
    kept: dict[tuple[str, ...], float] = {}
    for names, value in sets.items():
        if not _same(kept.get(names[::-1]), value):
            kept[names] = value
    return kept


def _same(one: float | None, other: float) -> bool:
    return one is not None and (one == other or (np.isnan(one) and np.isnan(other)))


def _combined(
    values: pd.DataFrame, configs: Mapping[str, Any], resamples: int, seed: int
) -> tuple[dict[str, Any] | None, list[str]]:
    """The predictor from all measures that every scored model has, and the others' names."""
    complete = complete_measures(values)
    others = [str(name) for name in values if name not in complete]
    if complete.shape[1] < 2 or len(complete) < LEAST_COMBINED:
        return None, others
    return _shown(combined_predictor(complete, configs, resamples=resamples, seed=seed)), others


def _shown(found: CombinedPredictor) -> dict[str, Any]:
    heaviest = sorted(found.coefficients.items(), key=lambda item: -abs(item[1]))[:5]
    none = "no interval"
    return {
        "measures": len(found.coefficients),
        "models": found.r_squared.models,
        "statistics": [
            (TABLE[s.statistic].label, decimal(s.value), interval_text(s.low, s.high) or none)
            for s in found.statistics
        ],
        "heaviest": [name for name, _ in heaviest],
    }


def _gaps(grid: Grid, configs: Mapping[str, Any]) -> str:
    percent = percent_gap(configs)
    gaps = (100 if percent else 1) * grid.gap[np.isfinite(grid.gap)]
    unit = " %" if percent else ""
    if len(gaps) == 0:
        return "unknown"
    if len(gaps) == 1:
        return number(float(gaps[0]), 3) + unit
    low, high, spread = (number(float(v), 3) for v in (gaps.min(), gaps.max(), gaps.std(ddof=1)))
    return f"{low} to {high}{unit}, standard deviation {spread}{unit}"
