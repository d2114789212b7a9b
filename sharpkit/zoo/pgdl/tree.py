"""The PGDL competition's tree of directories: which of them are tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sharpkit.errors import ZooFormatError
from sharpkit.safe_text import printable
from sharpkit.zoo.files import is_folder, list_directory
from sharpkit.zoo.pgdl.task import PgdlTask, model_directories
from sharpkit.zoo.remote import Mirror

EXPECTED = "input_data/<task>/model_<id>/, or a task with model_<id> directories"


def pgdl_tasks(path: Path, mirror: Mirror | None) -> tuple[list[PgdlTask], dict[str, str]]:
    """The tasks below a directory, and why some folders (by printable name) cannot be used as one.

    No file is opened. None of either: this is no zoo of this format.
    """
    refused: dict[str, str] = {}
    for root in _candidates(path):
        if model_directories(root):
            return [_task(root.resolve().name, root, mirror)], {}
        tasks = []
        for folder in list_directory(root):
            if not is_folder(folder) or folder.name == "reference_data":
                continue
            try:
                if model_directories(folder):
                    tasks.append(_task(folder.name, folder, mirror))
                # beside input_data, any folder may lie among the tasks
                elif root.name == "input_data" or is_folder(folder / "dataset_1"):
                    raise ZooFormatError(f"{folder}: task has no model_<id> directory")
            except ZooFormatError as error:
                refused[printable(folder.name)] = printable(str(error))
        if tasks:
            return tasks, refused
    return [], refused


def _task(name: str, path: Path, mirror: Mirror | None) -> PgdlTask:
    """A task, unless its path is one that no table and no database can keep."""
    try:
        str(path.resolve()).encode()
    except UnicodeEncodeError:
        raise ZooFormatError(
            f"{path}: the name of this folder, or of one above it, is not UTF-8; rename it"
        ) from None
    return PgdlTask(name, path, mirror)


def _candidates(path: Path) -> Iterator[Path]:
    """Directories that may hold tasks: input_data below the path, the path, one folder deeper."""
    children = list_directory(path)  # raises if there is nothing to read
    if is_folder(path / "input_data"):
        yield path / "input_data"
        return
    yield path
    for child in children:
        if is_folder(child / "input_data"):
            yield child / "input_data"
