"""What an evaluation needs of a zoo: hyperparameter values as integer codes, and the gaps.

`read_configs` turns the content of a `model_configs.json` into arrays once; everything else in
this package works on those arrays. Ids may be written 20, "20" or "model_20" anywhere.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sharpkit.errors import ScoreError
from sharpkit.evaluation.bins import Bins, quantile_bins

if TYPE_CHECKING:
    import pandas as pd

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]
Weights: TypeAlias = NDArray[np.floating]
Measure: TypeAlias = "Mapping[Any, Any] | Any"  # id -> value: a mapping or a pandas Series
Configs: TypeAlias = "Mapping[Any, Any] | Any"  # a Task, or a parsed model_configs.json


@dataclass(frozen=True)
class Grid:
    """The models of a zoo as arrays; values that are the same number are one level."""

    ids: tuple[str, ...]
    names: tuple[str, ...]
    codes: Ints  # (models, hyperparameters): index into levels; -1 where the model has none
    levels: tuple[tuple[str, ...], ...]  # per hyperparameter, the values that occur
    possible: tuple[tuple[str, ...], ...]  # per hyperparameter, the values announced
    gap: Floats  # (models,)
    bins: Mapping[int, Bins] = field(default_factory=dict)  # of continuous hyperparameters

    def __len__(self) -> int:
        """The number of models."""
        return len(self.ids)

    def take(self, rows: Ints | Bools) -> Grid:
        """The same zoo with some of its models; itself if with all of them, in order."""
        if np.asarray(rows).dtype == np.bool_ and np.asarray(rows).all():
            return self
        ids = tuple(np.asarray(self.ids, dtype=object)[rows])
        bins = {column: found.take(rows) for column, found in self.bins.items()}
        codes, gap = self.codes[rows], self.gap[rows]
        return Grid(ids, self.names, codes, self.levels, self.possible, gap, bins)

    @functools.cached_property
    def conditioned(self) -> Grid:
        """The same models as a mutual information sees them: with bins as levels, see `bins`.

        Itself if no hyperparameter is continuous."""
        if not self.bins:
            return self
        codes, levels, possible = self.codes.copy(), list(self.levels), list(self.possible)
        for column, found in self.bins.items():
            codes[:, column] = found.codes
            levels[column] = possible[column] = found.names
        return Grid(self.ids, self.names, codes, tuple(levels), tuple(possible), self.gap)

    @property
    def binned(self) -> dict[str, int]:
        """Names of the continuous hyperparameters, and how many bins each has."""
        return {self.names[column]: len(found.names) for column, found in self.bins.items()}

    @functools.cached_property
    def derived(self) -> dict[tuple[str, tuple[int, ...]], Any]:
        """What was computed from these models and is asked for with every measure."""
        return {}

    def groups(self, columns: Sequence[int]) -> Ints:
        """Group of each model (models,), to read only: together if they share these values.

        Groups are numbered 0, 1, ... without holes; a model that lacks one of the
        hyperparameters gets -1.
        """
        key = "groups", tuple(columns)
        if key not in self.derived:
            groups = self._numbered(columns)
            groups.setflags(write=False)
            self.derived[key] = groups
        found: Ints = self.derived[key]
        return found

    def _numbered(self, columns: Sequence[int]) -> Ints:
        label = np.zeros(len(self), dtype=np.int64)
        known = np.ones(len(self), dtype=np.bool_)
        bound = 1
        for column in columns:
            size = len(self.levels[column]) + 1
            if bound * size >= 2**62:  # renumber before the label overflows
                label, bound = np.unique(label, return_inverse=True)[1], len(self)
            label, bound = label * size + self.codes[:, column] + 1, bound * size
            known &= self.codes[:, column] >= 0
        numbered = np.full(len(self), -1, dtype=np.int64)
        numbered[known] = np.unique(label[known], return_inverse=True)[1]
        return numbered

    def coupled(self, column: int) -> tuple[Ints, Ints, Ints]:
        """Pairs of models that differ in this hyperparameter and in no other.

        Returns:
            tuple: First and second model of each pair, and the setting of the others (pairs,);
                each pair once, settings in increasing order.
        """
        setting = self.groups([h for h in range(len(self.names)) if h != column])
        order = np.argsort(setting, kind="stable")
        order = order[setting[order] >= 0]
        end = np.searchsorted(setting[order], setting[order], side="right")
        later = end - np.arange(len(order)) - 1  # how many models of the setting come after this
        first = np.repeat(np.arange(len(order)), later)
        ahead = np.arange(len(first)) - np.repeat(np.cumsum(later) - later, later)
        i, j = order[first], order[first + 1 + ahead]
        level = self.codes[:, column]
        keep = (level[i] != level[j]) & (level[i] >= 0) & (level[j] >= 0)
        return i[keep], j[keep], setting[i][keep]

    def varying(self) -> list[int]:
        """Columns of the hyperparameters that take at least two values among these models."""
        return [h for h in range(len(self.names)) if len(np.unique(self.codes[:, h])) > 1]


def normal_id(key: object) -> str:
    """The id without its prefix: 20, 20.0, "20" and "model_20" are all "20"."""
    if isinstance(key, float | np.floating) and float(key).is_integer():
        key = int(key)
    return str(key).strip().removeprefix("model_")


def read_configs(configs: Configs) -> Grid:
    """Arrays of the models, hyperparameters and gaps that `configs` describes.

    Raises:
        ScoreError: If there are no models, two ids are the same, or an entry lacks `hparams` or
            the accuracies.
    """
    if isinstance(configs, Grid):
        return configs
    entries: Any = getattr(configs, "model_configs", configs)
    if not isinstance(entries, Mapping):
        raise ScoreError(
            "expected a Task or the content of a model_configs.json (id -> hparams and metrics), "
            f"got {type(configs).__name__}"
        )
    if not entries:
        raise ScoreError("the zoo has no models: model_configs is empty")
    ids = unique_ids(entries, "model_configs")
    hparams = [_part(ids[k], entry, "hparams") for k, entry in enumerate(entries.values())]
    gap = [_gap(ids[k], entry) for k, entry in enumerate(entries.values())]
    names = tuple(map(str, hparams[0]))
    columns, levels, possible = [], [], []
    for name in hparams[0]:
        words: dict[object, str] = {}  # each value as it was first written
        try:
            possible.append(tuple(_word(v, words) for v in hparams[0][name]["possible_values"]))
            values = [
                _word(h[name]["current_value"], words) if name in h else None for h in hparams
            ]
        except (KeyError, TypeError) as error:
            raise ScoreError(
                f"hyperparameter {name!r}: expected possible_values and current_value ({error!r})"
            ) from error
        index: dict[str | None, int] = {}
        for value in values:
            if value is not None:
                index.setdefault(value, len(index))
        index[None] = -1
        columns.append([index[value] for value in values])
        levels.append(tuple(value for value in index if value is not None))
    codes = np.array(columns, dtype=np.int64).reshape(len(names), len(ids)).T
    found = {h: quantile_bins(codes[:, h], levels[h]) for h in range(len(names))}
    bins = {h: of_column for h, of_column in found.items() if of_column is not None}
    gaps = np.array(gap, dtype=np.float64)
    return Grid(ids, names, codes, tuple(levels), tuple(possible), gaps, bins)


def read_measure(measure: Measure, grid: Grid) -> tuple[Floats, Bools]:
    """Value of every model of the grid (models,), NaN where absent, and which models have one.

    Raises:
        ScoreError: If an id is unknown to the zoo or given twice, or a value is not a number.
    """
    if not hasattr(measure, "items"):
        raise ScoreError(
            f"expected a mapping or a Series of id -> value, got {type(measure).__name__}"
        )
    row = {name: k for k, name in enumerate(grid.ids)}
    pairs = list(measure.items())
    given = unique_ids((key for key, _ in pairs), "the measure")
    unknown = [name for name in given if name not in row]
    if unknown:
        raise ScoreError(f"the measure has values for models that the zoo lacks: {listed(unknown)}")
    values = np.full(len(grid), np.nan)
    present = np.zeros(len(grid), dtype=np.bool_)
    for name, (_, value) in zip(given, pairs, strict=True):
        present[row[name]] = value is not None
        values[row[name]] = np.nan if value is None else _number(name, value)
    return values, present


def read_measures(values: pd.DataFrame, grid: Grid) -> Floats:
    """Values (models, measures) of a table with a column per measure; see `read_measure`."""
    columns = [read_measure(values.iloc[:, k], grid)[0] for k in range(values.shape[1])]
    return np.stack(columns, axis=1) if columns else np.empty((len(grid), 0))


def read_comparable(measure: Measure, configs: Configs, least: int = 2) -> tuple[Floats, Grid]:
    """Values and grid of the models that can be compared: value and gap present, neither NaN.

    Warns with the names of the models that are left out.

    Raises:
        ScoreError: If fewer than `least` models remain.
    """
    grid = read_configs(configs)
    values, _ = read_measure(measure, grid)
    usable = ~np.isnan(values) & ~np.isnan(grid.gap)
    left_out = [name for name, keep in zip(grid.ids, usable, strict=True) if not keep]
    if usable.sum() < least:
        raise ScoreError(
            f"{int(usable.sum())} of {len(grid)} models have a value and a gap; "
            f"expected at least {least}"
        )
    if left_out:
        warnings.warn(
            f"{len(left_out)} of {len(grid)} models have no value or no gap and are left out: "
            f"{listed(left_out)}",
            stacklevel=3,
        )
    return values[usable], grid.take(usable)


def unique_ids(keys: Iterable[object], where: str) -> tuple[str, ...]:
    """The keys as normal ids; ScoreError if two of them are the same model."""
    ids = tuple(normal_id(key) for key in keys)
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = [name for name in ids if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
        raise ScoreError(f"{where} names a model twice: {listed(twice)}")
    return ids


def listed(names: Sequence[str], most: int = 8, between: str = ", ") -> str:
    """The names as one phrase, shortened if there are many."""
    more = "" if len(names) <= most else f" and {len(names) - most:,} more"
    return between.join(map(str, names[:most])) + more


def _word(value: object, words: dict[object, str]) -> str:
    """The value's `str()`; of equal numbers (1, 1.0, "1", "1.0"), that of the first."""
    word = str(value)
    try:
        number = float(word.replace("_", "?"))  # 1_0 is a word
    except ValueError:
        return words.setdefault(word, word)
    return words.setdefault(word if math.isnan(number) else number, word)


def _part(name: str, entry: Any, part: str) -> Mapping[str, Any]:
    found = entry.get(part) if isinstance(entry, Mapping) else None
    if not isinstance(found, Mapping):
        raise ScoreError(f"model {name}: expected a mapping {part!r} in its configuration")
    return found


def _gap(name: str, entry: Any) -> float:
    """The difference of the accuracies; of losses, for models that have no accuracies."""
    metrics = _part(name, entry, "metrics")
    try:
        if "train_acc" not in metrics and {"train_loss", "test_loss"} <= set(metrics):
            return float(metrics["test_loss"]) - float(metrics["train_loss"])
        return float(metrics["train_acc"]) - float(metrics["test_acc"])
    except (KeyError, TypeError, ValueError) as error:
        raise ScoreError(
            f"model {name}: expected numbers train_acc and test_acc (or, where there are no "
            "accuracies, train_loss and test_loss) in its metrics, "
            f"got {dict(metrics)!r}"
        ) from error


def _number(name: str, value: Any) -> float:
    if isinstance(value, str | bytes):
        raise ScoreError(f"model {name}: expected a number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ScoreError(f"model {name}: expected a number, got {value!r}") from error
