"""The three files of a task of the Small CNN Zoo: layout.csv, metrics.csv.gz and weights.npy."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sharpkit.containers import open_expanded
from sharpkit.doors import reading, shown
from sharpkit.errors import ZooFormatError
from sharpkit.files import open_regular, read_regular

if TYPE_CHECKING:
    import pandas as pd

LAYOUT, METRICS, WEIGHTS = "layout.csv", "metrics.csv.gz", "weights.npy"
ACCURACIES = {"train_accuracy": "train_acc", "test_accuracy": "test_acc"}
RECORDED = ACCURACIES | {"train_loss": "train_loss", "test_loss": "test_loss"}
_MAX_LAYOUT = 2**20
_MAX_WEIGHTS = 2**36  # bytes; they are mapped into memory, not read
_LAYOUT_COLUMNS = ("varname", "start_idx", "end_idx", "shape")
_VARIABLE = re.compile(r"(?:.*/)?(conv2d|dense)(?:_([0-9]{1,6}))?/(kernel|bias)(?::0)?")
_SHAPE = re.compile(r"[(\[] *([0-9]{1,6}(?: *, *[0-9]{1,6}){0,3}) *,? *[)\]]")


class Variable(NamedTuple):
    """A kernel or bias of a layer: where it is in a row of weights, and its shape in Keras."""

    start: int
    end: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A convolution, kernel (height, width, in, out), or the dense layer, kernel (in, out)."""

    kernel: Variable
    bias: Variable


def read_layout(path: Path) -> list[Layer]:
    """The layers in the order of the network, by the names of the variables: conv2d, ..., dense.

    Raises:
        ZooFormatError: The file is missing, lacks a column, or describes another kind of network.
    """
    with reading(path, ZooFormatError, "a table of the columns of weights.npy"):
        rows = list(csv.DictReader(io.StringIO(read_regular(path, _MAX_LAYOUT).decode())))
        missing = [name for name in _LAYOUT_COLUMNS if not rows or name not in rows[0]]
        if missing:
            raise ZooFormatError(
                f"{path}: column {missing[0]!r} is missing; expected {', '.join(_LAYOUT_COLUMNS)}"
            )
        parts: dict[tuple[str, int], dict[str, Variable]] = {}
        for row in rows:
            match = _VARIABLE.fullmatch(row["varname"])
            if match is None:
                raise ZooFormatError(
                    f"{path}: variable {shown(row['varname'])}; expected a kernel or bias of "
                    "conv2d or dense, such as sequential/conv2d_1/kernel:0"
                )
            layer = parts.setdefault((match[1], int(match[2] or 0)), {})
            if match[3] in layer:
                raise ZooFormatError(f"{path}: has {shown(row['varname'])} twice")
            layer[match[3]] = _variable(path, row)
    return _layers(path, parts)


def _variable(path: Path, row: Mapping[str, str]) -> Variable:
    where = f"{path}, {shown(row['varname'])}"
    with reading(where, ZooFormatError, "start, end and shape"):
        match = _SHAPE.fullmatch(row["shape"].strip())
        shape = tuple(map(int, match[1].split(","))) if match else ()
        found = Variable(int(row["start_idx"]), int(row["end_idx"]), shape)
    if not shape or found.start < 0 or found.end - found.start != prod(shape) or not prod(shape):
        raise ZooFormatError(
            f"{where}: columns {found.start} to {found.end}, shape {shown(row['shape'])}; expected "
            "as many columns as the shape has entries"
        )
    return found


def _layers(path: Path, parts: Mapping[tuple[str, int], Mapping[str, Variable]]) -> list[Layer]:
    """The layers, if they make a network: convolutions, each of the channels before it, then one
    dense layer."""
    names = sorted(parts)  # conv2d, by number, before dense
    if [kind for kind, _ in names].count("dense") != 1 or len(names) < 2:
        raise ZooFormatError(f"{path}: {_named(names)}; expected convolutions and one dense layer")
    layers, channels = [], None
    for kind, number in names:
        part = parts[kind, number]
        if set(part) != {"kernel", "bias"}:
            raise ZooFormatError(f"{path}: {_named([(kind, number)])} lacks its kernel or bias")
        kernel, bias = part["kernel"].shape, part["bias"].shape
        fits = len(kernel) == (4 if kind == "conv2d" else 2) and bias == kernel[-1:]
        if not fits or (channels is not None and kernel[-2] != channels):
            raise ZooFormatError(
                f"{path}: {_named([(kind, number)])} has a kernel {kernel} and a bias {bias}, "
                f"which do not fit together, or not the {channels} channels before it"
            )
        layers.append(Layer(part["kernel"], part["bias"]))
        channels = kernel[-1]
    if layers[0].kernel.shape[2] != 1:
        raise ZooFormatError(
            f"{path}: the first kernel is {layers[0].kernel.shape}; expected one channel, grey"
        )
    spans = sorted(v[:2] for layer in layers for v in (layer.kernel, layer.bias))
    if any(before[1] > after[0] for before, after in pairwise(spans)):
        raise ZooFormatError(f"{path}: variables share columns of {WEIGHTS}")
    return layers


def _named(names: list[tuple[str, int]]) -> str:
    return ", ".join(f"{kind}_{number}" if number else kind for kind, number in names)


def read_metrics(path: Path) -> pd.DataFrame:
    """One row per checkpoint, as in the file: modeldir, step, four metrics, and config.* columns.

    Numbers that are no numbers become NaN: they cost their own network.

    Raises:
        ZooFormatError: The file is missing or damaged, lacks a column, or expands too far.
    """
    import pandas as pd

    with reading(path, ZooFormatError, "a gzip file of comma-separated values"):
        with open_expanded(path, ZooFormatError) as file:
            content = io.BytesIO(file.read(file.left + 1))  # one more is refused
        table = pd.read_csv(content, usecols=_wanted, low_memory=False)
        needed = ("modeldir", "step", "config.activation", *RECORDED)
        missing = [name for name in needed if name not in table]
        if missing:
            raise ZooFormatError(
                f"{path}: column {missing[0]!r} is missing; expected {', '.join(needed)}"
            )
        for name in ("step", *RECORDED):
            table[name] = pd.to_numeric(table[name], errors="coerce")
    if table.empty:
        raise ZooFormatError(f"{path}: has no row; expected one for each checkpoint")
    return table


def _wanted(name: str) -> bool:
    return name in ("modeldir", "step", *RECORDED) or name.startswith("config.")


def open_weights(path: Path, rows: int, columns: int) -> NDArray[Any]:
    """weights.npy mapped into memory: a row per checkpoint; nothing is read but what is looked at.

    Args:
        path: The file.
        rows: How many metrics.csv.gz has.
        columns: How many layout.csv needs.

    Raises:
        ZooFormatError: Missing, not an array of floats, or of another shape.
    """
    with reading(path, ZooFormatError, "an array of numpy's format"):
        with open_regular(path, _MAX_WEIGHTS):  # only an ordinary file is mapped
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind != "f":
            raise ZooFormatError(
                f"{path}: {getattr(found, 'dtype', type(found).__name__)} of shape "
                f"{getattr(found, 'shape', '?')}; expected floats with a row for each checkpoint"
            )
    if found.shape[0] != rows or found.shape[1] != columns:
        raise ZooFormatError(
            f"{path}: shape {found.shape}; expected ({rows}, {columns}), as {METRICS} has {rows:,} "
            f"checkpoints and {LAYOUT} {columns:,} columns"
        )
    return found
