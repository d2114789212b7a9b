"""`sharpkit sharpness`: m-sharpness of one model, or of two side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from sharpkit.cli.options import BUILD, DEVICE, LOSS, N, of_m_sharpness
from sharpkit.cli.shell import say, say_table
from sharpkit.files import write_csv


@click.command()
@click.argument("models", nargs=-1, required=True)
@BUILD
@click.option("--data", help="An .npz file with x_train and y_train, for --build.")
@LOSS
@of_m_sharpness
@N
@click.option("--seed", default=0, show_default=True, help="Of the order of the examples.")
@DEVICE
@click.option("--out", type=click.Path(path_type=Path), help="Write the table as CSV as well.")
def sharpness(
    models: Sequence[str],
    build: str | None,
    data: str | None,
    device: str,
    out: Path | None,
    **options: Any,
) -> None:
    """The m-sharpness of one model or several; of two, their paired difference as well.

    MODELS are weight files (.safetensors, or tensors saved by torch) with --build and --data, or
    runs of `sharpkit train`, which need neither.

    \b
    Example:
      sharpkit sharpness runs/sam16 --m 1,16,128 --rho 0.05
      sharpkit sharpness sgd.pt sam.pt --build nets:resnet20 --data cifar.npz --m 1 --rho 0.05,0.1
    """
    from sharpkit.device import check_device
    from sharpkit.runs.choosing import checkpoint_models
    from sharpkit.sharpness.comparison import sharpness_table

    check_device(device)
    loaded, train = checkpoint_models(models, build, data)
    networks = {name: load().to(device) for name, load in loaded.items()}
    table, compared = sharpness_table(networks, train, **options)
    say_table(table)
    if compared is not None:
        say(f"\n{compared}")
    if out is not None:
        write_csv(table, out)
