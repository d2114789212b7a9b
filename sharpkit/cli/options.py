"""Options that several commands have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

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


def zoo_at(path: str, table: str | None = None, **of_folder: Any) -> Zoo:
    """The zoo at a path or URL, "embedded" for the one that ships with sharpkit, or a folder's.

    Args:
        path: Where it is; with a table, a pattern of checkpoints.
        table: Of a folder of checkpoints.
        of_folder: build, data, columns and hyperparameters, as `of_folders` gives them.
    """
    if path == "embedded" and table is None:
        from sharpkit.zoo.embedded import embedded_zoo

        return embedded_zoo()
    from sharpkit.runs.choosing import opened_zoo

    return opened_zoo(path, table=table, **of_folder)


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
    "`sharpkit train` with an --arch of your own. With --table, its parameters are columns.",
)
LOSS = click.option(
    "--loss",
    default="cross_entropy",
    show_default=True,
    callback=_loss,
    help='"cross_entropy", "mse", or module:callable for (outputs, labels) -> mean loss.',
)


def _columns(context: click.Context, option: click.Parameter, given: tuple[str, ...]) -> Any:
    """What is in which column, from ROLE=NAME."""
    named = dict(text.partition("=")[::2] for text in given)
    if not all(role and name for role, name in named.items()):
        raise click.BadParameter("expected ROLE=NAME, such as test_acc=accuracy")
    return named or None


def _names(context: click.Context, option: click.Parameter, given: str | None) -> Any:
    return None if given is None else [name.strip() for name in given.split(",") if name.strip()]


def of_folders(command: _Command) -> _Command:
    """What makes a zoo of a folder of checkpoints, beside BUILD and the data."""
    for option in (
        click.option(
            "--hyperparameters",
            callback=_names,
            help="Columns that were varied, comma-separated; all that fit by default.",
        ),
        click.option(
            "--column",
            "columns",
            multiple=True,
            callback=_columns,
            help="ROLE=NAME: the column of the path, of initial weights, or of a metric such as "
            "test_acc, where it is not recognised; may be repeated.",
        ),
        click.option(
            "--table",
            help="CSV with a row for each checkpoint of PATH, a pattern in quotes: file, "
            "hyperparameters, accuracies; also an export of wandb or MLflow.",
        ),
    ):
        command = option(command)
    return command


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


def of_workers(what: str, *, limits: bool = False) -> Callable[[_Command], _Command]:
    """Who computes several of `what`, given to the command as one `workers`.

    Args:
        what: For the help.
        limits: Whether one of them may be limited: in threads, seconds and memory; then they are in
            worker processes unless --backend says otherwise.
    """

    def options(command: _Command) -> _Command:
        @functools.wraps(command)
        def with_workers(*arguments: Any, **options: Any) -> Any:
            from sharpkit.workers import Workers

            memory = options.pop("memory", None)
            return command(
                *arguments,
                workers=Workers(
                    options.pop("workers"),
                    backend=options.pop("backend"),
                    threads=options.pop("threads", None),
                    timeout=options.pop("timeout", None),
                    memory=None if memory is None else int(memory * 2**30),
                    address=options.pop("address"),
                ),
                **options,
            )

        for option in (*(_LIMITS if limits else ()), _ADDRESS, *_workers(what, limits)):
            with_workers = option(with_workers)
        return cast("_Command", with_workers)

    return options


_ADDRESS = click.option(
    "--address", help='Of the Ray cluster, such as "auto"; by default, one is started.'
)
_LIMITS = (
    click.option("--memory", type=float, help="GiB that one model may take."),
    click.option("--timeout", type=float, help="Seconds that one model may take per measure."),
    click.option("--threads", type=int, help="CPU threads per model; those of the run, or 1."),
)


def _workers(what: str, limits: bool) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    places = click.Choice(["processes", "inline", "ray"])
    if limits:
        return (
            click.option(
                "--workers", type=int, help=f"{what} at a time; one per core or GPU by default."
            ),
            click.option(
                "--backend",
                default="processes",
                show_default=True,
                type=places,
                help="Worker processes, this process, or a Ray cluster; the results are the same.",
            ),
        )
    return (
        click.option(
            "--backend",
            type=places,
            help="Worker processes, this process, or a Ray cluster whose nodes share the disk of "
            "--out; by default, this process for one worker and worker processes for more.",
        ),
        click.option("--workers", default=1, show_default=True, help=f"{what} at a time."),
    )


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
