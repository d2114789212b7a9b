"""The keywords of one layer, taken one by one; what nobody takes is an error.

A builder asks for the keywords that it understands. `Keywords.finish` then refuses every keyword
that was not asked for, except those known to leave inference unchanged.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from sharpkit.doors import shown
from sharpkit.errors import ZooFormatError

_MAX_NAME = 80  # characters of a layer's class
_MAX_AXES = 8

REQUIRED: Any = object()

_INERT = frozenset(
    {"name", "trainable", "seed", "activity_regularizer", "bias_initializer", "bias_regularizer"}
    | {"bias_constraint", "kernel_initializer", "kernel_regularizer", "kernel_constraint"}
)


class Keywords:
    """One layer's flat dict: `layer_name` and the keywords of its constructor.

    Args:
        model: What to call the model in errors (a path or name).
        index: The layer's position in the list.
    """

    def __init__(self, config: Any, *, model: str, index: int) -> None:
        self._model, self.index = model, index
        self.layer = "?"
        if not isinstance(config, dict):
            raise self.error(f"expected a dict with 'layer_name', got {type(config).__name__}")
        self._rest = dict(config)
        layer = self._rest.pop("layer_name", None)
        if not isinstance(layer, str) or len(layer) > _MAX_NAME:
            raise self.error(f"'layer_name' must be a Keras class name, got {shown(layer)}")
        self.layer = layer

    def error(self, message: str) -> ZooFormatError:
        """An error that names the model and this layer."""
        return ZooFormatError(f"{self.where}: {message}")

    @property
    def where(self) -> str:
        """The model and this layer, for errors."""
        return f"{self._model}: layer {self.index} ({self.layer})"

    def _bad(self, key: str, value: Any, expected: str) -> ZooFormatError:
        return self.error(f"keyword {key!r} is {shown(value)}; expected {expected}")

    def take(self, key: str, default: Any = REQUIRED) -> Any:
        """The raw value of a keyword, with whole floats turned into ints."""
        if key not in self._rest:
            if default is REQUIRED:
                raise self.error(f"keyword {key!r} is missing")
            return default
        return _whole(self._rest.pop(key))

    def integer(self, key: str, default: Any = REQUIRED, *, minimum: int = 1) -> int:
        """An int of at least `minimum`."""
        value = self.take(key, default)
        if not _is_int(value) or value < minimum:
            raise self._bad(key, value, f"an integer >= {minimum}")
        return int(value)

    def pair(self, key: str, default: Any = REQUIRED, *, minimum: int = 1) -> tuple[int, int]:
        """One int for both axes or a list of two (height, width)."""
        value = self.take(key, default)
        both = value if isinstance(value, list | tuple) else (value, value)
        if len(both) != 2 or not all(_is_int(v) and v >= minimum for v in both):
            raise self._bad(key, value, f"an integer >= {minimum} or a pair of them")
        return int(both[0]), int(both[1])

    def integers(self, key: str, default: Any = REQUIRED, *, minimum: int = 1) -> tuple[int, ...]:
        """A list of ints."""
        value = self.take(key, default)
        many = value if isinstance(value, list | tuple) else [value]
        if len(many) > _MAX_AXES or not all(_is_int(v) and v >= minimum for v in many):
            raise self._bad(key, value, f"a list of integers >= {minimum}")
        return tuple(int(v) for v in many)

    def number(
        self, key: str, default: Any = REQUIRED, *, low: float = 0.0, high: float = math.inf
    ) -> float:
        """A finite number in [low, high]."""
        value = self.take(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # an int may be beyond every float, which isfinite takes ill
        if not is_number or not low <= value <= min(high, sys.float_info.max):
            raise self._bad(key, value, f"a finite number in [{low}, {high}]")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean (0 and 1 count as such)."""
        value = self.take(key, default)
        if value is not True and value is not False and value not in (0, 1):
            raise self._bad(key, value, "true or false")
        return bool(value)

    def choice(self, key: str, default: Any, choices: tuple[Any, ...]) -> Any:
        """One of the values listed; text in any case."""
        value = self.take(key, default)
        value = value.lower() if isinstance(value, str) else value
        if not any(type(value) is type(c) and value == c for c in choices):
            raise self._bad(key, value, "one of " + ", ".join(map(repr, choices)))
        return value

    def finish(self, input_shape: tuple[int, ...], *inert: str) -> None:
        """Refuse every keyword left, except those that never change inference.

        Args:
            input_shape: The model's input shape in Keras order; if the first layer repeats it,
                it must agree.
            *inert: Further keywords of this layer that do not change inference.
        """
        self.choice("dtype", "float32", ("float32", None))
        if self.index == 0:
            self._check_input_shape(input_shape)
        unknown = sorted(set(self._rest) - _INERT - set(inert))
        if unknown:
            listed = shown(unknown)[1:-1]
            raise self.error(f"unknown keyword {listed}; its effect on the outputs is not known")

    def _check_input_shape(self, input_shape: tuple[int, ...]) -> None:
        for key, skip in (("input_shape", 0), ("batch_input_shape", 1)):
            value = self.take(key, [None] * skip + list(input_shape))
            if not isinstance(value, list | tuple) or tuple(value[skip:]) != input_shape:
                raise self._bad(key, value, f"the model's input_shape {list(input_shape)}")


def _whole(value: Any) -> Any:
    """Floats that are whole numbers as ints, also inside lists."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list | tuple):
        return [_whole(v) for v in value]
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
