"""`sharpkit score`: measures of every model of a zoo, or of checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sharpkit.cli.options import (
    BUILD,
    DEVICE,
    LOSS,
    OUT,
    SEED,
    N,
    of_folders,
    of_m_sharpness,
    of_workers,
    zoo_at,
)
from sharpkit.cli.shell import say

if TYPE_CHECKING:
    from sharpkit.runs import Scores

_OF_ZOOS = (
    *("tasks", "limit", "stack"),
    *("backend", "workers", "threads", "timeout", "memory", "address"),
)


@click.command()
@click.argument("path", required=False)
@OUT
@click.option("--checkpoint", multiple=True, help="Instead of PATH; may be repeated.")
@BUILD
@click.option(
    "--data",
    help="With --build: .npz with x_train, y_train, x_test, y_test, or a data set by name as "
    "for `sharpkit train`.",
)
@of_folders
@LOSS
@of_m_sharpness
@click.option(
    "--measures",
    default="m_sharpness",
    show_default=True,
    help='Names, comma-separated, or "all"; see docs/measures.md.',
)
@click.option("--task", "tasks", multiple=True, help="Only this task; may be repeated.")
@N
@click.option("--limit", type=int, help="Only the first models of each task.")
@SEED
@DEVICE
@of_workers("Models", limits=True)
@click.option(
    "--stack",
    type=int,
    help="Networks of one shape measured together, on a device that one leaves idle; that of the "
    "run, or one by one.",
)
@click.option(
    "--test-metrics",
    is_flag=True,
    help="Also calibration, and accuracy on blurred, noisy, pale and shifted test images.",
)
@click.pass_context
def score(
    context: click.Context,
    /,
    path: str | None,
    checkpoint: Sequence[str],
    measures: str,
    tasks: Sequence[str],
    build: str | None,
    data: str | None,
    table: str | None,
    columns: dict[str, str] | None,
    hyperparameters: list[str] | None,
    m: list[int],
    rho: list[float],
    ascent: Any,
    adaptive: bool,
    loss: Any,
    **options: Any,
) -> None:
    """Compute m-sharpness, or other measures, of every model of a zoo, or of checkpoints.

    PATH is a directory in the PGDL layout, the URL of one (such as s3://bucket/zoo, see
    docs/clusters.md), "embedded" for the zoo that ships with sharpkit, or the folder of a published
    zoo in another format (docs/guides/zoo-formats.md). With --table, --build and --data it is a
    pattern of checkpoints (.safetensors, or tensors saved by torch), whose hyperparameters and
    accuracies the table tells. In its place, --checkpoint takes such files with --build and --data,
    or runs of `sharpkit train`, which need neither; their accuracies are computed, and they are
    scored in one process.

    Results are saved one by one in --out; the same command resumes a stopped run. A model that
    fails, hangs or crashes does not stop the others; the exit code is then 1.

    \b
    Example:
      sharpkit score public_data --task task1_v4 --out runs/task1 --m 1,16,256 --rho 0.05 --n 2000
      sharpkit score "ckpts/*.pt" --table runs.csv --build nets:resnet --data cifar10 --out runs/c
      sharpkit score --checkpoint sgd.pt --checkpoint sam.pt --build nets:resnet20 \\
          --data cifar.npz --out runs/own
    """
    from sharpkit.measures import MSharpness
    from sharpkit.runs import choosing

    if (path is None) == (not checkpoint):
        raise click.UsageError("give either the PATH of a zoo, or --checkpoint")
    of_table: dict[str, Any] = {
        "table": table,
        "columns": columns,
        "hyperparameters": hyperparameters,
    }
    _check_table(path, build or data, of_table)
    m_sharpness = MSharpness(m=m, rho=rho, ascent=ascent, adaptive=adaptive, loss=loss)
    if path is None:
        given = _without_options_of_zoos(context, options)
        scores = choosing.score_checkpoints(checkpoint, build, data, measures, m_sharpness, **given)
    else:
        zoo = zoo_at(path, build=build, data=data, **of_table)
        scores = choosing.score_tasks(zoo, tasks, measures, m_sharpness, **options)
    _finish(scores, options["out"])


def _check_table(path: str | None, of_files: str | None, of_table: dict[str, Any]) -> None:
    """An option that would have no effect is an error."""
    given = [name for name, value in of_table.items() if value is not None]
    if path is None and given:
        raise click.UsageError("--checkpoint computes accuracies: give PATH with --table instead")
    if path is not None and of_table["table"] is None and (of_files or given):
        raise click.UsageError(
            "--build, --data, --column and --hyperparameters are for checkpoints: give --table "
            "with a row for each, or --checkpoint, whose accuracies are computed"
        )


def _without_options_of_zoos(context: click.Context, options: dict[str, Any]) -> dict[str, Any]:
    """An option that would have no effect is an error."""
    for name in _OF_ZOOS:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = "task" if name == "tasks" else name
            raise click.UsageError(f"--{option} is for zoos: leave it out with --checkpoint")
    return {name: value for name, value in options.items() if name not in _OF_ZOOS}


def _finish(scores: Scores, out: Path) -> None:
    say(f"{scores.frame()['model'].nunique()} models scored: {out / 'scores.csv'}")
    failures = scores.failures
    for row in failures.itertuples():
        say(f"failed: {row.task} model {row.model}, {row.measure}: {row.error}", err=True)
    if len(failures):
        say(f"error: {len(failures)} models failed; the others are scored", err=True)
        sys.exit(1)
