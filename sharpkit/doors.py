"""The door of every file format: one statement of how much is taken from a file, one kind of error.

Whatever a file declares is compared with these limits before memory is taken for it, and whatever a
parser raises becomes an error of the project that names the file and the field.
"""

from __future__ import annotations

import gzip
import json
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sharpkit.errors import SharpkitError
from sharpkit.files import read_regular

MAX_EXPANSION = 100  # of compressed content; data hardly compress, and deflate could do 1032 : 1
FREE_BYTES = 2**26  # any file may expand to this much
MAX_JSON_BYTES = 2**26
MAX_JSON_VALUES = 2_000_000  # of some 100 bytes each in memory
MAX_TOML_BYTES = 2**18
MAX_DEPTH = 64  # of nested lists and objects
MAX_DIGITS = 300  # of one integer: more has no float64
MAX_LAYERS = 10_000  # of one model
MAX_MEMBERS = 1_000_000  # of one archive

_LONG_INTEGER = re.compile(rb"\d{%d}" % (MAX_DIGITS + 1))
_SURROGATE = re.compile("[\ud800-\udfff]")


@contextmanager
def reading(where: object, error: type[SharpkitError], expected: str) -> Iterator[None]:
    """Turn whatever a block raises into an error that names the file and the field.

    Errors of the project pass as they are; so do MemoryError, KeyboardInterrupt and the like.

    Args:
        where: The file, and the field if there is one.
        error: What is raised instead.
        expected: What should be there, such as "a JSON file".

    Example:
        >>> from sharpkit.errors import ZooFormatError
        >>> with reading("config.json, units", ZooFormatError, "an integer"):
        ...     int("many")
        Traceback (most recent call last):
        sharpkit.errors.ZooFormatError: config.json, units: expected an integer (ValueError: \
invalid literal for int() with base 10: 'many')
    """
    try:
        yield
    except (SharpkitError, MemoryError):
        raise
    except FileNotFoundError as found:
        raise error(f"{where}: file is missing") from found
    except OSError as found:
        raise error(f"{where}: cannot be read ({found.strerror or found})") from found
    except Exception as found:  # a parser raises whatever its layers do
        raise error(f"{where}: expected {expected} ({reason(found)})") from found


def reason(error: BaseException) -> str:
    """Type and first line of an error, at most 200 characters, as text that any terminal takes."""
    lines = str(error).splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines and lines[0] else type(error).__name__
    return text[:200].encode("utf-8", "backslashreplace").decode()


def allowed_expansion(stored: int) -> int:
    """Bytes to which a file of so many bytes may expand.

    Example:
        >>> allowed_expansion(2**20) // 2**20
        164
    """
    return FREE_BYTES + MAX_EXPANSION * stored


def read_json(path: Path, error: type[SharpkitError], max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The content of a JSON file.

    Args:
        path: The file.
        error: What is raised if it cannot be used.
        max_bytes: A larger file is refused before it is read.
    """
    with reading(path, error, "a JSON file"):
        return parse_json(path, read_regular(path, max_bytes), error)


def parse_json(where: object, content: bytes | str, error: type[SharpkitError]) -> Any:
    """JSON text as Python's values, within the limits of depth, number and digits.

    Example:
        >>> from sharpkit.errors import ZooFormatError
        >>> parse_json("config.json", b'{"units": 1' + 400 * b"0" + b"}", ZooFormatError)
        Traceback (most recent call last):
        sharpkit.errors.ZooFormatError: config.json: has an integer of more than 300 digits
    """
    with reading(where, error, "JSON"):
        data = content if isinstance(content, bytes) else content.encode()
        values = sum(data.count(sign) for sign in (b",", b"[", b"{"))
        if values > MAX_JSON_VALUES:
            raise error(f"{where}: has {values:,} values; at most {MAX_JSON_VALUES:,} are read")
        try:
            parsed = json.loads(data, parse_int=_integer if _LONG_INTEGER.search(data) else int)
        except _TooLongError as found:
            raise error(f"{where}: {found}") from None
        _require_shallow(where, parsed, error, text=b"\\u" in data)
    return parsed


def read_toml(path: Path, error: type[SharpkitError]) -> dict[str, Any]:
    """The content of a TOML file."""
    with reading(path, error, "a TOML file"):
        content = read_regular(path, MAX_TOML_BYTES)
        if _LONG_INTEGER.search(content):
            raise error(f"{path}: has an integer of more than {MAX_DIGITS} digits")
        parsed = tomllib.loads(content.decode())
        _require_shallow(path, parsed, error)
    return parsed


def read_gzip(path: Path, error: type[SharpkitError]) -> bytes:
    """The content of a file, decompressed if it is gzip, and no more than a file may expand to."""
    with reading(path, error, "a gzip file"):
        content = read_regular(path)
        if content[:2] != b"\x1f\x8b":
            return content
        limit = allowed_expansion(len(content))
        with gzip.open(path) as file:
            expanded = file.read(limit + 1)
        if len(expanded) > limit:
            raise error(f"{path}: expands to more than {limit:,} bytes, from {len(content):,}")
    return expanded


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _TooLongError(f"has an integer of more than {MAX_DIGITS} digits")
    return int(digits)


class _TooLongError(ValueError):
    """An integer that no float64 holds."""


def _require_shallow(
    where: object, content: Any, error: type[SharpkitError], *, text: bool = False
) -> None:
    """Refuse what is nested so deep that what walks through it overflows, and broken text."""
    level = [content]
    for _ in range(MAX_DEPTH):
        if text and any(map(_has_broken_text, level)):
            raise error(f"{where}: has text with half of a surrogate pair, which is no Unicode")
        nested = [node for node in level if isinstance(node, dict | list)]
        level = [v for node in nested for v in (node.values() if isinstance(node, dict) else node)]
        if not level:
            return
    raise error(f"{where}: is nested more than {MAX_DEPTH} levels deep")


def _has_broken_text(node: Any) -> bool:
    texts = node if isinstance(node, dict) else (node,)
    return any(isinstance(text, str) and _SURROGATE.search(text) for text in texts)
