"""The door of every file format: one statement of how much is taken from a file, one kind of error.

Whatever a file declares is compared with these limits before memory is taken for it, and whatever a
parser raises becomes an error of the project that names the file and the field.
"""

from __future__ import annotations

import json
import re
import reprlib
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sharpkit.errors import SharpkitError
from sharpkit.files import read_regular

MAX_EXPANSION = 100  # of compressed content; data hardly compress, and deflate could do 1032 : 1
FREE_BYTES = 2**26  # any file may expand to this much
MAX_JSON_BYTES = 2**26
MAX_JSON_VALUES = 1_000_000  # of some 100 bytes each in memory
MAX_CONFIG_BYTES = 24 * 2**20  # of a zoo's JSON files
MAX_TOML_BYTES = 2**18
MAX_TABLE_BYTES = 2**26  # of a table of models
MAX_DEPTH = 64  # of nested lists and objects
MAX_DIGITS = 300  # of one integer: more has no float64
MAX_LAYERS = 10_000  # of one model
MAX_ARRAYS = 10_000  # of one weight file
MAX_CHUNKS = 2**16  # in which one array is stored
MAX_RECORD_BYTES = 2**25  # of one example of a shard
MAX_MEMBERS = 1_000_000  # of one archive
MAX_DIRECTORY_BYTES = 2**23  # of an archive's list of members, some 80 each

_LONG_INTEGER = re.compile(rb"(?<!\d)\d{%d}" % (MAX_DIGITS + 1))
_LONG_NAME = re.compile(
    rb"""(?<![\w.'"-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){%d}""" % MAX_DEPTH
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 80


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
    except Exception as found:  # a parser raises whatever its layers do
        if isinstance(found, OSError) and found.strerror:  # without one, it is a parser's too
            raise error(f"{where}: cannot be read ({found.strerror})") from found
        raise error(f"{where}: expected {expected} ({reason(found)})") from found


def reason(error: BaseException) -> str:
    """Type and first line of an error, at most 200 characters, as text that any terminal takes."""
    lines = str(error).splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines and lines[0] else type(error).__name__
    return text[:200].encode("utf-8", "backslashreplace").decode()


def shown(value: object) -> str:
    """A value as an error shows it: its `repr`, of long ones the beginning.

    Example:
        >>> shown([8, 8, 3]), shown(list(range(100)))
        ('[8, 8, 3]', '[0, 1, 2, 3, 4, 5, ...]')
    """
    try:
        return _BRIEF.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return f"an integer of more than {MAX_DIGITS} digits"


def allowed_expansion(stored: int) -> int:
    """Bytes to which a file of so many bytes may expand.

    Example:
        >>> allowed_expansion(2**20) // 2**20
        164
    """
    return FREE_BYTES + MAX_EXPANSION * stored


def read_json(path: Path, error: type[SharpkitError], max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The content of a JSON file; one of more bytes is refused before it is read."""
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
        values = json_values(data)
        if values > MAX_JSON_VALUES:
            raise error(f"{where}: has {values:,} values; at most {MAX_JSON_VALUES:,} are read")
        parse_int = _integer if _LONG_INTEGER.search(data) else int
        text = data.decode("utf-8-sig")  # else json takes half pairs, and encodings unsearched here
        try:
            parsed = json.loads(text, parse_int=parse_int, object_pairs_hook=_without_doubles)
        except _ValueError as found:
            raise error(f"{where}: {found}") from None
        except RecursionError:
            raise error(f"{where}: is nested more than {MAX_DEPTH} levels deep") from None
        _require_shallow(where, parsed, error, text=b"\\u" in data)
    return parsed


def json_values(data: bytes) -> int:
    """How many values a JSON text has at most, before it is parsed; a name counts as one.

    Example:
        >>> json_values(b'{"units": [1, 2]}')
        4
    """
    return sum(map(data.count, (b",", b":", b"[", b"{")))


def read_toml(path: Path, error: type[SharpkitError]) -> dict[str, Any]:
    """The content of a TOML file."""
    with reading(path, error, "a TOML file"):
        content = read_regular(path, MAX_TOML_BYTES)
        if _LONG_INTEGER.search(content):
            raise error(f"{path}: has an integer of more than {MAX_DIGITS} digits")
        if _LONG_NAME.search(content):  # tomllib's time grows with the square of the parts
            raise error(f"{path}: has a name of more than {MAX_DEPTH} parts")
        parsed = tomllib.loads(content.decode())
        _require_shallow(path, parsed, error, integers=True)
    return parsed


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _ValueError(f"has an integer of more than {MAX_DIGITS} digits")
    return int(digits)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise _ValueError(f"has the name {shown(name)} twice in one object")
    return content


class _ValueError(ValueError):
    """JSON that Python would take, and sharpkit does not."""


def _require_shallow(
    where: object,
    content: Any,
    error: type[SharpkitError],
    *,
    text: bool = False,
    integers: bool = False,
) -> None:
    """Refuse what is nested so deep that what walks through it overflows, and broken text.

    Integers of any size, which TOML may write in other ways than JSON, are refused if asked for.
    """
    level = [content]
    for _ in range(MAX_DEPTH):
        if text and any(map(_has_broken_text, level)):
            raise error(f"{where}: has text with half of a surrogate pair, which is no Unicode")
        if integers and any(isinstance(n, int) and abs(n) >= 10**MAX_DIGITS for n in level):
            raise error(f"{where}: has an integer of more than {MAX_DIGITS} digits")
        nested = [node for node in level if isinstance(node, dict | list)]
        level = [v for node in nested for v in (node.values() if isinstance(node, dict) else node)]
        if not level:
            return
    raise error(f"{where}: is nested more than {MAX_DEPTH} levels deep")


def _has_broken_text(node: Any) -> bool:
    texts = node if isinstance(node, dict) else (node,)
    return any(isinstance(text, str) and _SURROGATE.search(text) for text in texts)
