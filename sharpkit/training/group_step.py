"""One batch of m-SAM: its groups in chunks, both passes of a chunk one after the other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.losses import Loss, check_labels, resolve_loss
from sharpkit.errors import ModelError
from sharpkit.sharpness.fallback import NotVectorizable, refuse_slow_vmap
from sharpkit.training.group_passes import Objective, gradients, perturbation, perturbed_loss
from sharpkit.training.group_plan import Plan, plan_for, vmap_friendly
from sharpkit.training.noise import Noise
from sharpkit.training.radius import Radii
from sharpkit.training.statistics import Averages, Recorder

Engine: TypeAlias = Literal["auto", "vectorized", "loop"]
Result: TypeAlias = tuple[Tensor, list[Tensor | None], Averages]


@dataclass
class Batch:
    """What one step works on; `scale` multiplies the loss whose gradient is taken."""

    function: FunctionalModel
    examples: Examples
    m: int
    shared: Mapping[str, Tensor]
    loss: Loss
    radii: Radii
    recorder: Recorder
    scale: Callable[[Tensor], Tensor] | None = None


def run(batch: Batch, engine: Engine) -> Result:
    """The mean loss, the gradient of every parameter (None if unused) and BatchNorm's averages.

    Raises:
        ModelError: If the engine is "vectorized" and the model has an operation that cannot be.
    """
    with _no_autocast_cache(), batch.recorder.attached(), _group_errors(batch.m):
        first = batch.examples.slice(0, batch.m)
        plan = plan_for(batch.function, batch.shared, batch.loss, first, batch.radii)
        check_labels(batch.examples.labels, plan.outputs, batch.loss)
        if engine != "loop" and not plan.loop_only:
            noise = Noise(batch.function.device)
            try:
                with refuse_slow_vmap():
                    return _chunks(batch, plan, plan.groups)
            except NotVectorizable as error:
                if engine == "vectorized":
                    raise ModelError(
                        f"{error.operation} cannot be vectorised: use engine='loop'"
                    ) from error
                warnings.warn(
                    f"{error.operation} cannot be vectorised over groups: using the slower loop",
                    stacklevel=4,
                )
                plan.loop_only = True
                noise.replay()
        return _chunks(batch, plan, 1)


def _chunks(batch: Batch, plan: Plan, groups: int) -> Result:
    """Both passes over every chunk of at most `groups` groups; the smaller last group alone."""
    n, m = len(batch.examples), batch.m
    whole = n // m * m
    groups = math.ceil(n // m / math.ceil(n // m / groups))  # chunks of nearly equal size
    starts = [*range(0, whole, groups * m), *([whole] if whole < n else [])]
    objective = Objective(
        batch.function, resolve_loss(batch.loss), batch.shared,
        plan.factored, plan.layers, plan.shapes, batch.recorder,
    )  # fmt: skip
    value = torch.zeros((), dtype=torch.float64, device=batch.function.device)
    total: list[Tensor | None] = [None for _ in batch.shared]
    averages = Averages()
    for start in starts:
        stop = n if start == whole else min(start + groups * m, whole)
        examples = batch.examples.slice(start, stop)
        count = max(1, len(examples) // m)
        with vmap_friendly(batch.function.model) if count > 1 else nullcontext():
            noise = Noise(batch.function.device)
            found = gradients(objective, examples, count)
            epsilon = perturbation(objective, found, batch.radii)
            noise.replay()
            loss = perturbed_loss(objective, examples, count, epsilon) * (len(examples) / n)
        # a loss that overflows at w + ε must not pass for a step that went well
        value += found.loss.sum() * (len(examples) / count / n) + 0.0 * loss.detach()
        averages.add(found.statistics, len(examples) // count, count)
        scaled = loss if batch.scale is None else batch.scale(loss)
        parts = torch.autograd.grad(scaled, list(batch.shared.values()), allow_unused=True)
        total = [_sum(a, b) for a, b in zip(total, parts, strict=True)]
    return value.to(batch.function.dtype), total, averages


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if total is None or part is None:
        return part if total is None else total
    return total.add_(part)


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Autocast keeps casts of weights by identity, which transforms and perturbations outlive."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextmanager
def _group_errors(m: int) -> Iterator[None]:
    """BatchNorm's refusal of a single value per channel, with the remedy."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ModelError(
            f"BatchNorm in training mode has no statistics for a group of one value per channel "
            f"(m = {m}; the last group of a batch may be smaller): use a larger m, drop the last "
            "examples, or put BatchNorm in eval mode"
        ) from error
