"""What a landscape and a barrier have in common: one model, data and loss, opened and evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sharpkit.contract.checks import Probe, examine
from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.holding import frozen, fused_attention
from sharpkit.contract.loading import Data, load_examples
from sharpkit.contract.losses import Loss, MeanLoss, resolve_loss
from sharpkit.contract.parameters import Parameters, floating_parameters
from sharpkit.errors import ArgumentError
from sharpkit.groupwise.fallback import Engine, in_memory, vectorised_or_loop
from sharpkit.groupwise.image_layout import image_layout
from sharpkit.groupwise.memory import ResultSizes
from sharpkit.landscapes.batch_norm import layers_with_statistics
from sharpkit.landscapes.passes import Passes, Terms, needs_loop_loss, prefers_side_by_side
from sharpkit.landscapes.states import Tensors
from sharpkit.landscapes.subspace import Subspace
from sharpkit.progress import progress_bar

BatchNorm: TypeAlias = Literal["stored", "recomputed"]
T = TypeVar("T")

# examples at a time: on a CPU as many as have so many bytes of results, for more are a few per cent
# faster each; on a GPU enough to fill it
_CPU_LEAST, _CPU_BATCH, _CPU_BYTES, _GPU_BATCH = 16, 1024, 2**28, 1024


@dataclass(frozen=True)
class Opened:
    """A model that is held still, with what is measured of it."""

    function: FunctionalModel
    loss: MeanLoss
    origin: Tensors  # the parameters that may move
    examples: Examples
    probe: Probe


@dataclass(frozen=True)
class How:
    """How points are evaluated.

    Attributes:
        batch_norm: "stored" or "recomputed" statistics.
        chunk: Examples at a time.
        engine: "auto", "vectorized" or "loop".
        progress: Whether there is a bar.
    """

    batch_norm: BatchNorm
    chunk: int | Literal["auto"]
    engine: Engine
    progress: bool

    def check(self, model: nn.Module) -> None:
        """Raise ArgumentError for what is unknown, or has no meaning for a model."""
        if self.engine not in get_args(Engine):
            raise ArgumentError(
                f'engine must be "auto", "vectorized" or "loop", got {self.engine!r}'
            )
        whole = isinstance(self.chunk, int) and not isinstance(self.chunk, bool)
        if self.chunk != "auto" and not (whole and int(self.chunk) >= 1):
            raise ArgumentError(f'chunk must be "auto" or a positive integer, got {self.chunk!r}')
        if self.batch_norm not in get_args(BatchNorm):
            raise ArgumentError(
                f'batch_norm must be "stored" or "recomputed", got {self.batch_norm!r}'
            )
        if self.batch_norm == "recomputed":
            if not layers_with_statistics(model):
                raise ArgumentError(
                    'batch_norm="recomputed": the model has no BatchNorm with running statistics; '
                    "leave it out"
                )
            if self.engine == "vectorized":
                raise ArgumentError(
                    "statistics are recomputed one point after the other: leave out "
                    'engine="vectorized"'
                )


@contextmanager
def opened(
    model: nn.Module, data: Data, loss: Loss, n: int | None, seed: int, chosen: Parameters
) -> Iterator[Opened]:
    """Inside, the model is held still, and has passed the contract; it is left as it was.

    Raises:
        SharpkitError: As `m_sharpness`; also if the model gives other outputs afterwards.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ArgumentError(f"seed must be a whole number, got {seed!r}")
    loss_fn = resolve_loss(loss)
    with frozen(model) as found:
        names = floating_parameters(model, chosen)
        function = FunctionalModel(model, whole=not loss_fn.exact)
        origin = {name: function.value(name) for name in names}
        if not origin:
            raise ArgumentError("no parameter is selected: those asked for are integers")
        examples = load_examples(data, n=n, seed=seed)
        if examples.in_memory:
            parts = examples.chunks(len(examples))
            loss_fn = loss_fn.where_all_count(part.labels for part in parts)
        probe = examine(function, loss_fn, examples, found)
        yield Opened(function, loss_fn, origin, examples, probe)
        function.reset_buffers()
        probe.confirm()


def evaluate(
    what: Opened,
    subspace: Subspace,
    coefficients: NDArray[np.float64],
    how: How,
    each: Callable[[Terms], T],
) -> tuple[list[T], str]:
    """What `each` makes of the terms of every point, and the engine that computed them."""
    function, probe = what.function, what.probe
    loop_loss = needs_loop_loss(what.loss, probe)
    recompute = how.batch_norm == "recomputed"
    engine = how.engine
    if engine == "auto" and (
        recompute
        or not what.examples.in_memory
        or not prefers_side_by_side(function, what.origin, probe, len(what.examples))
    ):
        engine = "loop"

    def passes(batch: int) -> Passes:
        layout = image_layout(function, probe)
        if engine != "loop":  # convolutions of many points are grouped ones
            layout = torch.contiguous_format
        return Passes(
            function, what.loss, subspace, what.examples, batch, layout, recompute, loop_loss
        )

    def counted(points: Iterator[Terms]) -> list[T]:
        with progress_bar(
            total=len(coefficients), desc="landscape", unit="point", leave=False, delay=2,
            progress=how.progress,
        ) as bar:  # fmt: skip
            found = []
            for terms in points:
                found.append(each(terms))
                bar.update()
            return found

    def measure(batch: int) -> tuple[list[T], bool]:
        run = passes(batch)
        return vectorised_or_loop(
            engine,
            lambda: counted(run.side_by_side(coefficients, probe)),
            lambda: counted(run.one_by_one(coefficients)),
            function.model,
            what="points",
        )

    batch = examples_at_a_time(function, probe) if how.chunk == "auto" else how.chunk
    with fused_attention() if engine == "loop" else nullcontext():
        found, vectorised = in_memory(measure, batch)
    return found, "vectorized" if vectorised else "loop"


def examples_at_a_time(function: FunctionalModel, probe: Probe) -> int:
    """How many examples a forward pass takes; it follows from the size of its results."""
    if function.device.type == "cuda":
        return _GPU_BATCH
    with function.evaluating(), function.assigned({}), ResultSizes() as seen:
        function.outputs(probe.examples.inputs)
    most: int = _CPU_BYTES * len(probe.examples) // max(1, seen.bytes)
    return max(_CPU_LEAST, min(_CPU_BATCH, most))
