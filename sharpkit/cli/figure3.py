"""`sharpkit figure3`: the three panels of the SAM paper's Figure 3."""

from __future__ import annotations

from typing import Any

import click

from sharpkit.cli.options import DATA, DEVICE, OUT, of_workers
from sharpkit.cli.shell import exit_if_any, say


@click.command()
@click.option(
    "--preset", required=True, help='"mini", "fashion", "cifar10", "paper", or a .toml file.'
)
@OUT
@click.option("--panels", default="left,middle,right", show_default=True, help="Some of them.")
@DATA
@click.option("--zoo", help="Another zoo for the right panel.")
@click.option("--build", help="The file's architecture once more, if it is a module:callable.")
@of_workers("Work items")
@DEVICE
def figure3(preset: str, panels: str, **options: Any) -> None:
    """The three panels of the SAM paper's Figure 3: spectra, test error of m-SAM, predictive power.

    Trains with SGD and m-SAM, measures Hessian spectra on the way, scores a zoo, and writes
    --out/figure3.png with its tables as CSV. The same command goes on where it stopped. Presets:
    "mini" takes 13 minutes on two cores, "fashion" and "cifar10" hours, "paper" is the paper's own
    setting. The exit code is 1 if a training, a spectrum or a model failed.

    \b
    Example:
      sharpkit figure3 --preset mini --workers 2 --out runs/mini
      sharpkit figure3 --preset mini --panels right --out runs/mini
    """
    from sharpkit.runs.figure3 import figure3 as draw

    result = draw(preset, panels=panels.split(","), **options)
    say(f"{result.picture} and tables beside it")
    exit_if_any(result.failures)
