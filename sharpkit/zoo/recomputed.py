"""Whether networks of a zoo do on the user's images what was recorded of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from sharpkit.display import one_row, readable
from sharpkit.doors import reading
from sharpkit.errors import SharpkitError, ZooFormatError

if TYPE_CHECKING:
    import pandas as pd

_WORK = 2**36  # multiplications for one network, some seconds
_LEAST = 64  # images, whatever they cost
_ROUNDING = 0.005  # of accuracies of the same images, by another library and precision
_BATCH = 500
_ERRORS = 4  # standard errors of a part of the images
OF_ZOO = 3  # models of a task that are checked where nothing else is said
COLUMNS = ["recomputed_test_acc", "examples", "read_as"]
Way = TypeVar("Way", bound=Hashable)


@runtime_checkable
class Checked(Protocol):
    """A task whose recorded accuracies can be computed again."""

    name: str

    def recomputed(self, id_: str) -> Recomputed:
        """The test accuracy of a model on the images here, beside the recorded one."""

    def read_as(self, id_: str) -> str:
        """How the model was read where its files do not tell, and what other ways give."""


@readable(
    lambda r: f"test accuracy {r.found:.4f} on {r.examples:,} images, recorded {r.recorded:.4f}"
)
@dataclass(frozen=True)
class Recomputed:
    """The test accuracy of one network, computed again.

    Attributes:
        recorded: What the zoo has.
        found: On the test images here.
        examples: How many of them; of large networks, evenly chosen ones.
        tolerance: Largest difference that rounding and the choice of images explain.
    """

    recorded: float
    found: float
    examples: int
    tolerance: float

    def frame(self) -> pd.DataFrame:
        """One row: recorded, found, examples, tolerance, agrees."""
        return one_row(self, agrees=self.agrees)

    @property
    def agrees(self) -> bool:
        """Whether the two are the same accuracy."""
        return abs(self.found - self.recorded) <= self.tolerance

    @property
    def problem(self) -> str:
        """What does not agree, for a table of problems; "" if all does."""
        if self.agrees:
            return ""
        return (
            f"test accuracy is {self.found:.4f} on {self.examples:,} images here, recorded is "
            f"{self.recorded:.4f}: these are not its images, or not its network"
        )


def accuracy_again(model: nn.Module, inputs: Tensor, labels: Tensor, recorded: float) -> Recomputed:
    """The accuracy of a network on test images beside the recorded one.

    Of n images, k are used: all, unless the network takes more than 2^36 multiplications for them.
    With p the recorded accuracy, the tolerance is 0.005 + 4 sqrt(p (1 − p) (1 − k / n) / k), four
    standard errors of a choice without replacement.

    Args:
        model: In eval mode.
        inputs: (n, channels, height, width), float32.
        labels: (n,), int64.
        recorded: From 0 to 1.

    Raises:
        ZooFormatError: The network does not take the images.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.eye(2)
        >>> accuracy_again(model, torch.eye(2).repeat(50, 1), torch.tensor([0, 0] * 50), 0.5).agrees
        True
    """
    n = len(labels)
    with reading("the test images", ZooFormatError, "images that the network takes"):
        k = min(n, max(_LEAST, _WORK // max(_work(model, inputs[:1]), 1)))
        part = torch.arange(k) * n // k
        right = _right(model, inputs[part], labels[part])
    spread = min(max(recorded, 1 / k), 1 - 1 / k) if k > 1 else 0.5
    error = sqrt(spread * (1 - spread) * (1 - k / n) / k)
    return Recomputed(recorded, right / k, k, _ROUNDING + _ERRORS * error)


def best_way(
    ways: Sequence[Way], check: Callable[[Way], Sequence[Recomputed]]
) -> tuple[Way, dict[Way, str]]:
    """The way to read a zoo whose accuracies are nearest to the recorded ones, and what each gave.

    Args:
        ways: In the order in which they are to be preferred.
        check: The accuracies of some networks, read in a way; a way that raises is not taken, but
            the first is if all do.

    Example:
        >>> found = {1: Recomputed(0.9, 0.1, 100, 0.01), 2: Recomputed(0.9, 0.9, 100, 0.01)}
        >>> best_way((1, 2), lambda way: [found[way]])
        (2, {1: '0.1000 for 0.9000', 2: '0.9000 for 0.9000'})
    """
    distances: dict[Way, float] = {}
    told: dict[Way, str] = {}
    for way in ways:
        try:
            found = check(way)
        except SharpkitError as error:
            distances[way], told[way] = inf, str(error)
        else:
            distances[way] = sum(abs(one.found - one.recorded) for one in found)
            told[way] = ", ".join(f"{one.found:.4f} for {one.recorded:.4f}" for one in found)
    return min(distances, key=lambda way: distances[way]), told


def with_accuracies(
    task: object, rows: Iterable[dict[str, Any]], models: int | None
) -> list[dict[str, Any]]:
    """Rows of `zoo_info`, some of them with the accuracies computed again, as `COLUMNS`.

    Args:
        task: One that is not `Checked` leaves the rows as they are.
        rows: Those of its models, each with "problem".
        models: How many, evenly chosen among those that can be read; None for all.
    """
    listed = list(rows)
    if not isinstance(task, Checked) or models == 0:
        return listed
    sound = [row for row in listed if row.get("model") is not None and not row["problem"]]
    count = len(sound) if models is None else min(models, len(sound))
    for k in range(count):
        row = sound[k * len(sound) // count]
        try:
            found = task.recomputed(row["model"])
            values = (found.found, found.examples, task.read_as(row["model"]))
            row |= dict(zip(COLUMNS, values, strict=True)) | {"problem": found.problem}
        except SharpkitError as error:
            message = f"recorded accuracies cannot be checked: {error}"
            return [{"task": task.name, "problem": message}, *listed]
    return listed


@torch.no_grad()
def _right(model: nn.Module, inputs: Tensor, labels: Tensor) -> int:
    batches = zip(torch.split(inputs, _BATCH), torch.split(labels, _BATCH), strict=True)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)


def _work(model: nn.Module, example: Tensor) -> int:
    """Multiplications of convolutions and dense layers for one example."""
    counts: list[int] = []

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        counts.append(output[0].numel() * layer.weight[0].numel())  # type: ignore[index]

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(counts)
