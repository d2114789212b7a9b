"""The command line: a thin shell over the library's functions, one file per group of commands."""

from __future__ import annotations

import click

from sharpkit.cli.figure3 import figure3
from sharpkit.cli.landscape import barrier, landscape
from sharpkit.cli.results import evaluate, export, plot, report
from sharpkit.cli.score import score
from sharpkit.cli.sharpness import sharpness
from sharpkit.cli.shell import Shell
from sharpkit.cli.spectrum import spectrum
from sharpkit.cli.train import train
from sharpkit.cli.zoo import zoo


@click.group(cls=Shell, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sharpkit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Measure why trained networks generalize.

    \b
    Example:
      sharpkit score embedded --out runs/first --m 1,4,16,64,256 --rho 0.1
      sharpkit plot runs/first
    """


for command in (
    *(zoo, score, sharpness, landscape, barrier, export, evaluate, plot, report, spectrum, train),
    figure3,
):
    main.add_command(command)
