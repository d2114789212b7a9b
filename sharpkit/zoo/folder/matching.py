"""Which file each row of a table is about."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sharpkit.doors import reading
from sharpkit.errors import ArgumentError, ZooFormatError
from sharpkit.zoo.files import is_file, is_litter
from sharpkit.zoo.folder.table import Table
from sharpkit.zoo.remote import is_remote

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_WANDB = re.compile(r"(?:offline-)?run-[0-9]{8}_[0-9]{6}-(.+)")  # a folder of wandb's


def find_files(pattern: str | Path) -> tuple[Path, list[Path]]:
    """The folder that a pattern is about, and the files that fit it, 2 before 10.

    A folder stands for all files below it whose names end as those of weights do.

    Raises:
        ArgumentError: It is a URL.
        ZooFormatError: No file fits.
    """
    if is_remote(pattern):
        raise ArgumentError(f"{pattern}: checkpoints with a table must be on this machine")
    with reading(pattern, ZooFormatError, "a pattern of files, such as folder/*.pt"):
        path = Path(pattern).expanduser()
        if path.is_dir():
            root, found = path, [p for p in path.rglob("*") if p.suffix in SUFFIXES]
        elif path.is_file():
            root, found = path.parent, [path]
        else:
            steady = list(takewhile(lambda part: not glob.has_magic(part), path.parts))
            root, rest = Path(*steady), path.parts[len(steady) :]
            found = list(root.glob("/".join(rest))) if rest else []
        files = sorted((p for p in found if not is_litter(p.name) and is_file(p)), key=_in_order)
    if not files:
        raise ZooFormatError(
            f"{pattern}: no such file; expected checkpoints, such as 'folder/*.pt' in quotes"
        )
    return root, files


def _in_order(path: Path) -> list[str | int]:
    """Text and numbers in turns, so that paths compare by both."""
    parts = re.split("([0-9]+)", path.as_posix())
    return [int(part) if k % 2 else part for k, part in enumerate(parts)]


def model_ids(files: Sequence[Path], root: Path) -> list[str]:
    """A name for each file: its path below the folder, without what is the same for all at the end.

    Example:
        >>> model_ids([Path("z/a/files/last.pt"), Path("z/b/files/last.pt")], Path("z"))
        ['a', 'b']
        >>> model_ids([Path("z/net 1.pt"), Path("z/net 2.safetensors")], Path("z"))
        ['net 1', 'net 2']
    """
    whole = [p.relative_to(root) if p.is_relative_to(root) else p for p in files]
    short = whole
    while len(files) > 1 and len({p.name for p in short}) == 1 and all(map(_has_folder, short)):
        short = [p.parent for p in short]
    names = [(p.with_suffix("") if short is whole else p).as_posix() for p in short]
    return names if len(set(names)) == len(names) else [p.as_posix() for p in whole]


def _has_folder(path: Path) -> bool:
    return len(path.parts) > 1


def matched(
    table: Table, columns: Sequence[str], root: Path, files: Sequence[Path]
) -> tuple[str, list[list[int]]]:
    """The column that names files, and for each row the files that it may mean.

    Of several columns, the one by which most rows have one file.

    Raises:
        ZooFormatError: Two columns do so for as many rows, and with different files.
    """
    found: dict[str, list[list[int]]] = {}
    for column in columns:
        matcher = _Matcher(table, column, root, files)
        found[column] = [matcher(row[column]) for row in table.rows]
    alone = {c: sum(len(means) == 1 for means in rows) for c, rows in found.items()}
    best = [c for c in found if alone[c] == max(alone.values())]
    for other in best[1:]:
        if alone[other] and found[other] != found[best[0]]:
            raise ZooFormatError(
                f"{table.name}: {best[0]!r} and {other!r} name different files; say which counts, "
                f"as columns={{'path': {other!r}}} or --column path={other}"
            )
    return best[0], found[best[0]]


class _Matcher:
    """Finds the file that a cell names, among these files.

    In this order, the first that fits any file: a path that is there, from the table's folder or
    the working directory; the end of a file's path; the name of a file without its ending and a
    leading model_, or of a folder above it (also ID for wandb's run-20240131_120000-ID); a path of
    another place whose file name is that of one file and of no other row.
    """

    def __init__(self, table: Table, column: str, root: Path, files: Sequence[Path]) -> None:
        self._places = (table.folder, Path.cwd())
        self._parts = [_below(p, root) for p in files]
        self._whole = {os.path.realpath(p): k for k, p in enumerate(files)}
        self._ends: dict[str, list[int]] = defaultdict(list)
        self._names: dict[str, list[int]] = defaultdict(list)
        for k, parts in enumerate(self._parts):
            self._ends[parts[-1]].append(k)
            for name in _names(parts):
                self._names[name].append(k)
        self._called = Counter(_path(row[column]).name for row in table.rows)

    def __call__(self, cell: str) -> list[int]:
        """Numbers of the files that a cell may mean."""
        path = _path(cell)
        if not path.name:
            return []
        for place in self._places:
            if (number := self._whole.get(os.path.realpath(place / path))) is not None:
                return [number]
        same_name = self._ends.get(path.name, [])
        ends = [k for k in same_name if self._parts[k][-len(path.parts) :] == path.parts]
        if ends:
            return ends
        if len(path.parts) == 1:
            return self._names.get(path.name, [])
        return same_name if len(same_name) == self._called[path.name] == 1 else []


def _path(cell: str) -> Path:
    """The path in a cell, also of a URL file://..."""
    text = cell.strip()
    return Path(unquote(urlsplit(text).path) if text.startswith("file://") else text).expanduser()


def _below(path: Path, root: Path) -> tuple[str, ...]:
    return path.relative_to(root).parts if path.is_relative_to(root) else path.parts


def _names(parts: tuple[str, ...]) -> set[str]:
    """What a file may be called beside its path."""
    *folders, file = parts
    stem = Path(file).stem
    runs = (match[1] for folder in folders if (match := _WANDB.fullmatch(folder)))
    return {*folders, *runs, stem, stem.removeprefix("model_")}
