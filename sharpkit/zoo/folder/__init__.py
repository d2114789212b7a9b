"""A folder of checkpoints and a table with a row for each, as a task."""

from sharpkit.zoo.folder.task import FolderModel, FolderTask, folder_task

__all__ = ["FolderModel", "FolderTask", "folder_task"]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
