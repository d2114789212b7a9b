"""`sharpkit zoo`: look into, download, convert and train zoos."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from sharpkit.cli.options import BUILD, DATA, DEVICE, of_folders, of_workers, zoo_at
from sharpkit.cli.shell import exit_if_any, say, say_table
from sharpkit.files import write_csv

if TYPE_CHECKING:
    from sharpkit.workers import Workers


@click.group()
def zoo() -> None:
    """Look into, check, download, convert and train zoos of networks."""


def _accuracies(context: click.Context, option: click.Parameter, value: str) -> int | None:
    """A number from 0, or None for "all"."""
    if value == "all":
        return None
    if not value.isdecimal():
        raise click.BadParameter(f'{value!r} is not a number, or "all"')
    return int(value)


@zoo.command()
@click.argument("path")
@click.option("--deep", is_flag=True, help="Load every model and read every data shard.")
@click.option(
    "--accuracies",
    default="3",
    show_default=True,
    callback=_accuracies,
    help="Of a zoo without images: networks of each task whose test accuracy is computed again on "
    'yours; "all" for every one.',
)
@click.option("--csv", type=click.Path(path_type=Path), help="Write the table here as well.")
@BUILD
@click.option("--data", help="With --table and --deep: as for `sharpkit score`.")
@of_folders
def info(path: str, deep: bool, accuracies: int | None, csv: Path | None, **of_folder: Any) -> None:
    """List tasks, models, layers, parameters and gaps of the zoo at PATH; check every file.

    PATH is a directory in the PGDL layout, the URL of one (such as s3://bucket/zoo, see
    docs/clusters.md), "embedded" for the zoo that ships with sharpkit, or the folder of a zoo in
    another format (docs/guides/zoo-formats.md); with --table and --build, a pattern of checkpoints.

    \b
    Example:
      sharpkit zoo info public_data --deep --csv models.csv
      sharpkit zoo info smallcnnzoo --accuracies all
      sharpkit zoo info "ckpts/*.pt" --table runs.csv --build nets:resnet
    """
    from sharpkit.zoo import zoo_info

    # given the path, it reports also what keeps the zoo from loading
    by_path = path != "embedded" and not any(of_folder.values())
    opened = path if by_path else zoo_at(path, **of_folder)
    table = zoo_info(opened, deep=deep, accuracies=accuracies)
    if csv is not None:
        write_csv(table, csv)
    say_table(table, ".4f")
    bad = int(table["problem"].astype(bool).sum())
    say(f"{len(table)} rows, {bad} with problems")
    if bad:
        sys.exit(1)


LAYOUT = click.option(
    "--layout",
    default="pgdl",
    show_default=True,
    type=click.Choice(["pgdl", "stacked"]),
    help="A directory per model, or files of many models of one shape, for thousands of them.",
)


@zoo.command()
@click.argument("path")
@click.option("--to", required=True, type=click.Path(path_type=Path), help="The new zoo's root.")
@LAYOUT
def convert(path: str, to: Path, layout: Literal["pgdl", "stacked"]) -> None:
    """Write the zoo at PATH, as of `zoo info`, in another layout; no bit of a model changes.

    \b
    Example:
      sharpkit zoo convert big_zoo --layout stacked --to big_zoo_stacked
    """
    from sharpkit.zoo import write_zoo

    found = zoo_at(path)
    write_zoo(found, to, layout=layout)
    say(f"{to}: {sum(map(len, found.values()))} models of {len(found)} tasks written")


@zoo.command()
@click.argument("name", type=click.Choice(["public", "phase-one", "phase-two"]))
@click.option("--to", type=click.Path(path_type=Path), help="Target folder.")
def fetch(name: str, to: Path | None) -> None:
    """Download and unpack one of the competition's archives; a broken download is resumed.

    \b
    Example:
      sharpkit zoo fetch public --to data/
    """
    from sharpkit.zoo import fetch_zoo

    say(fetch_zoo(name, to))


def _stack(context: click.Context, option: click.Parameter, value: str) -> Any:
    """A number, "auto", or None for "none"."""
    if value in ("auto", "none"):
        return None if value == "none" else value
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f'{value!r} is not a number, "auto" or "none"') from None


@zoo.command()
@click.argument("grid")
@click.option("--out", type=click.Path(path_type=Path), help="The zoo's root.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Time an epoch of each shape of network, tell what all would cost, and write nothing.",
)
@DATA
@of_workers("Models")
@click.option("--limit", type=int, help="Only the first models of the grid.")
@DEVICE
@click.option(
    "--stack",
    default="none",
    show_default=True,
    callback=_stack,
    help='Networks of one shape that train together: a number; "none" for one by one; "auto" for '
    "stacks on a GPU and none on a CPU.",
)
@LAYOUT
def train(
    grid: str,
    out: Path | None,
    dry_run: bool,
    data: str | None,
    workers: Workers,
    layout: Literal["pgdl", "stacked"],
    **options: Any,
) -> None:
    """Train one model for every setting of GRID and write them as a zoo.

    GRID is a TOML file, or a preset: "mini" (the zoo that ships with sharpkit), "medium" (576
    networks on its data), "task1", "task2" or "task8" (the competition's grids), "svhn-nin" or
    "cifar-nin" (reduced copies of its tasks 2 and 9). The same command resumes a stopped run. The
    exit code is 1 if a model failed.

    \b
    Example:
      sharpkit zoo train mini --dry-run
      sharpkit zoo train mini --data /usr/share/datasets/fashion-mnist --workers 2 --out zoo
    """
    from sharpkit.zoo_training.cost import training_cost
    from sharpkit.zoo_training.grid_file import read_plan
    from sharpkit.zoo_training.zoo import train_plan

    if dry_run:
        cost = training_cost(grid, data=data, **options)
        say_table(cost.frame())
        say(cost.total)
        if (count := workers.count or 1) > 1:
            say(f"{count} workers, on a core or GPU each: {cost.hours_at_most / count:.2g} hours")
        return
    if out is None:
        raise click.UsageError(
            "--out is missing: where to write the zoo, or --dry-run for its cost"
        )
    report = train_plan(read_plan(grid), out, data, workers=workers, layout=layout, **options)
    say(
        f"{report.path}: {len(report.trained)} models trained, {len(report.skipped)} were there, "
        f"{len(report.failed)} failed"
    )
    exit_if_any({f"model {i}": reason for i, reason in report.failed.items()})
