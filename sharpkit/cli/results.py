"""`sharpkit evaluate`, `plot`, `report` and `export`: what a scored run says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sharpkit.cli.options import RUN, of_evaluation
from sharpkit.cli.shell import say
from sharpkit.evaluation.statistics import HEADLINES, STATISTICS


@click.command()
@RUN
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="A name that ends in .csv or .parquet.",
)
def export(run: Path, out: Path) -> None:
    """Write every value of RUN with its provenance: hashes, versions, device, seconds, memory.

    \b
    Example:
      sharpkit export runs/task1 --out task1.csv
    """
    from sharpkit.runs import Scores

    say(Scores.open(run).export(out))


@click.command()
@RUN
@of_evaluation
@click.option(
    "--target", help="A recorded column to predict instead of the gap, such as test_loss."
)
def evaluate(run: Path, target: str | None, **options: Any) -> None:
    """Rate the measures of RUN by how well they predict the generalization gap.

    Prints each statistic beside what noise gets. Writes RUN/evaluation.csv and, for several
    measures, combined.csv: what they predict together; evaluation_columns.csv says what the columns
    mean. With --target it writes RUN/evaluation_TARGET.csv and regret_TARGET.csv: what is lost by
    picking the model that a measure thinks best.

    \b
    Example:
      sharpkit evaluate runs/task1
    """
    from sharpkit.runs.summary import write_evaluation

    say(write_evaluation(run, target, **options))


@click.command()
@RUN
@of_evaluation
@click.option(
    "--statistic",
    default=HEADLINES[0],
    show_default=True,
    type=click.Choice(STATISTICS),
    help="What is plotted.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Default: RUN/predictive_power.png")
def plot(run: Path, statistic: str, out: Path | None, **options: Any) -> None:
    """Plot predictive power against m (the paper's Figure 3, right); its numbers go into a CSV.

    The grey band is what noise gets: a point in it is no evidence.

    \b
    Example:
      sharpkit plot runs/task1 --out figure3_right.png
    """
    from sharpkit.plot import predictive_power
    from sharpkit.plot.canvas import picture_path
    from sharpkit.runs import Scores, evaluate as evaluated

    path = picture_path(out or run / "predictive_power.png")
    predictive_power(evaluated(Scores.open(run), **options), path, statistic=statistic)
    say(f"{path} and {path.with_suffix('.csv')}")


@click.command()
@RUN
@of_evaluation
@click.option("--out", type=click.Path(path_type=Path), help="Default: RUN/report.html")
def report(run: Path, out: Path | None, **options: Any) -> None:
    """Write everything about RUN as one HTML page that needs no network.

    The ranking with intervals, predictive power against m, measures against the gap, mutual
    information by conditioning set, correlations, failures, and what it takes to reproduce the run.
    Needs plotly: pip install 'sharpkit[report]'.

    \b
    Example:
      sharpkit report runs/task1 --out task1.html
    """
    from sharpkit.report import write_report

    say(write_report(run, out, **options))
