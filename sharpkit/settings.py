"""Settings in TOML files, checked against the fields of a dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sharpkit.doors import shown
from sharpkit.errors import ArgumentError

T = TypeVar("T")
_LARGEST = 10**308  # a larger integer may have no float


def from_table(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """A dataclass from a table of a TOML file; tables inside become the dataclasses of its fields.

    Raises:
        ArgumentError: A name that is not a field, a field missing, a value of the wrong type or
            outside its range; names file, field, what was found and expected.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Training:
        ...     epochs: int
        ...     lr: float = 0.1
        >>> from_table(Training, {"epochs": 3}, "my.toml")
        Training(epochs=3, lr=0.1)
        >>> from_table(Training, {"epochs": "3"}, "my.toml")
        Traceback (most recent call last):
        sharpkit.errors.ArgumentError: my.toml, epochs: found '3', expected int
    """
    if not isinstance(table, Mapping):
        raise ArgumentError(f"{where}: found {shown(table)}, expected a table")
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    for name in table:
        if name not in known:
            raise ArgumentError(
                f"{where}: unknown field {shown(name)}, expected one of {', '.join(known)}"
            )
    for name, field in known.items():
        if name not in table and field.default is MISSING and field.default_factory is MISSING:
            raise ArgumentError(f"{where}: the field {name!r} is missing")
    hints = get_type_hints(cls)
    values = {
        name: checked(value, hints[name], f"{where}, {name}") for name, value in table.items()
    }
    try:
        return cls(**values)
    except ArgumentError as error:
        raise ArgumentError(f"{where}: {error}") from error


def checked(value: Any, hint: Any, where: str) -> Any:
    """A value of a TOML or JSON file as the type that a field has.

    Args:
        value: From the file.
        hint: int, float, str, bool, a dataclass, `Literal[...]`, `tuple[X, ...]`, or one of these
            `| None`.
        where: File and field, for errors.

    Raises:
        ArgumentError: Another type.

    Example:
        >>> checked([1, 2.5], tuple[float, ...], "my.toml, rho")
        (1.0, 2.5)
    """
    if get_origin(hint) in (Union, UnionType):
        if value is None:
            return None
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            known = ", ".join(map(repr, get_args(hint)))
            raise ArgumentError(f"{where}: found {shown(value)}, expected one of {known}")
        return value
    if get_origin(hint) is tuple:
        return checked_list(value, get_args(hint)[0], where)
    if is_dataclass(hint):
        return from_table(hint, value, where)  # type: ignore[arg-type]
    if hint is float and type(value) is int and abs(value) < _LARGEST:
        return float(value)
    if type(value) is not hint:
        raise ArgumentError(f"{where}: found {shown(value)}, expected {hint.__name__}")
    return value


def checked_list(values: Any, hint: Any, where: str) -> tuple[Any, ...]:
    """A TOML list of values of one type; see `checked`."""
    if not isinstance(values, list | tuple):
        raise ArgumentError(f"{where}: found {shown(values)}, expected a list")
    return tuple(checked(value, hint, where) for value in values)


def preset_path(name: str | Path, folder: Path) -> Path:
    """The file of a preset, or a path that ends in .toml; ArgumentError if there is none."""
    if Path(name).suffix == ".toml":
        return Path(name)
    presets = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    if str(name) not in presets:
        raise ArgumentError(
            f"no preset {str(name)!r}: expected a .toml file or one of {', '.join(presets)}"
        )
    return presets[str(name)]
