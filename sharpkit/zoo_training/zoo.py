"""A hyperparameter grid turned into a trained zoo on disk, in the PGDL layout or in stacks.

Every setting of the grid becomes one small VGG-like network, trained by SGD until its training
loss, in eval mode over the whole training set, falls to the recipe's target: models then differ in
how they generalize, not in how well they fit. Seeds depend on the grid's seed and the model's id
only and each model trains on one thread, so neither workers nor interruptions change a number.
`sharpkit zoo train mini` trains the zoo that ships with the package.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from sharpkit.contract.examples import standard_tensor
from sharpkit.device import check_device
from sharpkit.digests import digest
from sharpkit.display import readable
from sharpkit.doors import shown
from sharpkit.errors import ArgumentError, DataError, RunError
from sharpkit.files import disk_errors, remove_leftovers
from sharpkit.progress import progress_bar
from sharpkit.run_directory import read_claim, refuse_another, sole_driver, write_claim
from sharpkit.safe_text import printable
from sharpkit.training.settings import check_whole
from sharpkit.workers import Failure, Workers, on_one_thread, run_items
from sharpkit.zoo.keras.model import build_model
from sharpkit.zoo.writer import Layout, ZooWriter, check_layout
from sharpkit.zoo_training.grid_file import ZooPlan, settings_of
from sharpkit.zoo_training.model import TrainedModel, train_model
from sharpkit.zoo_training.recipe import Recipe
from sharpkit.zoo_training.sam_checks import check_where_sam_acts
from sharpkit.zoo_training.stacked_plan import Stack, check_stack, stacks_of
from sharpkit.zoo_training.stacked_run import train_stacks
from sharpkit.zoo_training.stacked_state import Job

if TYPE_CHECKING:
    import pandas as pd

_SHARD_SIZE = 10_000
# what earlier versions wrote into a zoo's files
_RENAMED = {
    "learning_rate": "lr",
    "scale_learning_rate": "scale_lr",
    "target_loss": "stop_at_loss",
    "max_epochs": "epochs",
}


@readable(
    lambda r: (
        f"{len(r.trained)} trained, {len(r.skipped)} skipped, {len(r.failed)} failed, in {r.path}"
    ),
    brief=True,
)
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

    def frame(self) -> pd.DataFrame:
        """One row per model: model, state ("trained", "skipped" or "failed"), error."""
        import pandas as pd

        rows = [(i, "trained", "") for i in self.trained]
        rows += [(i, "skipped", "") for i in self.skipped]
        rows += [(i, "failed", error) for i, error in self.failed.items()]
        return pd.DataFrame(rows, columns=["model", "state", "error"])


def train_zoo(
    grid: Mapping[str, Sequence[Any]],
    train: TensorDataset,
    test: TensorDataset,
    out: str | Path,
    *,
    task: str = "task1",
    recipe: Recipe | None = None,
    seed: int = 0,
    replicates: int = 1,
    shipped_test: int | None = None,
    limit: int | None = None,
    workers: int | Workers = 1,
    device: str = "cpu",
    stack: Stack = None,
    layout: Layout = "pgdl",
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
        replicates: Networks of every setting, with consecutive ids. What they differ in is their
            seed alone, which is no hyperparameter of the zoo.
        shipped_test: How many test examples, from the first, are written as the zoo's test split;
            their accuracy is recorded as `shipped_test_acc`. Default all.
        limit: Train only the first models of the grid; the rest can follow later.
        workers: How many models at a time, or who trains them (`Workers`). A script that starts
            processes needs `if __name__ == "__main__":`.
        device: Where to train, such as "cpu" or "cuda".
        stack: How many networks of one shape and batch size train together in one process: a
            number, which memory may lower; None for one by one; "auto" for None on a CPU, and on a
            GPU for as many as keep it busy. It changes weights by rounding alone.
        layout: "pgdl" for a directory per model; "stacked" for a file per 64 models of one shape,
            which thousands of models need. `write_zoo` turns one into the other.
        progress: Whether to show a progress bar.

    Returns:
        TrainingReport: What was trained, skipped and failed.

    Raises:
        ArgumentError: A name that is not a field of `Recipe`, a value outside its range, or an
            empty list of values; or SAM has no step or no parameter in a network.
        DataError: Inputs or labels of the wrong shape or kind.
        RunError: The directory holds a run with another grid, recipe, seed or data, or belongs to
            another process, or cannot be written.

    Source:
        Jiang et al., Fantastic Generalization Measures and Where to Find Them, ICLR 2020: a grid
        of hyperparameters at equal training loss.

    Example:
        >>> import tempfile
        >>> x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 2
        >>> data = TensorDataset(x, y)
        >>> easy = Recipe(stop_at_loss=0.8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     train_zoo({"width": [4, 8]}, data, data, folder, recipe=easy).trained
        ['0', '1']
    """
    recipe = Recipe() if recipe is None else recipe
    check_device(device)
    check_stack(stack)
    check_layout(layout)
    check_whole("replicates", replicates, 1)
    _check(grid, train, test)
    trainers = on_one_thread(workers)
    shipped = len(test) if shipped_test is None else min(shipped_test, len(test))
    settings = settings_of(grid, replicates)
    recipes = {i: replace(recipe, **setting) for i, setting in settings.items()}
    wanted = list(recipes)[:limit]
    x, y = train.tensors
    classes = int(y.max()) + 1
    check_where_sam_acts(recipes, (x.shape[2], x.shape[3], x.shape[1]), classes, len(x))
    plan = {
        "grid": {name: list(values) for name, values in grid.items()},
        "recipe": recipe.asdict(),
        "seed": seed,
        "shipped_test": shipped,
        "data": digest([*train.tensors, *test.tensors]),
    } | ({"replicates": replicates} if replicates > 1 else {})  # earlier zoos do not say 1
    if layout != "pgdl":  # nor do they say this
        plan["layout"] = layout
    root = Path(out)
    with sole_driver(root):
        written = root / "input_data" / task, root / "reference_data" / task, root / "training"
        for folder in written:
            remove_leftovers(folder, *(p for p in folder.rglob("*") if p.is_dir()))
        size = min(_SHARD_SIZE, max(len(train), shipped))
        writer = ZooWriter(root, shard_size=size, layout=layout)
        with disk_errors(root):
            names = _claim(root / "training" / f"{task}.json", plan)
            writer.write_dataset(task, "train", *train.tensors)
            writer.write_dataset(task, "test", *(t[:shipped] for t in test.tensors))
            done = _finished(writer, task)
        skipped = [i for i in wanted if i in done]
        todo = {i: recipes[i] for i in wanted if i not in done}
        arrays = [t.numpy() for data in (train, test) for t in data.tensors]
        results = _train_all(todo, arrays, seed, shipped, stack, trainers, device)
        failed: dict[str, str] = {}
        bar = progress_bar(
            total=len(wanted), initial=len(skipped), desc="train", unit="model", progress=progress
        )
        with bar, closing(results):  # workers end at once if this process is interrupted
            for i, result in results:
                if isinstance(result, Failure):
                    failed[i] = result.message
                    bar.write(f"model {i} failed: {printable(result.message)}", file=sys.stderr)
                else:
                    with disk_errors(root):
                        setting = {names[name]: value for name, value in settings[i].items()}
                        possible = {names[name]: list(values) for name, values in grid.items()}
                        _write(writer, task, i, result, setting, possible)
                bar.update()
        with disk_errors(root):
            writer.finish()
    trained = [i for i in todo if i not in failed]
    return TrainingReport(root, trained, skipped, {i: failed[i] for i in todo if i in failed})


def train_plan(
    plan: ZooPlan, out: str | Path, data: str | None = None, **options: Any
) -> TrainingReport:
    """Train the zoo that a grid file asks for, with other data if given; options of `train_zoo`."""
    if data is not None:
        plan = replace(plan, data=plan.data.at(data))
    return train_zoo(
        plan.grid,
        *plan.load_data(),
        out,
        task=plan.task,
        recipe=plan.recipe,
        seed=plan.seed,
        replicates=plan.replicates,
        shipped_test=plan.shipped_test,
        **options,
    )


def _train_all(
    todo: Mapping[str, Recipe],
    arrays: list[NDArray[Any]],
    seed: int,
    shipped: int,
    stack: Stack,
    trainers: Workers,
    device: str,
) -> Generator[tuple[str, TrainedModel | Failure]]:
    """What comes of every model: of those that train alone, and then of stacks."""
    x, y, *_ = arrays
    input_shape, classes = (x.shape[2], x.shape[3], x.shape[1]), int(y.max()) + 1
    stacks = stacks_of(todo, input_shape, classes, stack=stack, device=torch.device(device))
    stacked = {i for ids, _ in stacks for i in ids}
    alone = [(i, recipe) for i, recipe in todo.items() if i not in stacked]
    train_one = partial(_train_one, arrays, seed, shipped)
    for (i, _), result in run_items(train_one, alone, trainers, device=device):
        yield i, result
    jobs = [([Job(i, todo[i], (seed, int(i))) for i in ids], most) for ids, most in stacks]
    yield from train_stacks(jobs, arrays, shipped, trainers, device=device)


def _train_one(
    arrays: list[NDArray[Any]], seed: int, shipped: int, item: tuple[str, Recipe], device: str
) -> TrainedModel:
    x, y, test_x, test_y = map(standard_tensor, arrays)
    i, recipe = item
    train, test = TensorDataset(x, y), TensorDataset(test_x, test_y)
    return train_model(
        recipe, train, test, seed=(seed, int(i)), shipped_test=shipped, device=device
    )


def _write(
    writer: ZooWriter,
    task: str,
    id_: str,
    trained: TrainedModel,
    setting: dict[str, Any],
    possible: dict[str, list[Any]],
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
        possible_values=possible,
        metrics=trained.metrics,
    )


def _check(grid: Mapping[str, Sequence[Any]], train: TensorDataset, test: TensorDataset) -> None:
    known = [field.name for field in fields(Recipe)]
    for name, values in grid.items():
        if name not in known:
            raise ArgumentError(f"unknown hyperparameter {name!r}: expected one of {known}")
        if not values or len({str(v) for v in values}) != len(values):
            raise ArgumentError(f"hyperparameter {name!r} needs distinct values, got {values!r}")
    if not grid:
        raise ArgumentError("the grid is empty: expected at least one hyperparameter")
    for name, data in (("train", train), ("test", test)):
        shapes = [tuple(t.shape) for t in data.tensors]
        kinds = [t.dtype for t in data.tensors]
        if kinds != [torch.float32, torch.int64] or len(shapes[0]) != 4 or not shapes[0][0]:
            raise DataError(
                f"{name} data: expected images float32 (n, c, h, w) and labels int64 (n,), got "
                f"{shapes}, {kinds}; images without channels become so by x[:, None]"
            )


def _claim(path: Path, plan: Mapping[str, Any]) -> dict[str, str]:
    """Note the plan, or refuse the zoo of another one, and of the same grid in another order.

    Returns:
        dict: Field of the grid to what this zoo calls it, as a zoo of an earlier version keeps its
        names.
    """
    now = list(plan["grid"])
    if not path.exists():
        write_claim(path, plan)
        return {name: name for name in now}
    noted = read_claim(path)
    there = {key: _renamed(part) for key, part in noted.items()}
    refuse_another(there, json.loads(json.dumps(plan)), path)
    if list(there["grid"]) != now:
        raise RunError(
            f"{path}: was started with the grid in the order {', '.join(there['grid'])}, now it is "
            f"{', '.join(now)}, which numbers the models in another way: give it in the same order"
        )
    return dict(zip(now, noted["grid"], strict=True))


def _finished(writer: ZooWriter, task: str) -> dict[str, Any]:
    """The entries of the models that are done, as the zoo lists them."""
    done: Any = writer.entries(task)
    if not isinstance(done, dict):
        raise RunError(
            f"{writer.path}, task {task}: its model_configs.json is {shown(done)}, expected an "
            "object with a name per model"
        )
    return done


def _renamed(part: Any) -> Any:
    """A part of a plan in today's names."""
    return {_RENAMED.get(k, k): v for k, v in part.items()} if isinstance(part, dict) else part
