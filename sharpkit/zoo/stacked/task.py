"""Tasks whose networks are in stacks: a few files for thousands of networks.

Beside `dataset_1`, as the competition has it, the folder `networks` has files
`networks_<number>.safetensors`, each a stack (see `file`). A network that is in several counts as
the one with the highest number has it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpkit.display import readable
from sharpkit.doors import reading
from sharpkit.errors import ZooFormatError
from sharpkit.safe_text import printable
from sharpkit.zoo.files import is_file, is_folder, list_directory
from sharpkit.zoo.grid import check_grid, possible_values
from sharpkit.zoo.pgdl import PgdlTask, pgdl_tasks
from sharpkit.zoo.pgdl.model import models_table
from sharpkit.zoo.pgdl.task import candidates, require_text
from sharpkit.zoo.remote import Mirror
from sharpkit.zoo.stacked.file import StackFile, read_stack
from sharpkit.zoo.stacked.model import StackedModel
from sharpkit.zoo.task import Split, known_id

if TYPE_CHECKING:
    import pandas as pd
    from torch.utils.data import TensorDataset

FOLDER = "networks"
EXPECTED = "input_data/<task>/networks/networks_<number>.safetensors"
_NAME = re.compile(r"networks_([0-9]{1,18})\.safetensors")
_ATTEMPTS = 3  # to list files that another process brings together


@readable(lambda t: f"{t.name}, {len(t)} models, in {t.path}", brief=True)
class StackedTask(Mapping[str, StackedModel]):
    """Models by id, in numeric order, with the data they were trained on; all else as `PgdlTask`.

    The headers of the stacks are read when the models are first asked for; of a remote task, that
    copies the stacks here.

    Args:
        name: The task's name.
        path: Its directory, the one with `networks` and `dataset_1`.
        mirror: Of a remote task, what brings its files; they are at their paths after `local`.
    """

    def __init__(self, name: str, path: Path, mirror: Mirror | None = None) -> None:
        self.name, self.path, self.mirror = name, path, mirror
        self._data = PgdlTask(name, path, mirror)  # the same folder: it has the examples
        self._found: tuple[dict[str, StackFile], list[str]] | None = None

    def __getitem__(self, id_: str) -> StackedModel:
        return StackedModel(self, known_id(id_, self._stacks, self.name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._stacks)

    def __len__(self) -> int:
        return len(self._stacks)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": copy.copy(self._data)}  # without the examples

    def frame(self) -> pd.DataFrame:
        """One row per model: task, model, its hyperparameters and its metrics."""
        return models_table(list(self.values()))

    @property
    def _stacks(self) -> dict[str, StackFile]:
        """Model id to the stack that has it, in numeric order; without damaged files.

        Raises:
            DownloadError: The task is remote, and a file cannot be copied.
        """
        return self._read()[0]

    def _stack(self, id_: str) -> StackFile:
        """The stack that has a model now: training that goes on brings files together."""
        found = self._stacks[id_]
        if not is_file(found.local):
            self._found = None
            found = self._stacks.get(id_, found)
        return found

    def _read(self) -> tuple[dict[str, StackFile], list[str]]:
        if self._found is None:
            self._found = read_stacks(self.path / FOLDER, self.mirror)
        return self._found

    @property
    def location(self) -> str:
        """The task's URL if it is remote, else its absolute path."""
        return self._data.location

    def local(self, path: Path) -> Path:
        """As `PgdlTask.local`."""
        return self._data.local(path)

    @cached_property
    def model_configs(self) -> dict[str, Any]:
        """Id -> {"hparams", "metrics"}, as model_configs.json of the competition has it.

        Raises:
            ZooFormatError: A file is no stack, or its header is damaged, so that it cannot be told
                which networks there are; names the files.
        """
        if damaged := self._read()[1]:
            raise ZooFormatError(
                f"{'; '.join(damaged)}. Copy the damaged files again; without them, their networks "
                "would be missing"
            )
        return {id_: stack.entry(id_) for id_, stack in self._stacks.items()}

    @property
    def model_configs_path(self) -> Path:
        """Where the stacks are, which have the entries."""
        return self.path / FOLDER

    @property
    def possible_values(self) -> dict[str, list[Any]]:
        """Hyperparameter name to the values that it takes in this task."""
        return possible_values(self.model_configs)

    def check(self) -> list[str]:
        """What does not fit together in the hyperparameters, and which files were cut short.

        Raises:
            ZooFormatError: As `model_configs`.
        """
        stacks = {stack.path: stack for stack in self._stacks.values()}
        messages = [
            f"{path}: was cut short; its {len(stack.rows):,} networks cannot be loaded"
            for path, stack in stacks.items()
            if stack.is_cut_short
        ]
        if len(self._data):
            messages.append(
                f"{len(self._data)} directories model_<id> beside {FOLDER} are not read"
            )
        with reading(self.model_configs_path, ZooFormatError, "hyperparameters of a grid"):
            return messages + check_grid(self.model_configs)

    def shards(self, split: Split) -> list[Path]:
        """As `PgdlTask.shards`."""
        return self._data.shards(split)

    def files(self, split: Split = "train") -> list[Path]:
        """The shards of a split."""
        return self._data.shards(split)

    def dataset(self, split: Split = "train") -> TensorDataset:
        """As `PgdlTask.dataset`."""
        return self._data.dataset(split)


def stack_files(folder: Path, mirror: Mirror | None = None) -> dict[int, Path]:
    """Number to path of each stack in a folder, in their order."""
    if not is_folder(folder):
        return {}
    children = list_directory(folder) if mirror is None else mirror.children(folder)
    numbered = ((match, path) for path in children if (match := _NAME.fullmatch(path.name)))
    return dict(sorted((int(match[1]), path) for match, path in numbered))


def read_stacks(
    folder: Path, mirror: Mirror | None, attempts: int = _ATTEMPTS
) -> tuple[dict[str, StackFile], list[str]]:
    """Model id to the stack that has it, in numeric order; and what is wrong with other files."""
    found: dict[str, StackFile] = {}
    damaged = []
    for path in stack_files(folder, mirror).values():
        try:
            stack = read_stack(path, path if mirror is None else mirror.fetch(path))
            found |= dict.fromkeys(stack.rows, stack)
        except ZooFormatError as error:
            if mirror is None and not is_file(path) and attempts > 1:
                # since it was listed, its networks have been brought together with others
                return read_stacks(folder, mirror, attempts - 1)
            damaged.append(str(error))
    return {id_: found[id_] for id_ in sorted(found, key=lambda id_: (int(id_), id_))}, damaged


def stacked_tasks(
    path: Path, mirror: Mirror | None
) -> tuple[list[PgdlTask | StackedTask], dict[str, str]]:
    """The tasks below a path if any has stacks, and why the other folders are none.

    Those beside them may be in the competition's layout. No file is opened.
    """
    for root in candidates(path):
        if stack_files(root / FOLDER, mirror):
            require_text(root)
            return [StackedTask(root.resolve().name, root, mirror)], {}
        folders = {f.name: f for f in list_directory(root) if stack_files(f / FOLDER, mirror)}
        if not folders:
            continue
        for folder in folders.values():
            require_text(folder)
        beside, refused = pgdl_tasks(root, mirror)
        tasks: dict[str, PgdlTask | StackedTask] = {task.name: task for task in beside}
        tasks |= {name: StackedTask(name, folder, mirror) for name, folder in folders.items()}
        others = {n: why for n, why in refused.items() if n not in set(map(printable, folders))}
        return [tasks[name] for name in sorted(tasks)], others
    return [], {}
