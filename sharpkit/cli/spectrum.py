"""`sharpkit spectrum`: Hessian spectral density of models, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from sharpkit.cli.options import BUILD, DEVICE, OUT, SEED, N, zoo_at
from sharpkit.cli.shell import exit_if_any, say, say_table


@click.command()
@click.argument("path", required=False)
@OUT
@click.option("--task", help="The task, where the zoo has several.")
@click.option("--model", "ids", multiple=True, help="A model of the zoo; may be repeated.")
@click.option("--weights", default="final", type=click.Choice(["final", "initial"]))
@click.option("--checkpoint", multiple=True, help="A weight file; may be repeated.")
@BUILD
@click.option(
    "--data",
    help="An .npz file with x_train and y_train, for --checkpoint with --build; images of bytes "
    "need x_test and y_test too, as for `sharpkit train`.",
)
@click.option("--steps", default=80, show_default=True, help="Lanczos steps.")
@click.option("--probes", default=4, show_default=True, help="Random start vectors.")
@N
@click.option("--parameters", multiple=True, help='Name or pattern such as "*.weight".')
@click.option("--grid", default="linear", type=click.Choice(["linear", "log", "symlog"]))
@SEED
@DEVICE
def spectrum(
    path: str | None,
    out: Path,
    task: str | None,
    ids: Sequence[str],
    weights: Any,
    checkpoint: Sequence[str],
    build: str | None,
    data: str | None,
    parameters: Sequence[str],
    **options: Any,
) -> None:
    """Hessian spectral density of models of the zoo at PATH, or of checkpoints, side by side.

    Writes --out/spectrum.png, density.csv, nodes.csv and summary.json; the same command resumes.

    \b
    Example:
      sharpkit spectrum embedded --model 0 --model 5 --out runs/spectra
      sharpkit spectrum --checkpoint sgd.safetensors --checkpoint sam.safetensors \\
          --build mymodels:resnet20 --data cifar.npz --out runs/sgd_and_sam
    """
    from sharpkit.runs import choosing
    from sharpkit.runs.spectrum import spectrum as measure

    if (path is None) == (not checkpoint):
        raise click.UsageError("give either a zoo PATH with --model, or --checkpoint with --build")
    if path is not None:
        models, examples = choosing.zoo_models(zoo_at(path), task, ids, weights)
    else:
        models, examples = choosing.checkpoint_models(checkpoint, build, data)
    spectra = measure(models, examples, out, parameters=list(parameters) or None, **options)
    say_table(spectra.frame())
    say(out / "spectrum.png")
    exit_if_any(spectra.failures)
