"""Reading and writing of single files such that neither can leave half a result."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sharpkit.errors import ZooFormatError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """The content of a JSON file; ZooFormatError that names the file if there is none."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ZooFormatError(f"{path}: file is missing") from None
    except OSError as error:
        raise ZooFormatError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise ZooFormatError(f"{path}: not valid JSON ({error})") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    text = json.dumps(content, indent=1, default=_plain)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n")


def list_directory(path: Path) -> list[Path]:
    """The entries of a directory by name, without the litter that archives of macOS bring."""
    try:
        entries = sorted(path.iterdir())
    except FileNotFoundError:
        raise ZooFormatError(f"{path}: directory is missing") from None
    except NotADirectoryError:
        raise ZooFormatError(f"{path}: expected a directory, found a file") from None
    except OSError as error:
        raise ZooFormatError(f"{path}: cannot be read ({error.strerror or error})") from error
    return [e for e in entries if not is_litter(e.name)]


def is_litter(name: str) -> bool:
    """Whether a name is one of those macOS scatters: .DS_Store, __MACOSX, ._*."""
    return name in (".DS_Store", "__MACOSX") or name.startswith("._")


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
