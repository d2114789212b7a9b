"""Writing networks into stacks, such that none is lost when the process is killed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from sharpkit.errors import ZooFormatError
from sharpkit.files import remove_leftovers
from sharpkit.zoo.stacked.file import (
    Network,
    StackFile,
    metadata_of,
    read_stack,
    write_stack,
)
from sharpkit.zoo.stacked.task import stack_files

_MOST = 64  # networks of a file
_MAX_BYTES = 2**26  # of a file that has more than one
_MAX_TEXT = 2**20  # characters of the metadata of a file that has more than one
_MAX_HELD = 2**28  # bytes of networks that wait in memory
_REMEDY = "copy the file again, or remove it, and its networks are written anew"

# a network that is still in a small file, or in none
_Waiting: TypeAlias = Network | StackFile


class StackWriter:
    """Writes networks into the stacks of one folder.

    A network that is added is on the disk at once, in a file of its own; when there are enough of
    its shape, they are brought together in one file and their own are removed. A file has a higher
    number than those before it, and a network counts as the file with the highest number has it. So
    whenever the process ends, every network that was added is there, and the next writer goes on.

    Args:
        folder: Created if needed.
        at_once: Whether a network is on the disk when `add` returns; else networks wait in memory
            for others of their shape, and `finish` writes the last ones.

    Raises:
        ZooFormatError: A file in the folder is damaged.
    """

    def __init__(self, folder: Path, *, at_once: bool = True) -> None:
        self._folder, self._at_once = folder, at_once
        self._stacks: dict[int, StackFile] = {}
        self._number: dict[str, int] = {}  # of the file that has a network
        self._waiting: dict[Any, dict[str, _Waiting]] = {}  # shape to id to network
        self._held = 0  # bytes of those in memory
        remove_leftovers(folder)
        for number, path in stack_files(folder).items():
            self._stacks[number] = stack = _read(path)
            self._number |= dict.fromkeys(stack.rows, number)
        self._remove_empty()
        for id_, number in self._number.items():
            stack = self._stacks[number]
            if len(stack.rows) < _most(stack.size):
                self._waiting.setdefault(stack.shape, {})[id_] = stack

    def entries(self) -> dict[str, Any]:
        """Id to entry of model_configs.json, of the networks that are on the disk."""
        return {id_: self._stacks[number].entry(id_) for id_, number in self._number.items()}

    def add(self, network: Network) -> None:
        """Add a network, or replace the one of its id."""
        for others in self._waiting.values():
            self._held -= _held(others.pop(network.id, None))
        waiting: _Waiting = network
        if self._at_once:
            waiting = self._write([network])
            self._remove_empty()
        of_shape = self._waiting.setdefault(network.shape, {})
        of_shape[network.id] = waiting
        self._held += _held(waiting)
        if len(of_shape) >= _most(network.size):
            self._bring_together(network.shape)
        elif self._held > _MAX_HELD:
            held = {shape: sum(map(_held, w.values())) for shape, w in self._waiting.items()}
            self._bring_together(max(held, key=lambda shape: held[shape]))

    def finish(self) -> None:
        """Bring together what still has a file of its own, and write what has none."""
        for shape, waiting in list(self._waiting.items()):
            files = {w.path for w in waiting.values() if isinstance(w, StackFile)}
            if len(files) > 1 or any(map(_held, waiting.values())):
                self._bring_together(shape)

    def _bring_together(self, shape: Any) -> None:
        waiting = self._waiting.pop(shape)
        self._held -= sum(map(_held, waiting.values()))
        networks = [_network(id_, waiting[id_]) for id_ in sorted(waiting, key=int)]
        for part in _parts(networks):
            self._write(part)
        self._remove_empty()

    def _write(self, networks: list[Network]) -> StackFile:
        number = max(self._stacks, default=-1) + 1
        path = self._folder / f"networks_{number:06}.safetensors"
        write_stack(path, networks)
        try:
            self._stacks[number] = stack = read_stack(path)
        except ZooFormatError:  # a network whose layers take more than any reader takes
            path.unlink()
            raise
        self._number |= dict.fromkeys(stack.rows, number)
        return stack

    def _remove_empty(self) -> None:
        """Remove files whose networks are all in later ones."""
        there = Counter(self._number.values())
        for number in [n for n in self._stacks if not there[n]]:
            self._stacks.pop(number).path.unlink(missing_ok=True)


def _read(path: Path) -> StackFile:
    try:
        stack = read_stack(path)
    except ZooFormatError as error:
        raise ZooFormatError(f"{error}; {_REMEDY}") from error
    if stack.is_cut_short:
        raise ZooFormatError(f"{path}: was cut short; {_REMEDY}")
    return stack


def _most(size: int) -> int:
    """Networks of a file, by the bytes of one."""
    return max(1, min(_MOST, _MAX_BYTES // max(1, size)))


def _parts(networks: list[Network]) -> Iterator[list[Network]]:
    """Networks that go into one file, as what is said of them is not too long to be read."""
    if len(networks) == 1 or len(metadata_of(networks)) <= _MAX_TEXT:
        yield networks
        return
    half = len(networks) // 2
    yield from _parts(networks[:half])
    yield from _parts(networks[half:])


def _network(id_: str, waiting: _Waiting) -> Network:
    return waiting if isinstance(waiting, Network) else waiting.network(id_)


def _held(waiting: _Waiting | None) -> int:
    """Bytes in memory."""
    return waiting.size if isinstance(waiting, Network) else 0
