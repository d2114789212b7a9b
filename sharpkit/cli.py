"""The command line: a thin shell over the library's functions."""

from __future__ import annotations

import os
import sqlite3
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sharpkit.errors import SharpkitError
from sharpkit.evaluation import STATISTICS
from sharpkit.files import write_csv
from sharpkit.safe_text import printable

if TYPE_CHECKING:
    from sharpkit.measures import Measure, MSharpness
    from sharpkit.runs import Scores
    from sharpkit.zoo import PgdlTask, Zoo


class _Numbers(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.1
    """Comma-separated numbers, such as 1,4,16."""

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind, self.name = kind, f"{kind.__name__}s"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int] | list[float]:
        if isinstance(value, list):
            return value
        try:
            return [self.kind(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a comma-separated list of {self.name}", param, ctx)


class _Group(click.Group):
    """Prints one line that tells what to do instead of a traceback; --debug shows it."""

    def invoke(self, ctx: click.Context) -> Any:
        warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}", err=True)
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # whoever reads, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except (SharpkitError, OSError, sqlite3.Error) as error:
            if ctx.params.get("debug"):
                raise
            _say(f"error: {error}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            _say("\nstopped: finished results are saved; the same command goes on", err=True)
            sys.exit(130)


def _say(text: object, *, err: bool = False) -> None:
    """Print a line; what names and messages from files might tell the terminal is spelled out."""
    click.echo(printable(str(text), keep="\n"), err=err)


_RUN = click.argument("run", type=click.Path(path_type=Path))
_RESAMPLES = click.option(
    "--resamples",
    default=1000,
    show_default=True,
    help="Bootstrap resamples over models; fewer for more than 512, as the table says.",
)

_DATA = click.option(
    "--data",
    help="Folder with the data set's files; or another data set, as DATA of `sharpkit train`.",
)
_DEVICE = click.option(
    "--device", default="cpu", show_default=True, help='"cpu", "cuda", "cuda:1", ...'
)
_BACKEND = click.option(
    "--backend",
    type=click.Choice(["processes", "inline", "ray"]),
    help="Worker processes, this process, or a Ray cluster whose nodes share the disk of --out; by "
    "default, this process for one worker and worker processes for more.",
)
_ADDRESS = click.option(
    "--address", help='Of the Ray cluster, such as "auto"; by default, one is started.'
)
_TEST_SIZE = click.option(
    "--test-size", type=int, help="Examples behind each test accuracy, to weight the sign-errors."
)


_BUILD = click.option(
    "--build",
    help='"module:callable" that builds the model of checkpoints from elsewhere, or of a run of '
    "`sharpkit train` with an --arch of your own.",
)
_LOSS = click.option(
    "--loss",
    default="cross_entropy",
    show_default=True,
    help='"cross_entropy", "mse", or module:callable for (outputs, labels) -> mean loss.',
)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sharpkit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Measure why trained networks generalize.

    \b
    Example:
      sharpkit score embedded --out runs/first --m 1,4,16,64,256 --rho 0.1
      sharpkit plot runs/first
    """


@main.group()
def zoo() -> None:
    """Look into, check and download zoos of trained models."""


@zoo.command()
@click.argument("path")
@click.option("--deep", is_flag=True, help="Load every model and read every data shard.")
@click.option("--csv", type=click.Path(path_type=Path), help="Write the table here as well.")
def info(path: str, deep: bool, csv: Path | None) -> None:
    """List tasks, models, layers, parameters and gaps of the zoo at PATH; check every file.

    PATH is a directory in the PGDL layout, the URL of one (such as s3://bucket/zoo, see
    docs/clusters.md), or "embedded" for the zoo that ships with sharpkit.

    \b
    Example:
      sharpkit zoo info public_data --deep --csv models.csv
    """
    from sharpkit.zoo import zoo_info

    # given the path, it reports also what keeps the zoo from loading
    table = zoo_info(_load(path) if path == "embedded" else path, deep=deep)
    if csv is not None:
        write_csv(table, csv)
    _say(table.to_string(index=False, float_format=lambda v: f"{v:.4f}"))
    bad = int(table["problem"].astype(bool).sum())
    _say(f"{len(table)} rows, {bad} with problems")
    if bad:
        sys.exit(1)


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

    _say(fetch_zoo(name, to))


@zoo.command("train")
@click.argument("grid")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The zoo's root.")
@_DATA
@click.option("--workers", default=1, show_default=True, help="Models at a time.")
@_BACKEND
@_ADDRESS
@click.option("--limit", type=int, help="Only the first models of the grid.")
@_DEVICE
def train_zoo_command(
    grid: str,
    out: Path,
    data: str | None,
    workers: int,
    backend: Any,
    address: str | None,
    limit: int | None,
    device: str,
) -> None:
    """Train one model for every setting of GRID and write them as a zoo in the PGDL layout.

    GRID is a TOML file, or a preset: "mini" (the zoo that ships with sharpkit), "task1", "task2" or
    "task8" (the competition's grids). The same command resumes a stopped run. The exit code is 1
    if a model failed.

    \b
    Example:
      sharpkit zoo train mini --data /usr/share/datasets/fashion-mnist --workers 2 --out zoo
    """
    from dataclasses import replace

    from sharpkit.zoo_training.grid_file import read_plan
    from sharpkit.zoo_training.zoo import train_zoo

    plan = read_plan(grid)
    if data is not None:
        plan = replace(plan, data=plan.data.at(data))
    report = train_zoo(
        plan.grid,
        *plan.load_data(),
        out,
        task=plan.task,
        recipe=plan.recipe,
        seed=plan.seed,
        shipped_test=plan.shipped_test,
        limit=limit,
        workers=workers,
        backend=backend,
        address=address,
        device=_device(device),
    )
    _say(
        f"{report.path}: {len(report.trained)} models trained, {len(report.skipped)} were there, "
        f"{len(report.failed)} failed"
    )
    _exit_if_any({f"model {i}": reason for i, reason in report.failed.items()})


@main.command()
@click.argument("path", required=False)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run directory.")
@click.option("--checkpoint", multiple=True, help="Instead of PATH; may be repeated.")
@_BUILD
@click.option(
    "--data", help="For --checkpoint with --build: .npz with x_train, y_train, x_test, y_test."
)
@_LOSS
@click.option("--m", default="1,4,16,64,256", show_default=True, type=_Numbers(int))
@click.option("--rho", default="0.05", show_default=True, type=_Numbers(float))
@click.option("--ascent", default="one_step", type=click.Choice(["one_step", "pgd", "apgd"]))
@click.option("--adaptive", is_flag=True, help="Perturbations in units of |w|.")
@click.option(
    "--measures",
    "names",
    default="m_sharpness",
    show_default=True,
    help='Names, comma-separated, or "all"; see docs/measures.md.',
)
@click.option("--task", "tasks", multiple=True, help="Only this task; may be repeated.")
@click.option("--n", type=int, help="Training examples used; all by default.")
@click.option("--limit", type=int, help="Only the first models of each task.")
@click.option("--seed", default=0, show_default=True)
@_DEVICE
@click.option(
    "--backend",
    default="processes",
    show_default=True,
    type=click.Choice(["processes", "inline", "ray"]),
    help="Worker processes, this process, or a Ray cluster; the results are the same.",
)
@click.option("--workers", type=int, help="Models at a time; one per core or GPU by default.")
@click.option("--threads", type=int, help="CPU threads per model; those of the run, or 1.")
@click.option("--timeout", type=float, help="Seconds that one model may take per measure.")
@click.option("--memory", type=float, help="GiB that one model may take.")
@click.option(
    "--test-metrics",
    is_flag=True,
    help="Also calibration, and accuracy on blurred, noisy, pale and shifted test images.",
)
@_ADDRESS
@click.pass_context
def score(
    context: click.Context,
    path: str | None,
    out: Path,
    checkpoint: Sequence[str],
    build: str | None,
    data: str | None,
    loss: str,
    m: list[int],
    rho: list[float],
    ascent: Any,
    adaptive: bool,
    names: str,
    tasks: Sequence[str],
    n: int | None,
    limit: int | None,
    seed: int,
    device: str,
    backend: Any,
    workers: int | None,
    threads: int | None,
    timeout: float | None,
    memory: float | None,
    test_metrics: bool,
    address: str | None,
) -> None:
    """Compute m-sharpness, or other measures, of every model of a zoo, or of checkpoints.

    PATH is a directory in the PGDL layout, the URL of one (such as s3://bucket/zoo, see
    docs/clusters.md), or "embedded" for the zoo that ships with sharpkit. In its place,
    --checkpoint takes weight files (.safetensors, or tensors saved by torch) with --build and
    --data, or runs of `sharpkit train`, which need neither; they are scored in one process.

    Results are saved one by one in --out; the same command resumes a stopped run. A model that
    fails, hangs or crashes does not stop the others; the exit code is then 1.

    \b
    Example:
      sharpkit score public_data --task task1_v4 --out runs/task1 --m 1,16,256 --rho 0.05 --n 2000
      sharpkit score --checkpoint sgd.pt --checkpoint sam.pt --build nets:resnet20 \\
          --data cifar.npz --out runs/own
    """
    from sharpkit.measures import MSharpness
    from sharpkit.runs import score_zoo

    if (path is None) == (not checkpoint):
        raise click.UsageError("give either the PATH of a zoo, or --checkpoint")
    m_sharpness = MSharpness(m=m, rho=rho, ascent=ascent, adaptive=adaptive, loss=_loss(loss))
    if path is None:
        _refuse_options_of_zoos(context)
        scores = _score_checkpoints(
            checkpoint, build, data, names, m_sharpness, out, n, seed, _device(device), test_metrics
        )
        _finish_score(scores, out)
        return
    chosen = _load(path)
    unknown = set(tasks) - set(chosen)
    if unknown:
        raise click.BadParameter(f"no task {sorted(unknown)[0]!r}: {path} has {_listed(chosen)}")
    selected = {name: task for name, task in chosen.items() if not tasks or name in tasks}
    if n is not None and max(m) > n and {"m_sharpness", "all"} & set(names.split(",")):
        raise click.BadParameter(
            f"--m {max(m)} is larger than --n {n}: a group has m of n examples"
        )
    scores = score_zoo(
        selected,
        _measures(names, m_sharpness, _unsuitable(selected) if names == "all" else set()),
        out=out,
        n=n,
        limit=limit,
        seed=seed,
        device=device,
        backend=backend,
        workers=workers,
        threads=threads,
        timeout=timeout,
        memory=None if memory is None else int(memory * 2**30),
        address=address,
        test_metrics=test_metrics,
    )
    _finish_score(scores, out)


def _finish_score(scores: Scores, out: Path) -> None:
    _say(f"{scores.frame()['model'].nunique()} models scored: {out / 'scores.csv'}")
    _report_failures(scores)


def _score_checkpoints(
    checkpoints: Sequence[str],
    build: str | None,
    data: str | None,
    names: str,
    m_sharpness: MSharpness,
    out: Path,
    n: int | None,
    seed: int,
    device: str,
    test_metrics: bool,
) -> Scores:
    from sharpkit.measures.catalog import OF_IMAGES
    from sharpkit.runs import score_models

    models, train = _checkpoint_models(checkpoints, build, data)
    left_out = {"training_steps"}
    if names == "all":
        if len(train[0][0].shape) != 3:
            left_out |= OF_IMAGES
        if not _first_has_attention(models):
            left_out.add("geodesic_sharpness")
    return score_models(
        models,
        _measures(names, m_sharpness, left_out),
        train,
        _test_data(checkpoints, data),
        loss=m_sharpness.loss,
        out=out,
        n=n,
        seed=seed,
        device=device,
        test_metrics=test_metrics,
    )


def _first_has_attention(models: Mapping[str, Any]) -> bool:
    """Whether the first model that can be loaded has attention."""
    from sharpkit.measures.attention_geometry import has_attention

    for load in models.values():
        with suppress(Exception):  # whatever the user's function raises is told when it is scored
            return has_attention(load())
    return False


def _refuse_options_of_zoos(context: click.Context) -> None:
    """An option that would have no effect is an error."""
    for name in ("tasks", "limit", "backend", "workers", "threads", "timeout", "memory", "address"):
        source = context.get_parameter_source(name)
        if source is click.core.ParameterSource.COMMANDLINE:
            option = "task" if name == "tasks" else name
            raise click.UsageError(f"--{option} is for zoos: leave it out with --checkpoint")


@main.command()
@click.argument("models", nargs=-1, required=True)
@_BUILD
@click.option("--data", help="An .npz file with x_train and y_train, for --build.")
@_LOSS
@click.option("--m", default="1,4,16,64,256", show_default=True, type=_Numbers(int))
@click.option("--rho", default="0.05", show_default=True, type=_Numbers(float))
@click.option("--ascent", default="one_step", type=click.Choice(["one_step", "pgd", "apgd"]))
@click.option("--adaptive", is_flag=True, help="Perturbations in units of |w|.")
@click.option("--n", type=int, help="Training examples used; all by default.")
@click.option("--seed", default=0, show_default=True, help="Of the order of the examples.")
@_DEVICE
@click.option("--out", type=click.Path(path_type=Path), help="Write the table as CSV as well.")
def sharpness(
    models: Sequence[str],
    build: str | None,
    data: str | None,
    loss: str,
    n: int | None,
    device: str,
    out: Path | None,
    **settings: Any,
) -> None:
    """The m-sharpness of one model or several; of two, their paired difference as well.

    MODELS are weight files (.safetensors, or tensors saved by torch) with --build and --data, or
    runs of `sharpkit train`, which need neither.

    \b
    Example:
      sharpkit sharpness runs/sam16 --m 1,16,128 --rho 0.05
      sharpkit sharpness sgd.pt sam.pt --build nets:resnet20 --data cifar.npz --m 1 --rho 0.05,0.1
    """
    import pandas as pd

    from sharpkit import compare_models, m_sharpness

    loaded, train = _checkpoint_models(models, build, data)
    options = {**settings, "n": n, "loss": _loss(loss)}
    networks = {name: load().to(_device(device)) for name, load in loaded.items()}
    compared = None
    if len(networks) == 2:
        (one, first), (other, second) = networks.items()
        compared = compare_models(first, second, train, names=(one, other), **options)
        results = list(compared.results)
    else:
        results = [m_sharpness(model, train, **options) for model in networks.values()]
    columns = ["m", "rho", "value", "std_error", "groups", "n"]
    frames = [result.frame()[columns] for result in results]
    for name, frame in zip(networks, frames, strict=True):
        frame.insert(0, "model", name)
    table = pd.concat(frames, ignore_index=True)
    _say(table.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    if compared is not None:
        _say(f"\n{compared}")
    if out is not None:
        write_csv(table, out)


@main.command()
@_RUN
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="A name that ends in .csv or .parquet.",
)
def export(run: Path, out: Path) -> None:
    """Write every value of RUN with its provenance: hashes, versions, device, seconds, memory.

    \b
    Example:
      sharpkit export runs/task1 --out task1.csv
    """
    from sharpkit.runs import Scores

    _say(Scores.open(run).export(out))


@main.command()
@_RUN
@_RESAMPLES
@click.option("--seed", default=0, show_default=True)
@_TEST_SIZE
@click.option(
    "--target", help="A recorded column to predict instead of the gap, such as test_loss."
)
def evaluate(
    run: Path, resamples: int, seed: int, test_size: int | None, target: str | None
) -> None:
    """Score the measures of RUN by how well they predict the generalization gap.

    Prints each score beside what noise scores. Writes RUN/evaluation.csv and, for several measures,
    combined.csv: what they predict together; evaluation_columns.csv says what the columns mean.
    With --target it writes RUN/evaluation_TARGET.csv and regret_TARGET.csv: what is lost by picking
    the model that a measure thinks best.

    \b
    Example:
      sharpkit evaluate runs/task1
    """
    from sharpkit.evaluation.legend import write_with_legend
    from sharpkit.runs import Scores, combine
    from sharpkit.runs.summary import summary

    if target is not None:
        _evaluate_target(run, target, resamples, seed, test_size)
        return
    table = _evaluate(run, resamples, seed, test_size)
    write_with_legend(table, run / "evaluation.csv")
    together = combine(Scores.open(run), resamples=resamples, seed=seed)
    if len(together):
        write_with_legend(together, run / "combined.csv")
    _say(summary(table))
    if len(together):
        _say("\nAll measures together, on held-out models:")
        _say(together.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    _say(run / "evaluation.csv")


@main.command()
@_RUN
@_RESAMPLES
@click.option("--seed", default=0, show_default=True)
@_TEST_SIZE
@click.option(
    "--statistic",
    default="cmi_pgdl",
    show_default=True,
    type=click.Choice(STATISTICS),
    help="What is plotted.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Default: RUN/predictive_power.png")
def plot(
    run: Path, resamples: int, seed: int, test_size: int | None, statistic: str, out: Path | None
) -> None:
    """Plot the score against m (the paper's Figure 3, right), with its numbers as CSV beside it.

    The grey band is what noise scores: a point in it is no evidence.

    \b
    Example:
      sharpkit plot runs/task1 --out figure3_right.png
    """
    from sharpkit.plot import predictive_power
    from sharpkit.plot.canvas import picture_path

    path = picture_path(out or run / "predictive_power.png")
    table = _evaluate(run, resamples, seed, test_size)
    predictive_power(table, path, statistic=statistic)
    _say(f"{path} and {path.with_suffix('.csv')}")


@main.command()
@_RUN
@_RESAMPLES
@click.option("--seed", default=0, show_default=True)
@_TEST_SIZE
@click.option("--out", type=click.Path(path_type=Path), help="Default: RUN/report.html")
def report(run: Path, resamples: int, seed: int, test_size: int | None, out: Path | None) -> None:
    """Write everything about RUN as one HTML page that needs no network.

    The ranking with intervals, score against m, measures against the gap, mutual information by
    conditioning set, correlations, failures, and what it takes to reproduce the run. Needs plotly:
    pip install 'sharpkit[report]'.

    \b
    Example:
      sharpkit report runs/task1 --out task1.html
    """
    from sharpkit.report import write_report

    _say(write_report(run, out, resamples=resamples, seed=seed, test_size=test_size))


@main.command()
@click.argument("path", required=False)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run directory.")
@click.option("--task", help="The task, where the zoo has several.")
@click.option("--model", "ids", multiple=True, help="A model of the zoo; may be repeated.")
@click.option("--weights", default="final", type=click.Choice(["final", "initial"]))
@click.option("--checkpoint", multiple=True, help="A weight file; may be repeated.")
@_BUILD
@click.option(
    "--data",
    help="An .npz file with x_train and y_train, for --checkpoint with --build; images of bytes "
    "need x_test and y_test too, as for `sharpkit train`.",
)
@click.option("--steps", default=80, show_default=True, help="Lanczos steps.")
@click.option("--probes", default=4, show_default=True, help="Random start vectors.")
@click.option("--n", type=int, help="Training examples used; all by default.")
@click.option("--parameters", multiple=True, help='Name or pattern such as "*.weight".')
@click.option("--grid", default="linear", type=click.Choice(["linear", "log", "symlog"]))
@click.option("--seed", default=0, show_default=True)
@_DEVICE
def spectrum(
    path: str | None,
    out: Path,
    task: str | None,
    ids: Sequence[str],
    weights: Any,
    checkpoint: Sequence[str],
    build: str | None,
    data: str | None,
    steps: int,
    probes: int,
    n: int | None,
    parameters: Sequence[str],
    grid: Any,
    seed: int,
    device: str,
) -> None:
    """Hessian spectral density of models of the zoo at PATH, or of checkpoints, side by side.

    Writes --out/spectrum.png, density.csv, nodes.csv and summary.json; the same command resumes.

    \b
    Example:
      sharpkit spectrum embedded --model 0 --model 5 --out runs/spectra
      sharpkit spectrum --checkpoint sgd.safetensors --checkpoint sam.safetensors \\
          --build mymodels:resnet20 --data cifar.npz --out runs/sgd_and_sam
    """
    from sharpkit.runs.spectrum import spectrum as measure

    if (path is None) == (not checkpoint):
        raise click.UsageError("give either a zoo PATH with --model, or --checkpoint with --build")
    if path is not None:
        models, examples = _zoo_models(path, task, ids, weights)
    else:
        models, examples = _checkpoint_models(checkpoint, build, data)
    spectra = measure(
        models,
        examples,
        out,
        parameters=list(parameters) or None,
        n=n,
        steps=steps,
        probes=probes,
        seed=seed,
        grid=grid,
        device=device,
    )
    _say(spectra.frame().to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    _say(out / "spectrum.png")
    _exit_if_any(spectra.failures)


def _zoo_models(
    path: str, task: str | None, ids: Sequence[str], weights: Any
) -> tuple[dict[str, Any], Any]:
    from functools import partial

    chosen = _load(path)
    if task is None and len(chosen) > 1:
        raise click.UsageError(f"{path} has several tasks, give --task: {_listed(chosen)}")
    name = task or next(iter(chosen))
    if name not in chosen:
        raise click.BadParameter(f"no task {name!r}: {path} has {_listed(chosen)}")
    entries = chosen[name]
    unknown = set(ids) - set(entries)
    if unknown or not ids:
        wrong = f"no model {sorted(unknown)[0]!r} in" if unknown else "give --model, one or more of"
        raise click.UsageError(f"{wrong} {printable(name)}: {_listed(entries)}")
    models = {f"model {i}": partial(entries[i].load, weights) for i in ids}
    return models, entries.dataset("train")


def _checkpoint_models(
    checkpoints: Sequence[str], build: str | None, data: str | None
) -> tuple[dict[str, Any], Any]:
    from functools import partial

    from sharpkit.runs.checkpoints import load_arrays, load_checkpoint
    from sharpkit.runs.trained import load_trained, same_examples, trained_data

    names = {Path(c).stem: c for c in checkpoints}
    if len(names) < len(checkpoints):
        names = {c: c for c in checkpoints}
    if data is None and _of_training(checkpoints[0]):
        first = checkpoints[0]
        for other in checkpoints[1:]:
            if not same_examples(first, other):
                raise click.UsageError(
                    f"{Path(first).parent} and {Path(other).parent} were trained on different data "
                    "or labels: measure them one by one, or give --build and --data"
                )
        train, _ = trained_data(first)
        return {name: partial(load_trained, c, build) for name, c in names.items()}, train
    if build is None or data is None:
        raise click.UsageError(
            f"{checkpoints[0]} is not from `sharpkit train`, so it needs --build module:callable "
            "and --data FILE.npz"
        )
    models = {name: partial(load_checkpoint, c, build) for name, c in names.items()}
    return models, load_arrays(data)


@main.command()
@click.argument("data")
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    help="Folder with the files of fashion-mnist, cifar10, cifar100 or svhn.",
)
@click.option("--arch", default="vgg-32x2", show_default=True, help="Name, or module:callable.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run directory.")
@click.option("--optimizer", default="sgd", show_default=True, type=click.Choice(["sgd", "sam"]))
@click.option("--m", type=int, help="SAM's group size; the batch by default.")
@click.option("--rho", default=0.05, show_default=True, help="SAM's radius.")
@click.option("--adaptive", is_flag=True, help="SAM's perturbation in units of |w|.")
@click.option("--epochs", required=True, type=int)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--lr", default=0.1, show_default=True, help="Learning rate of the first step.")
@click.option("--momentum", default=0.9, show_default=True)
@click.option("--weight-decay", default=5e-4, show_default=True)
@click.option(
    "--schedule",
    default="cosine",
    show_default=True,
    type=click.Choice(["cosine", "step", "constant"]),
)
@click.option("--augmentation", type=click.Choice(["flip", "crop", "flip-crop"]))
@click.option("--label-noise", default=0.0, show_default=True, help="Fraction of wrong labels.")
@click.option("--stop-at-loss", type=float, help="Stop at this loss on the training set.")
@click.option("--keep", type=_Numbers(int), help="Epochs whose weights are kept, such as 0,10.")
@click.option("--evaluate-every", default=1, show_default=True, help="Epochs.")
@click.option("--tensorboard", is_flag=True, help="Log to OUT/tensorboard as well.")
@click.option("--seed", default=0, show_default=True, help="Of initial weights and training.")
@_DEVICE
def train(
    data: str,
    root: Path | None,
    arch: str,
    out: Path,
    keep: list[int] | None,
    seed: int,
    device: str,
    **settings: Any,
) -> None:
    """Train a network on DATA with SGD or SAM; the same command goes on with a stopped training.

    DATA is "embedded", "fashion-mnist", "cifar10", "cifar100", "svhn", an .npz file with x_train,
    y_train, x_test and y_test, a folder or .zip of images train/<class>/*.jpg and
    test/<class>/*.jpg, or ZOO:TASK for the data of a task of a zoo.

    --arch is vgg-WIDTHxBLOCKS, nin-WIDTHxBLOCKS (either with -bn), resnetDEPTH,
    wrn-DEPTH-WIDTH (or with -nobn), or module:callable.

    Writes OUT/log.csv, config.json, model.safetensors and epoch-K.safetensors for --keep;
    `sharpkit spectrum --checkpoint OUT/model.safetensors` reads them.

    \b
    Example:
      sharpkit train cifar10 --arch resnet20 --optimizer sam --m 16 --rho 0.05 \\
          --augmentation flip-crop --epochs 50 --out runs/sam16
      torchrun --nproc-per-node 2 -m sharpkit train embedded --epochs 20 --out runs/two
    """
    from sharpkit.datasets import load_dataset
    from sharpkit.runs.trained import provenance
    from sharpkit.training import build_architecture, fit
    from sharpkit.training.parallel import Ranks, process_group

    with process_group(device) as own_device:
        examples, held_out = load_dataset(data, root=root)
        origin = provenance(data, None if root is None else str(root), arch, examples)
        shape, classes = tuple(origin["input_shape"]), origin["classes"]
        result = fit(
            build_architecture(arch, shape, classes, seed=seed),
            examples,
            held_out,
            out=out,
            keep=keep or (),
            seed=seed,
            provenance=origin,
            device=own_device,
            **settings,
        )
        if Ranks.current().rank:
            return
    last = result.history.iloc[-1]
    accuracies = ", ".join(f"{100 * last[f'{s}_accuracy']:.2f} % {s}" for s in ("train", "test"))
    _say(f"{out / 'model.safetensors'}: accuracy {accuracies}")


@main.command("figure3")
@click.option(
    "--preset", required=True, help='"mini", "fashion", "cifar10", "paper", or a .toml file.'
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run directory.")
@click.option("--panels", default="left,middle,right", show_default=True, help="Some of them.")
@_DATA
@click.option("--zoo", "zoo_path", help="Another zoo for the right panel.")
@click.option("--build", help="The file's architecture once more, if it is a module:callable.")
@click.option("--workers", default=1, show_default=True, help="Work items at a time.")
@_BACKEND
@_ADDRESS
@_DEVICE
def figure3_command(
    preset: str,
    out: Path,
    panels: str,
    data: str | None,
    zoo_path: str | None,
    build: str | None,
    workers: int,
    backend: Any,
    address: str | None,
    device: str,
) -> None:
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
    from sharpkit.runs.figure3 import figure3

    result = figure3(
        preset,
        out=out,
        panels=panels.split(","),
        data=data,
        zoo=zoo_path,
        build=build,
        workers=workers,
        backend=backend,
        address=address,
        device=_device(device),
    )
    _say(f"{result.picture} and tables beside it")
    _exit_if_any(result.failures)


def _of_training(checkpoint: str) -> bool:
    """Whether a weight file or directory is of `sharpkit train`."""
    path = Path(checkpoint)
    return ((path if path.is_dir() else path.parent) / "config.json").is_file()


def _test_data(checkpoints: Sequence[str], data: str | None) -> Any:
    from sharpkit.runs.checkpoints import load_arrays
    from sharpkit.runs.trained import trained_data

    return trained_data(checkpoints[0])[1] if data is None else load_arrays(data, "test")


def _loss(name: str) -> Any:
    """A loss by its name, or a callable as "module:callable"."""
    if ":" not in name:
        return name
    from sharpkit.importing import import_callable

    return import_callable(name)


def _load(path: str) -> Zoo:
    if path == "embedded":
        from sharpkit.zoo.embedded import embedded_zoo

        return embedded_zoo()
    from sharpkit.zoo import load_zoo

    return load_zoo(path)


def _measures(names: str, m_sharpness: MSharpness, left_out: Set[str]) -> list[Measure]:
    from sharpkit.measures import standard_measures

    every = standard_measures(attention=True, recorded=True)
    known = {measure.name: measure for measure in every}  # type: ignore[attr-defined]
    known["m_sharpness"] = m_sharpness  # under whichever name its options give it
    if names == "all":
        return [measure for name, measure in known.items() if name not in left_out]
    wanted = names.split(",")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise click.BadParameter(f'no measure {unknown[0]!r}: "all" or some of {", ".join(known)}')
    return [known[name] for name in wanted]


def _unsuitable(tasks: Mapping[str, PgdlTask]) -> set[str]:
    """Measures that no model of these tasks can have, judged by the first of each."""
    from sharpkit.measures.attention_geometry import has_attention
    from sharpkit.measures.catalog import OF_IMAGES
    from sharpkit.measures.recorded import KINDS

    images = recorded = attention = False
    for task in tasks.values():
        for entry in list(task.values())[:1]:
            with suppress(SharpkitError):  # told when the model is scored
                images |= len(entry.config.get("input_shape", ())) == 3
                recorded |= not set(KINDS).isdisjoint(entry.metrics)
                attention |= has_attention(entry.build())
    suitable = dict.fromkeys(OF_IMAGES, images)
    suitable |= {"training_steps": recorded, "geodesic_sharpness": attention}
    return {name for name, fits in suitable.items() if not fits}


def _listed(names: Iterable[str]) -> str:
    return printable(", ".join(names))


def _device(name: str) -> str:
    from sharpkit.device import check_device

    check_device(name)
    return name


def _evaluate_target(
    run: Path, target: str, resamples: int, seed: int, test_size: int | None
) -> None:
    from sharpkit.evaluation.legend import write_with_legend
    from sharpkit.runs import Scores, evaluate, selection_regret
    from sharpkit.runs.summary import summary

    scores = Scores.open(run)
    table = evaluate(scores, target=target, resamples=resamples, seed=seed, test_size=test_size)
    regret = selection_regret(scores, target=target)
    write_with_legend(table, run / f"evaluation_{target}.csv")
    write_csv(regret, run / f"regret_{target}.csv")
    _say(summary(table))
    _say(f"\n{target} lost by picking the model that a measure thinks best:")
    _say(regret.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    _say(run / f"evaluation_{target}.csv")


def _evaluate(run: Path, resamples: int, seed: int, test_size: int | None) -> Any:
    from sharpkit.runs import Scores, evaluate

    return evaluate(Scores.open(run), resamples=resamples, seed=seed, test_size=test_size)


def _exit_if_any(failures: Mapping[str, str]) -> None:
    for name, reason in failures.items():
        _say(f"failed: {name}: {reason}", err=True)
    if failures:
        sys.exit(1)


def _report_failures(scores: Scores) -> None:
    failures = scores.failures
    for row in failures.itertuples():
        _say(f"failed: {row.task} model {row.model}, {row.measure}: {row.error}", err=True)
    if len(failures):
        _say(f"error: {len(failures)} models failed; the others are scored", err=True)
        sys.exit(1)
