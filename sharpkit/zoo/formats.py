"""Opening a zoo, in whichever format it is: a mapping of its tasks by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from sharpkit.display import readable
from sharpkit.errors import SharpkitError, ZooFormatError
from sharpkit.zoo.pgdl import EXPECTED, pgdl_tasks
from sharpkit.zoo.remote import Mirror, is_remote, local_path
from sharpkit.zoo.stacked import EXPECTED as STACKED, stacked_tasks
from sharpkit.zoo.task import Task

if TYPE_CHECKING:
    import pandas as pd

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
}


def load_zoo(path: str | Path) -> Zoo:
    """Open a zoo of trained networks; which of `FORMATS` it has is recognised.

    Of the PGDL competition's format, it accepts the root (`input_data` beside `reference_data`),
    `input_data` itself, a folder of tasks, or one task; model_configs.json may also lie beside the
    models. Models that the file does not list, entries without a model, and incomplete or doubled
    grids are warned about. Tasks whose networks are in stacks (`ZooWriter(layout="stacked")`) may
    lie among them.

    Of a zoo elsewhere, opening reads the listing and model_configs.json; any other file is copied
    into the cache (`SHARPKIT_CACHE`, or the platform's) when it is used, and again if it changes.

    Args:
        path: The directory, or a URL that fsspec knows, such as "s3://bucket/zoo", "gs://...",
            "hf://datasets/...", "https://..." (each needs a package: `sharpkit[remote]`).

    Returns:
        Zoo: Task name to `Task`.

    Raises:
        ZooFormatError: Nothing there, no model, or (for a single task) no usable
            model_configs.json. Of several tasks the good ones load and the others are warned about.
        ArgumentError: A URL of an unknown protocol, or of one whose package is missing.
        DownloadError: The server cannot be reached, or refuses.

    Source:
        Jiang et al., NeurIPS 2020 Competition: Predicting Generalization in Deep Learning.

    Example:
        >>> import torch
        >>> from sharpkit.zoo import embedded_zoo
        >>> zoo = load_zoo(embedded_zoo().path)  # your own directory, such as "public_data"
        >>> model = zoo["fashion_mnist_14x14"]["20"].load()
        >>> model(torch.zeros(1, 1, 14, 14)).shape
        torch.Size([1, 10])
    """
    zoo = find_tasks(path)
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
        or f"{path if mirror is None else mirror.url}: no model found; expected {expected}"
    )


@readable(lambda z: f"{len(z)} tasks, {sum(map(len, z.values()))} models, in {z.path}")
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

        rows = [(task.name, len(task), task.location) for task in self.values()]
        return pd.DataFrame(rows, columns=["task", "models", "path"])
