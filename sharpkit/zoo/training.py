"""A hyperparameter grid turned into a trained zoo on disk, in the PGDL competition's layout.

Every setting of the grid becomes one small VGG-like network, trained by SGD until its training
loss, in eval mode over the whole training set, falls to the recipe's target: models then differ in
how they generalize, not in how well they fit. Seeds depend on the grid's seed and the model's id
only and each model trains on one thread, so neither workers nor interruptions change a number.

The zoo that ships with the package comes from

    python -m sharpkit.zoo.training --fashion-mnist DIR --out DIR --workers 2
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from sharpkit.errors import ArgumentError, DataError, RunError
from sharpkit.zoo.embedded import ARCHIVE_NAME, pack_zoo
from sharpkit.zoo.fashion_mnist import fashion_mnist
from sharpkit.zoo.files import read_json, write_json
from sharpkit.zoo.keras import build_model
from sharpkit.zoo.recipe import Recipe, TrainedModel, train_model
from sharpkit.zoo.writer import ZooWriter

EMBEDDED_TASK = "fashion_mnist_14x14"
EMBEDDED_SEED = 1
EMBEDDED_GRID: dict[str, Sequence[Any]] = {
    "width": [10, 18],
    "num_conv_blocks": [1, 2],
    "init_gain": [1.0, 2.0],
    "dropout": [0.0, 0.25],
    "weight_decay": [0.0, 0.001],
    "batch_size": [16, 32, 64],
}


@dataclass(frozen=True)
class TrainingReport:
    """What `train_zoo` did.

    Args:
        path: The zoo's root.
        trained: Ids of the models trained now.
        skipped: Ids of those that an earlier call had finished.
        failed: Id to error message of those that have no model.
    """

    path: Path
    trained: list[str]
    skipped: list[str]
    failed: dict[str, str]


def train_zoo(
    grid: Mapping[str, Sequence[Any]],
    train: TensorDataset,
    test: TensorDataset,
    out: str | Path,
    *,
    task: str = "task1",
    recipe: Recipe | None = None,
    seed: int = 0,
    shipped_test: int | None = None,
    workers: int = 1,
    progress: bool = True,
) -> TrainingReport:
    """Train one model for each setting of a grid and write them as a zoo.

    A call that was interrupted goes on with the same arguments: finished models stay, others start
    again from their seed. A model that fails is reported and the others are trained. Beside the
    zoo, `training/<task>.json` keeps what was asked for.

    Args:
        grid: Field of `Recipe` -> its values; all combinations, the last name fastest.
        train: Inputs (n, c, h, w) float32 and labels (n,) int64 to fit.
        test: The same for the recorded test accuracy and loss.
        out: Root directory of the zoo, created if needed.
        task: Name of the task.
        recipe: Values of the fields that the grid leaves out; default `Recipe()`.
        seed: Of the whole grid; model i draws from the seed sequence (seed, i, attempt).
        shipped_test: How many test examples, from the first, are written as the zoo's test split;
            their accuracy is recorded as `shipped_test_acc`. Default all.
        workers: Processes; 1 trains in this one. A script that asks for more needs the usual
            `if __name__ == "__main__":`.
        progress: Whether to show a progress bar.

    Returns:
        TrainingReport: What was trained, skipped and failed.

    Raises:
        ArgumentError: A name that is not a field of `Recipe`, or an empty list of values.
        DataError: Inputs or labels of the wrong shape or kind.
        RunError: The directory holds a run with another grid, recipe, seed or data.

    Source:
        Jiang et al., Fantastic Generalization Measures and Where to Find Them, ICLR 2020: a grid
        of hyperparameters at equal training loss.

    Example:
        >>> x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 2
        >>> data = TensorDataset(x, y)
        >>> report = train_zoo({"width": [4, 8]}, data, data, "zoo")  # doctest: +SKIP
    """
    from tqdm import tqdm

    recipe = Recipe() if recipe is None else recipe
    _check(grid, train, test, workers)
    shipped = len(test) if shipped_test is None else min(shipped_test, len(test))
    plan = {
        "grid": {name: list(values) for name, values in grid.items()},
        "recipe": asdict(recipe),
        "seed": seed,
        "shipped_test": shipped,
        "data": _digest(train, test),
    }
    root = Path(out)
    _claim(root / "training" / f"{task}.json", plan)
    writer = ZooWriter(root, shard_size=max(len(train), shipped))
    writer.write_dataset(task, "train", *train.tensors)
    writer.write_dataset(task, "test", *(t[:shipped] for t in test.tensors))
    settings = {str(i): setting for i, setting in enumerate(_settings(grid))}
    configs = root / "reference_data" / task / "model_configs.json"
    skipped = list(read_json(configs)) if configs.exists() else []
    jobs = {i: (replace(recipe, **s), (seed, int(i)), shipped) for i, s in settings.items()}
    todo = {i: job for i, job in jobs.items() if i not in skipped}
    failed: dict[str, str] = {}
    with tqdm(total=len(jobs), initial=len(skipped), unit="model", disable=not progress) as bar:
        for i, result in _run(todo, train, test, workers):
            if isinstance(result, str):
                failed[i] = result
                bar.write(f"model {i} failed: {result}", file=sys.stderr)
            else:
                _write(writer, task, i, result, settings[i], grid)
            bar.update()
    trained = [i for i in todo if i not in failed]
    return TrainingReport(root, trained, skipped, {i: failed[i] for i in jobs if i in failed})


# --- the grid --------------------------------------------------------------------------------

_Job = tuple[Recipe, tuple[int, int], int]  # recipe, seed, test examples shipped
_worker_data: list[TensorDataset] = []  # of a worker process, sent once


def _run(
    jobs: dict[str, _Job], train: TensorDataset, test: TensorDataset, workers: int
) -> Iterator[tuple[str, TrainedModel | str]]:
    """Train models here or in worker processes; each one's id and result, or error message."""
    if workers == 1 or len(jobs) < 2:
        for i, job in jobs.items():
            yield i, _attempt(job, train, test)
        return
    context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
    arrays = tuple(t.numpy() for data in (train, test) for t in data.tensors)
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), context, initializer=_set_data, initargs=arrays
    )
    try:
        futures = {pool.submit(_attempt_in_worker, job): i for i, job in jobs.items()}
        for future in as_completed(futures):
            error = future.exception()  # the process died
            yield futures[future], future.result() if error is None else _message(error)
    finally:
        pool.shutdown(cancel_futures=True)


def _set_data(*arrays: NDArray[Any]) -> None:
    x, y, test_x, test_y = map(torch.from_numpy, arrays)
    _worker_data[:] = [TensorDataset(x, y), TensorDataset(test_x, test_y)]


def _attempt_in_worker(job: _Job) -> TrainedModel | str:
    return _attempt(job, *_worker_data)


def _attempt(job: _Job, train: TensorDataset, test: TensorDataset) -> TrainedModel | str:
    try:
        recipe, seed, shipped = job
        return train_model(recipe, train, test, seed=seed, shipped_test=shipped)
    except Exception as error:  # one model must not stop the others
        return _message(error)


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _write(
    writer: ZooWriter,
    task: str,
    id_: str,
    trained: TrainedModel,
    setting: dict[str, Any],
    grid: Mapping[str, Sequence[Any]],
) -> None:
    model = build_model(trained.config, device="meta")
    initial, final = (
        {name: torch.from_numpy(array) for name, array in state.items()}
        for state in (trained.initial, trained.final)
    )
    model.load_state_dict(final, assign=True)
    writer.write_model(
        task,
        id_,
        model,
        initial=initial,
        hyperparameters=setting,
        possible_values={name: list(values) for name, values in grid.items()},
        metrics=trained.metrics,
    )


def _settings(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def _check(
    grid: Mapping[str, Sequence[Any]], train: TensorDataset, test: TensorDataset, workers: int
) -> None:
    known = [field.name for field in fields(Recipe)]
    for name, values in grid.items():
        if name not in known:
            raise ArgumentError(f"unknown hyperparameter {name!r}: expected one of {known}")
        if not values or len({str(v) for v in values}) != len(values):
            raise ArgumentError(f"hyperparameter {name!r} needs distinct values, got {values!r}")
    if not grid or workers < 1:
        raise ArgumentError("expected at least one hyperparameter and one worker")
    for name, data in (("train", train), ("test", test)):
        shapes = [tuple(t.shape) for t in data.tensors]
        kinds = [t.dtype for t in data.tensors]
        if kinds != [torch.float32, torch.int64] or len(shapes[0]) != 4 or not shapes[0][0]:
            raise DataError(
                f"{name} data: expected float32 (n, c, h, w) and int64 (n,), got {shapes}, {kinds}"
            )


def _digest(*datasets: TensorDataset) -> str:
    digest = hashlib.sha256()
    for tensor in (t for data in datasets for t in data.tensors):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _claim(path: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or refuse a directory that holds the results of another one."""
    if not path.exists():
        write_json(path, plan)
    elif (there := read_json(path)) != plan:
        before = there if isinstance(there, dict) else {}
        changed = [key for key in plan if before.get(key) != plan[key]]
        raise RunError(
            f"{path.parent.parent} holds a zoo trained with another {', '.join(changed)}; "
            "choose a new directory or give the same arguments"
        )


# --- the zoo of the package -----------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the zoo that ships with the package and pack its archive; 1 if a model failed."""
    parser = argparse.ArgumentParser("python -m sharpkit.zoo.training", description=main.__doc__)
    parser.add_argument("--fashion-mnist", type=Path, required=True, help="folder of IDX files")
    parser.add_argument("--out", type=Path, required=True, help="where the zoo is trained")
    parser.add_argument("--workers", type=int, default=1, help="training processes")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    train, test = fashion_mnist(options.fashion_mnist, seed=EMBEDDED_SEED)
    report = train_zoo(
        EMBEDDED_GRID,
        train,
        test,
        options.out,
        task=EMBEDDED_TASK,
        seed=EMBEDDED_SEED,
        shipped_test=2000,
        workers=options.workers,
    )
    for id_, message in report.failed.items():
        print(f"model {id_}: {message}", file=sys.stderr)
    archive = pack_zoo(options.out, options.out / ARCHIVE_NAME)
    print(
        f"{archive}: {archive.stat().st_size:,} bytes; {len(report.trained)} models trained, "
        f"{len(report.skipped)} were there, {len(report.failed)} failed; "
        f"{time.perf_counter() - start:.0f} s"
    )
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
