"""Opening a zoo, in whichever format it is: a mapping of its tasks by name."""

from __future__ import annotations

import glob
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from sharpkit.display import readable
from sharpkit.errors import ArgumentError, SharpkitError, ZooFormatError
from sharpkit.zoo.folder import folder_task
from sharpkit.zoo.model_zoos import EXPECTED as MODEL_ZOO, model_zoo_tasks
from sharpkit.zoo.pgdl import EXPECTED, pgdl_tasks
from sharpkit.zoo.remote import Mirror, is_remote, local_path
from sharpkit.zoo.small_cnn_zoo import EXPECTED as SMALL_CNN_ZOO, small_cnn_tasks
from sharpkit.zoo.stacked import EXPECTED as STACKED, stacked_tasks
from sharpkit.zoo.task import Task

if TYPE_CHECKING:
    import pandas as pd

    from sharpkit.contract.loading import Data
    from sharpkit.zoo.folder.task import Build

# a directory (and, if remote, its mirror) -> tasks, and folders that are none with the reason
Finder: TypeAlias = Callable[[Path, Mirror | None], tuple[Sequence[Task], dict[str, str]]]


class Format(NamedTuple):
    """A way to store a zoo."""

    # finds the tasks, without opening a file; finds nothing where the format is another
    find: Finder
    expected: str  # what it looks for, for the error where no format fits


FORMATS = {
    "stacked": Format(stacked_tasks, STACKED),  # first: beside its tasks may be those of the next
    "PGDL": Format(pgdl_tasks, EXPECTED),
    "Small CNN Zoo": Format(small_cnn_tasks, SMALL_CNN_ZOO),
    "model zoos": Format(model_zoo_tasks, MODEL_ZOO),
}


def load_zoo(
    path: str | Path,
    *,
    build: Build | None = None,
    table: str | Path | pd.DataFrame | None = None,
    data: tuple[Data, Data | None] | None = None,
    columns: Mapping[str, str] | None = None,
    hyperparameters: Sequence[str] | None = None,
) -> Zoo:
    """Open a zoo of trained networks; which of `FORMATS` it has is recognised.

    With `table` and `build` it is any folder of checkpoints of your own: each is a model, and its
    row of the table tells its hyperparameters and accuracies. It may be an export of wandb or
    MLflow. Columns are recognised by their names (`path`, `train_acc`, `test/accuracy`,
    `params.lr`, `summary.test_loss`, ...) or named by `columns`; a warning tells what was taken for
    what. Rows without a file, files without a row, rows of runs that did not finish, doubled rows
    and missing accuracies are warned about, and cost only their own models.

    Of the PGDL competition's format, it accepts the root (`input_data` beside `reference_data`),
    `input_data` itself, a folder of tasks, or one task; model_configs.json may also lie beside the
    models. Models that the file does not list, entries without a model, and incomplete or doubled
    grids are warned about. Tasks whose networks are in stacks (`ZooWriter(layout="stacked")`) may
    lie among them.

    The Small CNN Zoo, model zoos and phase-transition zoos are opened by their unpacked folder, or
    by a folder of such folders. They come without images: put yours at `images` inside. Recorded
    test accuracies of three networks are computed again, and it is warned about what does not fit.

    Of a zoo elsewhere, opening reads the listing and model_configs.json; any other file is copied
    into the cache (`SHARPKIT_CACHE`, or the platform's) when it is used, and again if it changes.

    Args:
        path: The directory, or a URL that fsspec knows, such as "s3://bucket/zoo", "gs://...",
            "hf://datasets/...", "https://..." (each needs a package: `sharpkit[remote]`). With
            `table`, a pattern of files such as `runs/**/*.pt`, or the folder that holds them.
        build: Of a folder of checkpoints, the function that builds the network, or its name as
            "module:callable". It is given what its parameters are called: `build(width, depth=2)`
            gets those of the row, one that takes any keyword all. See `load_checkpoint` for the
            files that can be read; nothing is unpickled.
        table: One row for each, as a CSV file or a DataFrame.
        data: What the checkpoints were trained and tested on, (train, test), each as for
            `score_models`, such as `load_dataset("cifar10")`; None if nothing is to be scored.
        columns: What is not recognised, or otherwise than you mean it: "path", "initial" (the file
            of the weights before training) or a metric -> column.
        hyperparameters: Columns that were varied on purpose; None for all that differ between
            models and are neither results nor notes of a run. Constant ones say nothing.

    Returns:
        Zoo: Task name to `Task`.

    Raises:
        ZooFormatError: Nothing there, no model, or (for a single task) no usable
            model_configs.json. Of several tasks the good ones load and the others are warned about.
            A table that cannot be read, or in which a column is missing or may be one of two.
        ArgumentError: A URL of an unknown protocol, or of one whose package is missing; a table
            without `build` or the reverse; a column that is not there.
        DownloadError: The server cannot be reached, or refuses.

    Source:
        Jiang et al., NeurIPS 2020 Competition: Predicting Generalization in Deep Learning;
        Unterthiner et al. 2020, arXiv:2002.11448; Schuerholt et al. 2022, arXiv:2209.14764, and
        2025, arXiv:2504.18072.

    Example:
        >>> import torch
        >>> from sharpkit.zoo import embedded_zoo
        >>> zoo = load_zoo(embedded_zoo().path)  # your own directory, such as "public_data"
        >>> model = zoo["fashion_mnist_14x14"]["20"].load()
        >>> model(torch.zeros(1, 1, 14, 14)).shape
        torch.Size([1, 10])

        >>> import pandas as pd, tempfile
        >>> from torch import nn
        >>> def build(width):
        ...     return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
        >>> folder = Path(tempfile.mkdtemp())
        >>> for width in (4, 8):
        ...     torch.save(build(width).state_dict(), folder / f"net{width}.pt")
        >>> table = pd.DataFrame({"path": ["net4.pt", "net8.pt"], "width": [4, 8],
        ...                       "train_acc": [0.99, 1.0], "test_acc": [0.9, 0.8]})
        >>> zoo = load_zoo(folder, build=build, table=table, hyperparameters=["width"])
        >>> [len(task) for task in zoo.values()]
        [2]
    """
    if table is None and build is None and not _is_pattern(path):
        if data is not None or columns is not None or hyperparameters is not None:
            raise ArgumentError("data, columns and hyperparameters are of a folder with a table")
        zoo = find_tasks(path)
    else:
        root, found = folder_task(path, build, table, data, columns, hyperparameters)
        zoo = Zoo(root, [found])
    for task in zoo.values():
        try:
            messages = task.check()
        except SharpkitError as error:
            if len(zoo) == 1:
                raise
            messages = [str(error)]
        for message in messages:
            warnings.warn(f"task {task.name}: {message}", UserWarning, stacklevel=2)
    return zoo


def _is_pattern(path: str | Path) -> bool:
    """Whether a path means several files, and none that has these letters in its name."""
    return not is_remote(path) and glob.has_magic(str(path)) and not Path(path).exists()


def find_tasks(path: str | Path) -> Zoo:
    """The tasks below a path or URL, without opening any file; see `load_zoo`."""
    mirror = Mirror(str(path)) if is_remote(path) else None
    path = local_path(path) if mirror is None else mirror.path
    reasons: list[str] = []
    for known in FORMATS.values():
        tasks, refused = known.find(path, mirror)
        if tasks:
            for message in refused.values():
                warnings.warn(message, UserWarning, stacklevel=3)
            return Zoo(path, tasks, refused)
        reasons += refused.values()
    expected = "; or ".join(known.expected for known in FORMATS.values())
    raise ZooFormatError(
        next(iter(reasons), "")
        or f"{path if mirror is None else mirror.url}: no model found; expected {expected}. "
        "Checkpoints of your own need table= and build= (--table and --build) as well"
    )


@readable(lambda z: f"{len(z)} tasks, {sum(map(_models, z.values()))} models, in {z.path}")
class Zoo(Mapping[str, Task]):
    """Tasks by name, in alphabetical order.

    Args:
        path: The directory that was opened.
        tasks: Its tasks.
        refused: Name, made printable, of each folder that cannot be used as a task, and why.
    """

    def __init__(
        self, path: Path, tasks: Sequence[Task], refused: Mapping[str, str] | None = None
    ) -> None:
        self.path, self.refused = path, dict(refused or {})
        self._tasks = {task.name: task for task in tasks}

    def __getitem__(self, name: str) -> Task:
        if name not in self._tasks:
            raise KeyError(f"no task {name!r} in {self.path}; it has {', '.join(self._tasks)}")
        return self._tasks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def frame(self) -> pd.DataFrame:
        """One row per task: task, models, path (or URL)."""
        import pandas as pd

        rows = [(task.name, _models(task), task.location) for task in self.values()]
        return pd.DataFrame(rows, columns=["task", "models", "path"])


def _models(task: Task) -> int:
    """How many models a task has; none if its files cannot be read, which `check` has told."""
    try:
        return len(task)
    except SharpkitError:
        return 0
