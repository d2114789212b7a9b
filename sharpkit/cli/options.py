"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from sharpkit.contract.losses import Loss
    from sharpkit.zoo import Zoo

_Command = TypeVar("_Command", bound=Callable[..., Any])


class Numbers(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.1
    """Comma-separated numbers, such as 1,4,16."""

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind, self.name = kind, f"{kind.__name__}s"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int] | list[float]:
        """The numbers of the text."""
        if isinstance(value, list):
            return value
        try:
            return [self.kind(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a comma-separated list of {self.name}", param, ctx)


def _loss(context: click.Context, option: click.Parameter, name: str) -> Loss:
    """A loss by its name, or a callable as "module:callable"."""
    if ":" not in name:
        return name
    from sharpkit.importing import import_callable

    loss: Loss = import_callable(name)
    return loss


def zoo_at(path: str) -> Zoo:
    """The zoo at a path or URL, or the one that ships with sharpkit as "embedded"."""
    if path == "embedded":
        from sharpkit.zoo.embedded import embedded_zoo

        return embedded_zoo()
    from sharpkit.zoo import load_zoo

    return load_zoo(path)


RUN = click.argument("run", type=click.Path(path_type=Path))
OUT = click.option("--out", required=True, type=click.Path(path_type=Path), help="Run directory.")
SEED = click.option("--seed", default=0, show_default=True)
N = click.option("--n", type=int, help="Training examples used; all by default.")
DATA = click.option(
    "--data",
    help="Folder with the data set's files; or another data set, as DATA of `sharpkit train`.",
)
DEVICE = click.option(
    "--device", default="cpu", show_default=True, help='"cpu", "cuda", "cuda:1", ...'
)
BUILD = click.option(
    "--build",
    help='"module:callable" that builds the model of checkpoints from elsewhere, or of a run of '
    "`sharpkit train` with an --arch of your own.",
)
LOSS = click.option(
    "--loss",
    default="cross_entropy",
    show_default=True,
    callback=_loss,
    help='"cross_entropy", "mse", or module:callable for (outputs, labels) -> mean loss.',
)
ADDRESS = click.option(
    "--address", help='Of the Ray cluster, such as "auto"; by default, one is started.'
)


def of_m_sharpness(command: _Command) -> _Command:
    """The settings of m-sharpness."""
    for option in (
        click.option("--adaptive", is_flag=True, help="Perturbations in units of |w|."),
        click.option(
            "--ascent", default="one_step", type=click.Choice(["one_step", "pgd", "apgd"])
        ),
        click.option("--rho", default="0.05", show_default=True, type=Numbers(float)),
        click.option("--m", default="1,4,16,64,256", show_default=True, type=Numbers(int)),
    ):
        command = option(command)
    return command


def of_workers(what: str) -> Callable[[_Command], _Command]:
    """Where several of `what` are computed at a time."""

    def options(command: _Command) -> _Command:
        for option in (
            ADDRESS,
            click.option(
                "--backend",
                type=click.Choice(["processes", "inline", "ray"]),
                help="Worker processes, this process, or a Ray cluster whose nodes share the disk "
                "of --out; by default, this process for one worker and worker processes for more.",
            ),
            click.option("--workers", default=1, show_default=True, help=f"{what} at a time."),
        ):
            command = option(command)
        return command

    return options


def of_evaluation(command: _Command) -> _Command:
    """How a run is evaluated."""
    for option in (
        click.option(
            "--test-size",
            type=int,
            help="Examples behind each test accuracy, to weight the sign-errors.",
        ),
        SEED,
        click.option(
            "--resamples",
            default=1000,
            show_default=True,
            help="Bootstrap resamples over models; fewer for more than 512, as the table says.",
        ),
    ):
        command = option(command)
    return command
