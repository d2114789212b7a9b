"""`sharpkit landscape` and `sharpkit barrier`: the loss around models and between them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from sharpkit.cli.options import BUILD, DEVICE, LOSS, SEED, N, Numbers
from sharpkit.cli.shell import say
from sharpkit.files import write_csv

_DATA = click.option("--data", help="An .npz file with x_train and y_train, for --build.")
_BATCH_NORM = click.option(
    "--batch-norm",
    default="stored",
    show_default=True,
    type=click.Choice(["stored", "recomputed"]),
    help="Running statistics as they are (between models their means), or of the data at each "
    "point.",
)


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="The picture; its numbers (.csv) and the page (.html) are written beside it.",
)
@BUILD
@_DATA
@LOSS
@click.option(
    "--directions",
    type=click.Choice(["random", "eigenvectors", "trajectory"]),
    help="Around one model; of --trajectory if it is given, else random.",
)
@click.option("--trajectory", multiple=True, help="A checkpoint on the way; may be repeated.")
@click.option(
    "--dimensions", type=click.IntRange(1, 2), help="By default 1 for two models, else 2."
)
@click.option("--points", type=Numbers(int), help="Along each axis: 51, or 51,31.")
@click.option("--extent", type=Numbers(float), help="E for −E to E; LOW,HIGH; or both of each.")
@click.option(
    "--normalise",
    default="filter",
    show_default=True,
    type=click.Choice(["filter", "layer"]),
    help="Of random directions.",
)
@click.option("--biases", is_flag=True, help="Move biases along random directions as well.")
@click.option("--norms", is_flag=True, help="Move the parameters of normalisation layers as well.")
@_BATCH_NORM
@click.option(
    "--kind", type=click.Choice(["contour", "surface"]), help="Of the picture of a plane."
)
@click.option("--page/--no-page", default=True, help="Whether to write the interactive page.")
@N
@SEED
@DEVICE
def landscape(
    models: Sequence[str],
    out: Path,
    points: list[int] | None,
    extent: list[float] | None,
    kind: Any,
    page: bool,
    **options: Any,
) -> None:
    """The loss landscape around a model, on the line to another, or in the plane through three.

    MODELS are weight files (.safetensors, or tensors saved by torch) with --build and --data, or
    runs of `sharpkit train`, which need neither. Around one model the axes are random directions
    with filter normalisation, eigenvectors of the Hessian, or the components of a trajectory. The
    page needs plotly: pip install 'sharpkit[report]'.

    \b
    Example:
      sharpkit landscape runs/sam16 --points 51 --n 1000 --out sam16.png
      sharpkit landscape sgd.pt sam.pt --build nets:resnet20 --data cifar.npz --out line.png
    """
    from sharpkit.plot.canvas import picture_path
    from sharpkit.report.landscape_page import write_landscape
    from sharpkit.report.page import require_extra
    from sharpkit.runs.landscape import extent_of, landscape_of_files, points_of

    path = picture_path(out)
    if page:
        require_extra("the page of a landscape (leave it out with --no-page)")
    result = landscape_of_files(
        models, points=points_of(points), extent=extent_of(extent), **options
    )
    result.plot(path, kind=kind)
    say(f"{result}\n{path} and {path.with_suffix('.csv')}")
    if page:
        command = shlex.join(["sharpkit", *sys.argv[1:]])
        title = ", ".join(Path(model).stem for model in models)
        say(write_landscape(result, path.with_suffix(".html"), title=title, command=command))


@click.command()
@click.argument("models", nargs=2, required=True)
@BUILD
@_DATA
@LOSS
@click.option("--points", default=25, show_default=True, help="On the line, both ends included.")
@_BATCH_NORM
@N
@SEED
@DEVICE
@click.option("--out", type=click.Path(path_type=Path), help="Write the curve as CSV.")
def barrier(models: Sequence[str], out: Path | None, **options: Any) -> None:
    """How far the loss rises on the line between two models, with an interval.

    MODELS are as for `sharpkit landscape`. Their units are compared in the order they have.

    \b
    Example:
      sharpkit barrier runs/seed0 runs/seed1 --n 2000 --batch-norm recomputed
    """
    from sharpkit.runs.landscape import barrier_of_files

    result = barrier_of_files(models, **options)
    say(result)
    if out is not None:
        write_csv(result.frame(), out)
