"""`sharpkit train`: one network with SGD or SAM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sharpkit.cli.options import DEVICE, OUT, Numbers
from sharpkit.cli.shell import say


@click.command()
@click.argument("data")
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    help="Folder with the files of fashion-mnist, cifar10, cifar100 or svhn.",
)
@click.option("--arch", default="vgg-32x2", show_default=True, help="Name, or module:callable.")
@OUT
@click.option("--optimizer", default="sgd", show_default=True, type=click.Choice(["sgd", "sam"]))
@click.option("--m", type=int, help="SAM's group size; the batch by default.")
@click.option("--rho", type=float, help="SAM's radius; 0.05 by default.")
@click.option("--adaptive", is_flag=True, help="SAM's perturbation in units of |w|.")
@click.option("--sam-interval", default=1, show_default=True, help="SAM in every so-many-th step.")
@click.option(
    "--sam-start", default=0.0, show_default=True, help="SAM from this part of the training on."
)
@click.option("--sam-stop", default=1.0, show_default=True, help="SAM up to this part.")
@click.option(
    "--sam-parameters",
    default="*",
    show_default=True,
    help='SAM of these only: "norm", or names and patterns such as "*.bias,0.*".',
)
@click.option(
    "--rho-schedule",
    default="constant",
    show_default=True,
    type=click.Choice(["constant", "cosine", "linear", "step"]),
    help="Of the radius, from --sam-start to --sam-stop.",
)
@click.option(
    "--rho-warmup",
    default=0.0,
    show_default=True,
    help="The part of them in which it rises from 0.",
)
@click.option("--compile", is_flag=True, help="Compile the passes of m-SAM over its groups.")
@click.option("--epochs", required=True, type=int)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--lr", default=0.1, show_default=True, help="Learning rate of the first step.")
@click.option("--momentum", default=0.9, show_default=True)
@click.option("--weight-decay", default=5e-4, show_default=True)
@click.option(
    "--schedule",
    default="cosine",
    show_default=True,
    type=click.Choice(["cosine", "linear", "step", "constant"]),
)
@click.option("--augmentation", type=click.Choice(["flip", "crop", "flip-crop"]))
@click.option("--label-noise", default=0.0, show_default=True, help="Fraction of wrong labels.")
@click.option("--stop-at-loss", type=float, help="Stop at this loss on the training set.")
@click.option("--keep", type=Numbers(int), help="Epochs whose weights are kept, such as 0,10.")
@click.option("--evaluate-every", default=1, show_default=True, help="Epochs.")
@click.option("--tensorboard", is_flag=True, help="Log to OUT/tensorboard as well.")
@click.option("--track", help="Measure while training: loss,stability,trace, ... (see below).")
@click.option("--track-every", default=100, show_default=True, help="Steps.")
@click.option("--track-examples", default=512, show_default=True, help="Measured; 0 for all.")
@click.option("--track-budget", type=float, help="Share of the training time, such as 0.05.")
@click.option("--seed", default=0, show_default=True, help="Of initial weights and training.")
@DEVICE
def train(data: str, root: Path | None, arch: str, out: Path, **options: Any) -> None:
    """Train a network on DATA with SGD or SAM; the same command goes on with a stopped training.

    DATA is "embedded", "fashion-mnist", "cifar10", "cifar100", "svhn", an .npz file with x_train,
    y_train, x_test and y_test, a folder or .zip of images train/<class>/*.jpg and
    test/<class>/*.jpg, or ZOO:TASK for the data of a task of a zoo.

    --arch is vgg-WIDTHxBLOCKS, nin-WIDTHxBLOCKS (either with -bn), resnetDEPTH,
    wrn-DEPTH-WIDTH (or with -nobn), or module:callable.

    --track takes loss, stability (λmax and the optimizer's threshold), lambda_max, trace,
    critical_sharpness, distance, or a function of `sharpkit.measures`, and writes OUT/tracking.csv.

    Writes OUT/log.csv, config.json, model.safetensors and epoch-K.safetensors for --keep;
    `sharpkit spectrum --checkpoint OUT/model.safetensors` reads them.

    \b
    Example:
      sharpkit train cifar10 --arch resnet20 --optimizer sam --m 16 --rho 0.05 \\
          --augmentation flip-crop --epochs 50 --out runs/sam16
      torchrun --nproc-per-node 2 -m sharpkit train embedded --epochs 20 --out runs/two
    """
    from sharpkit.runs.trained import train_named
    from sharpkit.training.parallel import Ranks, process_group

    with process_group(options.pop("device")) as device:
        result = train_named(data, root, arch, out=out, device=device, **options)
        if Ranks.current().rank:
            return
    last = result.history.iloc[-1]
    accuracies = ", ".join(f"{100 * last[f'{s}_accuracy']:.2f} % {s}" for s in ("train", "test"))
    say(f"{out / 'model.safetensors'}: accuracy {accuracies}")
