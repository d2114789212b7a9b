"""What a measure is: a callable with a name and a configuration; nothing to inherit from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, cast

from torch import nn
from torch.utils import _pytree as pytree

from sharpkit.contract.distributed_data import DistributedData
from sharpkit.contract.loading import Data
from sharpkit.display import one_row, readable
from sharpkit.errors import ArgumentError, ModelError, SharpkitError

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

_RESERVED = {"task", "model", "measure", "value", "std_error"}
_NEEDS = {"initial": "the network before training", "metrics": "what the zoo recorded"}


@readable(lambda e: f"{e.value:.6g} ± {e.std_error:.2g}", brief=True)
class Estimate(NamedTuple):
    """A value with its standard error (NaN if unknown): what a measure may return.

    The estimators of `sharpkit.curvature` give an `Estimated`, which also says how it was found.
    """

    value: float
    std_error: float = math.nan

    def frame(self) -> pd.DataFrame:
        """One row: value, std_error."""
        return one_row(self)


class Measure(Protocol):
    """A number, or several named by their setting, for a model and its training data.

    Any function with this signature is a measure. Its name is its attribute `name`, else its class
    or function name; its configuration is what its method `configuration()` or else
    `dataclasses.asdict` gives, else empty. With a true attribute `needs_initial` it is also given
    the network before training, as keyword `initial`; with `needs_metrics` what the zoo recorded of
    the model, as keyword `metrics`. With a true attribute `stacks` it has a method
    `of_stack(models, data, *, seed)`, which gives for each of several models what calling it would,
    or the exception that it would raise.
    """

    def __call__(
        self, model: nn.Module, data: Data, *, seed: int
    ) -> float | Estimate | Mapping[str, float | Estimate]:
        """Measure one model.

        Args:
            model: In eval mode.
            data: Its training examples.
            seed: Of every random choice.

        Returns:
            One value, or values by setting; a setting is text like "m=4,rho=0.05". A name alone,
            like "origin", stands for "form=origin".
        """
        ...


def describe(measure: Measure) -> tuple[str, dict[str, Any]]:
    """The name of a measure and its configuration, as it is stored with a run.

    The configuration holds Python's numbers and lists in the place of numpy's and torch's, which
    JSON does not know.

    Example:
        >>> from sharpkit.measures import MSharpness
        >>> name, config = describe(MSharpness(m=[1, 4], rho=0.05))
        >>> name, config["m"]
        ('m_sharpness', (1, 4))
    """
    if not callable(measure) or isinstance(measure, type):
        raise ArgumentError(
            f"{measure!r} is no measure, a callable (model, data, *, seed) such as "
            'MSharpness(m=1, rho=0.1) or make_measure("output_margin")'
        )
    name = getattr(measure, "name", None) or getattr(measure, "__name__", None)
    config: dict[str, Any] = {}
    if hasattr(measure, "configuration"):
        config = measure.configuration()
    elif dataclasses.is_dataclass(measure):
        config = pytree.tree_map(plain, dataclasses.asdict(measure))
    if not isinstance(name, str):
        raise ArgumentError(f"{measure!r} has no name: set the attribute `name`")
    return name, config


def plain(value: Any) -> Any:
    """A number or array of numpy or torch as Python's number or list; anything else as it is.

    Example:
        >>> import numpy as np
        >>> plain(np.arange(3)), plain(np.float64(0.5)), plain("auto")
        ([0, 1, 2], 0.5, 'auto')
    """
    return value.tolist() if hasattr(value, "tolist") else value


def needed(measure: str, need: str, given: T | None) -> T:
    """What a measure needs besides model and data: "initial" or "metrics".

    Raises:
        ArgumentError: If it is not given.

    Example:
        >>> needed("training_steps", "metrics", None)
        Traceback (most recent call last):
        sharpkit.errors.ArgumentError: training_steps needs what the zoo recorded: pass metrics=
    """
    if given is None:
        raise ArgumentError(f"{measure} needs {_NEEDS[need]}: pass {need}=")
    return given


def evaluate_measure(
    measure: Measure,
    model: nn.Module,
    data: Data | DistributedData,
    *,
    seed: int,
    initial: Callable[[], nn.Module] | None = None,
    metrics: Callable[[], Mapping[str, float]] | None = None,
) -> dict[str, Estimate]:
    """The values of a measure by setting ("" if it has just one).

    `initial` and `metrics` load what a measure may need, and are called only if it does.

    Raises:
        ModelError: If a value is not a finite number.
        ArgumentError: If the measure needs the initial network or the metrics, and there are none.
    """
    loaders: dict[str, Callable[[], Any] | None] = {"initial": initial, "metrics": metrics}
    further = {
        need: needed(describe(measure)[0], need, load)()
        for need, load in loaders.items()
        if getattr(measure, f"needs_{need}", False)
    }
    return _checked(measure, cast("Any", measure)(model, data, seed=seed, **further))


def measures_stacks(measure: Measure) -> bool:
    """Whether a measure takes several models at a time, by a method `of_stack`, as its options are.

    Example:
        >>> from sharpkit.measures import MSharpness, make_measure
        >>> measures_stacks(MSharpness(m=1, rho=0.1)), measures_stacks(make_measure("path_norm"))
        (True, False)
    """
    return bool(getattr(measure, "stacks", False))


def evaluate_stack(
    measure: Measure, models: Sequence[nn.Module], data: Data, *, seed: int
) -> list[dict[str, Estimate] | Exception]:
    """What `evaluate_measure` gives or raises for each of several models, measured together."""

    def checked(raw: Any) -> dict[str, Estimate] | Exception:
        try:
            return raw if isinstance(raw, Exception) else _checked(measure, raw)
        except SharpkitError as error:
            return error

    return [checked(raw) for raw in cast("Any", measure).of_stack(models, data, seed=seed)]


def _checked(
    measure: Measure, raw: float | Estimate | Mapping[str, float | Estimate]
) -> dict[str, Estimate]:
    """What a measure gave, as estimates by setting."""
    values = raw if isinstance(raw, Mapping) else {"": raw}
    estimates = {}
    for setting, value in values.items():
        reserved = _RESERVED & set(parse_setting(setting))
        if reserved:
            raise ArgumentError(f"setting {setting!r}: {min(reserved)!r} is a column of its own")
        estimate = value if isinstance(value, Estimate) else Estimate(float(value))
        if not math.isfinite(estimate.value):
            name, _ = describe(measure)
            raise ModelError(f"{name} {setting} is {estimate.value}: expected a finite number")
        estimates[setting] = estimate
    return estimates


def parse_setting(setting: str) -> dict[str, float | int | str]:
    """The columns of a setting; a name alone is a form.

    Example:
        >>> parse_setting("m=4,rho=0.05")
        {'m': 4, 'rho': 0.05}
        >>> parse_setting("origin")
        {'form': 'origin'}
        >>> parse_setting("")
        {}
    """
    if setting and "=" not in setting:
        return {"form": setting}
    columns: dict[str, float | int | str] = {}
    for part in filter(None, setting.split(",")):
        key, _, text = part.partition("=")
        columns[key] = _number(text)
    return columns


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
