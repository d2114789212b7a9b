"""Files of tensors, read without running code and without more memory than their size allows."""

from __future__ import annotations

import io
import os
import pickletools
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from sharpkit.containers import open_zip
from sharpkit.doors import MAX_DEPTH, MAX_DIGITS, allowed_expansion, parse_json, reading, shown
from sharpkit.errors import SharpkitError
from sharpkit.files import open_regular

_MAX_SAFETENSORS = 2**38  # bytes; they are mapped into memory, not read
_MAX_HEADER = 2**23  # bytes of what names the tensors
_MAX_TENSORS = 30_000
_MAX_STEPS = 25 * _MAX_TENSORS  # of a pickle, about as many as tensors take
_MAX_VALUES = 1_000_000
_LEGACY_PICKLES = 5  # in a file that torch.save wrote before version 1.6, before the values
_PLAIN = {f"{m} {name}" for m in ("builtins", "__builtin__") for name in ("set", "complex")}


def read_safetensors(path: Path, where: str, error: type[SharpkitError]) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, on the CPU.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> from sharpkit.errors import ModelError
        >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> save_file({"w": torch.ones(2)}, path)
        >>> read_safetensors(path, str(path), ModelError)
        {'w': tensor([1., 1.])}
    """
    from safetensors.torch import load_file

    with reading(where, error, "a .safetensors file"):
        with open_regular(path, _MAX_SAFETENSORS) as file:
            _header(file, where, error)
        found: dict[str, Tensor] = load_file(path)
    return found


@dataclass(frozen=True)
class Stored:
    """Where a tensor is in a .safetensors file.

    Args:
        dtype: As the format calls it, such as "F32".
        shape: Its shape.
        start: Of its first byte in the file.
        size: Bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def read_safetensors_header(
    path: Path, where: str, error: type[SharpkitError]
) -> tuple[dict[str, Stored], dict[str, str]]:
    """Where the tensors of a .safetensors file are, and its metadata; the tensors are not read.

    Tensors follow each other without gaps, as the format has it, up to the end of what the header
    states, which a file cut short does not have: see `read_stored`.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> from sharpkit.errors import ModelError
        >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> save_file({"w": torch.ones(2, 3)}, path, {"by": "me"})
        >>> tensors, metadata = read_safetensors_header(path, str(path), ModelError)
        >>> tensors["w"].shape, tensors["w"].size, metadata
        ((2, 3), 24, {'by': 'me'})
    """
    with reading(where, error, "a .safetensors file"):
        with open_regular(path, _MAX_SAFETENSORS) as file:
            header = _header(file, where, error)
            first = file.tell()
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise error(f"{where}: its metadata has values that are no text")
        tensors = {name: _stored(name, entry, first) for name, entry in header.items()}
        for name, stored in sorted(tensors.items(), key=lambda item: item[1].start):
            if stored.start != first:
                raise ValueError(f"{shown(name)} does not begin where the tensor before it ends")
            first += stored.size
    return tensors, metadata


def read_stored(path: Path, parts: Sequence[tuple[int, int]], where: str) -> list[bytes]:
    """Bytes of a file, each part by its first byte and its size; memory is taken for what is there.

    Raises:
        OSError: The file cannot be read.
        ValueError: It ends before.
    """
    with open_regular(path, _MAX_SAFETENSORS) as file:
        size = os.fstat(file.fileno()).st_size
        end = max((start + length for start, length in parts), default=0)
        if end > size:
            raise ValueError(
                f"{where}: it has {size:,} bytes of at least {end:,}: it was cut short"
            )
        found = []
        for start, length in parts:
            file.seek(start)
            found.append(file.read(length))
    return found


def _header(file: IO[bytes], where: str, error: type[SharpkitError]) -> dict[str, Any]:
    """What stands before the values of a .safetensors file; it is read up to these."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > min(size, _MAX_HEADER):
        raise error(
            f"{where}: its header states {length:,} bytes, the file has {size:,}, and at "
            f"most {_MAX_HEADER:,} are read"
        )
    names: dict[str, Any] = parse_json(where, file.read(length), error)
    if len(names) > _MAX_TENSORS:
        raise error(f"{where}: it has {len(names):,} tensors; at most {_MAX_TENSORS:,} are read")
    return names


def _stored(name: str, entry: Any, first: int) -> Stored:
    """A tensor as a header describes it; ValueError if that is no description."""
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    numbers = (*shape, start, stop)
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers) or stop < start:
        raise ValueError(f"{shown(name)} has the shape or the place {shown(entry)}")
    return Stored(str(entry["dtype"]), shape, first + start, stop - start)


def read_torch(path: Path, where: str, error: type[SharpkitError]) -> Any:
    """What `torch.save` wrote, if it is tensors, numbers and text in plain containers.

    Nothing that the file names is run but what makes tensors. Containers are nested no deeper, and
    tensors have no more bytes, than a file of this size needs.

    Example:
        >>> import tempfile
        >>> from sharpkit.errors import ModelError
        >>> path = Path(tempfile.mkdtemp(), "model.pt")
        >>> torch.save({"w": torch.ones(2), "epoch": 3}, path)
        >>> read_torch(path, str(path), ModelError)
        {'w': tensor([1., 1.]), 'epoch': 3}
    """
    with reading(where, error, "a file of torch.save"):
        with open_regular(path) as file:
            stored = os.fstat(file.fileno()).st_size
            packed = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            if not packed:
                pickles = _Bounded(file, stored)
                for _ in range(_LEGACY_PICKLES):
                    _check_pickle(pickles)
        source = _copied(path, stored, error) if packed else path
        content = torch.load(source, map_location="cpu", weights_only=True)
        _check_content(content, stored)
    return content


def _copied(path: Path, stored: int, error: type[SharpkitError]) -> io.BytesIO:
    """An archive of the same records: what torch then reads is what has been looked at."""
    copy = io.BytesIO()
    with open_zip(path, error) as archive, zipfile.ZipFile(copy, "w") as clean:
        records = archive.infolist()
        if len(records) > _MAX_TENSORS:
            raise ValueError(f"it has {len(records):,} records; at most {_MAX_TENSORS:,} are read")
        packed = [r.filename for r in records if r.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ValueError(f"{shown(packed[0])} is compressed, as torch.save does not do")
        if sum(r.file_size for r in records) > stored:
            raise ValueError("its records state more bytes than the file has")
        if len({r.filename for r in records}) < len(records):
            raise ValueError("two records have one name")
        for record in records:
            content = archive.read(record)  # compares the checksum, as torch does not
            if record.filename.lower().endswith(".pkl"):
                _check_pickle(io.BytesIO(content))
            clean.writestr(record.filename, content)
    copy.seek(0)
    return copy


class _Bounded:
    """A file of which nobody asks for more than there is, as memory is taken for what is asked."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size
        self.readline, self.tell = file.readline, file.tell

    def read(self, size: int) -> bytes:
        """At most so many of the next bytes."""
        return self._file.read(min(size, self._size))


def _check_pickle(file: Any) -> None:
    """Go through a pickle without doing what it says; refuse what can take memory of any size."""
    for step, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if step > _MAX_STEPS:
            raise ValueError(f"its pickle has more than {_MAX_STEPS:,} steps")
        if operation.name == "GLOBAL":
            module = str(argument).partition(" ")[0]
            if module.partition(".")[0] not in ("torch", "collections") and argument not in _PLAIN:
                raise ValueError(
                    f"it names {shown(argument)}; only tensors, numbers and text are read"
                )


def _check_content(content: Any, stored: int) -> None:
    """Refuse containers without end, text that is no Unicode, and tensors larger than the file."""
    level, values, size = [content], 0, 0
    for _ in range(MAX_DEPTH):
        if not level:
            return
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                below += [*node, *node.values()]
            elif isinstance(node, list | tuple | set):
                below += node
            elif isinstance(node, Tensor):
                size += _bytes_of(node, stored)
            elif isinstance(node, str):
                node.encode()
            elif isinstance(node, int) and abs(node) >= 10**MAX_DIGITS:
                raise ValueError(f"it has an integer of more than {MAX_DIGITS} digits")
            if len(below) + values > _MAX_VALUES:
                raise ValueError(f"it has more than {_MAX_VALUES:,} values")
        if size > allowed_expansion(stored):
            raise ValueError(f"its tensors have {size:,} bytes, the file has {stored:,}")
        values, level = values + len(below), below
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def _bytes_of(tensor: Tensor, stored: int) -> int:
    """Bytes of a tensor on the CPU whose values the file holds."""
    if tensor.device.type != "cpu":
        raise ValueError(f"it has a tensor on the device {tensor.device}, which has no values")
    if tensor.layout == torch.sparse_coo:
        return sum(_bytes_of(part, stored) for part in (tensor._indices(), tensor._values()))
    if tensor.layout == torch.strided and tensor.untyped_storage().nbytes() > stored:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has more values than the file")
    return tensor.numel() * tensor.element_size()
