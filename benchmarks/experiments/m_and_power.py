"""Does m-sharpness predict the generalization gap better when m is smaller? Of one zoo.

    sharpkit zoo train medium --workers 2 --out runs/medium
    python benchmarks/experiments/m_and_power.py runs/medium --workers 2

Scores every network at five m and three radii, plain and adaptive, and writes into
`benchmarks/experiments/results` NAME_power.csv (statistics with null and intervals),
NAME_differences.csv (each m against the largest, in pairs of the same resamples of networks) and
NAME_values.csv (a row per network); prints their tables and draws NAME_power.png beside the scores.
Stopped, it goes on where it was. NAME is that of the zoo's folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

import sharpkit as sk
from sharpkit.evaluation import compare_measures
from sharpkit.evaluation.permutation import holm
from sharpkit.files import write_csv
from sharpkit.plot.predictive_power import draw_predictive_power

RESULTS = Path(__file__).parent / "results"
M = [1, 4, 16, 64, 256]
# a perturbation in units of |w| takes a radius ten times as large
RADII = {"m_sharpness": [0.02, 0.1, 0.5], "m_sharpness_adaptive": [0.2, 1.0, 5.0]}
STATISTICS = {"cmi_pgdl": "score (%)", "kendall_tau": "τ", "granulated_kendall": "granulated τ"}
KEPT = ["low", "high", "null_mean", "null_95", "p_value", "p_value_holm"]


def power(scores: sk.Scores) -> pd.DataFrame:
    """A row per measure, radius and m: the statistics and how certain they are."""
    table = sk.evaluate(scores)
    columns = [name for s in STATISTICS for name in (s, *(f"{s}_{end}" for end in KEPT))]
    keys = ["measure", "rho", "m", "models", "resamples", "permutations"]
    rest = [name for name in (*columns, "p_value", "p_value_holm") if name in table]
    return table[keys + rest].sort_values(["measure", "rho", "m"])


def differences(scores: sk.Scores, task: sk.Task) -> pd.DataFrame:
    """A row per statistic, measure, radius and m below the largest: that m minus the largest.

    `p_value_holm` is of the smallest m alone, over all measures and radii of a statistic.
    """
    frame = scores.frame()
    of = {
        key: rows.set_index("model")["value"]
        for key, rows in frame.groupby(["measure", "rho", "m"])
    }
    rows = []
    for statistic in STATISTICS:
        for measure, radii in RADII.items():
            for rho in radii:
                for m in M[:-1]:
                    found = compare_measures(
                        of[measure, rho, m], of[measure, rho, M[-1]], task, statistic=statistic
                    )
                    rows.append(found.frame().assign(measure=measure, rho=rho, m=m))
    table = pd.concat(rows, ignore_index=True)
    ends = table["m"] == M[0]
    for statistic in STATISTICS:
        primary = ends & (table["statistic"] == statistic)
        table.loc[primary, "p_value_holm"] = holm(table.loc[primary, "p_value"].to_numpy())
    keys = ["statistic", "measure", "rho", "m"]
    return table[
        [*keys, "difference", "low", "high", "p_value", "p_value_holm", "resamples", "models"]
    ]


def picture(table: pd.DataFrame, name: str, path: Path) -> None:
    """Score and Kendall's tau against m, a line for each radius; plain left, adaptive right."""
    figure = Figure(figsize=(11, 9.5), layout="constrained")
    axes = figure.subplots(2, len(RADII))
    for row, statistic in zip(axes, ("cmi_pgdl", "kendall_tau"), strict=True):
        for axis, measure in zip(row, RADII, strict=True):
            rows = table[table["measure"] == measure].assign(task=name)
            draw_predictive_power(axis, rows, statistic)
            axis.set_title("adaptive" if "adaptive" in measure else "plain")
    figure.savefig(path, dpi=110)


def tables(values: pd.DataFrame, changes: pd.DataFrame) -> Iterator[str]:
    """What the page shows."""
    yield "| | ρ | m | score (%) with interval | noise: mean, 95 % | p | τ with interval |"
    yield "|---|---|---|---|---|---|---|"
    for row in values.to_dict("records"):
        score, low, high = (100 * row[f"cmi_pgdl{end}"] for end in ("", "_low", "_high"))
        mean, most = 100 * row["cmi_pgdl_null_mean"], 100 * row["cmi_pgdl_null_95"]
        tau, tau_low, tau_high = (row[f"kendall_tau{end}"] for end in ("", "_low", "_high"))
        yield (
            f"| {row['measure']} | {row['rho']:g} | {row['m']:g} "
            f"| {score:.2f} ({low:.2f} to {high:.2f}) | {mean:.2f}, {most:.2f} "
            f"| {row['cmi_pgdl_p_value']:.2g} | {tau:.2f} ({tau_low:.2f} to {tau_high:.2f}) |"
        )
    yield ""
    yield "| | ρ | " + " | ".join(STATISTICS.values()) + " |"
    yield "|---|---|" + "---|" * len(STATISTICS)
    first = changes[changes["m"] == M[0]]
    for (measure, rho), rows in first.groupby(["measure", "rho"]):
        entries = []
        for row in (
            rows.set_index("statistic").loc[list(STATISTICS)].reset_index().to_dict("records")
        ):
            unit = 100 if row["statistic"] == "cmi_pgdl" else 1
            change, low, high = (unit * row[name] for name in ("difference", "low", "high"))
            entries.append(
                f"{change:.2f} ({low:.2f} to {high:.2f}), "
                f"{row['p_value']:.2g}, {row['p_value_holm']:.2g}"
            )
        yield f"| {measure} | {rho:g} | " + " | ".join(entries) + " |"


def main() -> None:
    """Score, evaluate, compare, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--out", type=Path, help="run directory; by default ZOO_scores")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--n", type=int, help="training examples; all by default")
    arguments = parser.parse_args()
    name = arguments.zoo.name
    out = arguments.out or arguments.zoo.with_name(f"{name}_scores")
    (task,) = sk.load_zoo(arguments.zoo).values()
    measures = [
        sk.MSharpness(m=M, rho=radii, adaptive="adaptive" in measure)
        for measure, radii in RADII.items()
    ]
    scores = sk.score_zoo(task, measures, out=out, n=arguments.n, workers=arguments.workers)
    values, changes = power(scores), differences(scores, task)
    frame = scores.frame()
    columns = frame.pivot(index="model", columns=["measure", "rho", "m"], values="value")
    columns.columns = [f"{measure} {rho:g} {m:g}" for measure, rho, m in columns.columns]
    wide = task.frame().merge(columns.reset_index(), on="model", validate="one_to_one")
    arguments.results.mkdir(parents=True, exist_ok=True)
    write_csv(values, arguments.results / f"{name}_power.csv")
    write_csv(changes, arguments.results / f"{name}_differences.csv")
    write_csv(wide, arguments.results / f"{name}_values.csv", digits="%.7g")
    picture(values, name, out / f"{name}_power.png")
    print(*tables(values, changes), sep="\n")


if __name__ == "__main__":
    main()
