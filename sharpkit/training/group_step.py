"""One batch of m-SAM: its groups in chunks, both passes of a chunk one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.holding import run_eagerly
from sharpkit.contract.losses import MeanLoss, check_labels
from sharpkit.contract.state import Attributes
from sharpkit.errors import ModelError
from sharpkit.groupwise.fallback import Disagreement, Engine, vectorised_or_loop
from sharpkit.training.group_passes import Objective, gradients, perturbation, perturbed_gradient
from sharpkit.training.group_plan import Plan, plan_for, vmap_friendly
from sharpkit.training.noise import Noise
from sharpkit.training.radius import Radii
from sharpkit.training.statistics import Averages, Recorder

Result: TypeAlias = tuple[Tensor, list[Tensor | None], Averages]

# relative to the largest entry of a gradient: what rounding may change, if it is amplified
_AGREEMENT = {torch.float64: 1e-6, torch.float32: 5e-2}


@dataclass
class Batch:
    """What one step works on; `scale` multiplies the loss whose gradient is taken."""

    function: FunctionalModel
    examples: Examples
    m: int
    shared: dict[str, Tensor]
    loss: MeanLoss
    radii: Radii
    recorder: Recorder
    scale: Callable[[Tensor], Tensor] = lambda loss: loss


def run(batch: Batch, engine: Engine) -> Result:
    """The mean loss, the gradient of every parameter (None if unused) and BatchNorm's averages.

    Raises:
        ModelError: If the engine is "vectorized" and the model has an operation that cannot be.
    """
    with _no_autocast_cache(), batch.recorder.attached(), _group_errors(batch.m), run_eagerly():
        plan = plan_for(
            batch.function, batch.shared, batch.loss, batch.examples, batch.m, batch.radii
        )
        check_labels(batch.examples.labels, plan.outputs, batch.loss.given)
        noise, habits = Noise(batch.function.device), batch.function.habits
        if plan.writes:  # caches and the like: every pass starts from what they were
            habits.attributes = plan.writes
            habits.remembered = Attributes(batch.function.model)

        def again() -> None:
            noise.replay()
            batch.function.reset_buffers()

        def side_by_side() -> Result:
            if len(batch.examples) >= 2 * batch.m and plan.groups > 1 and not plan.compared:
                _compare(batch, plan)
                batch.function.reset_buffers()
                noise.replay()
                plan.compared = True
            return _chunks(batch, plan, plan.groups)

        result, vectorised = vectorised_or_loop(
            "loop" if plan.loop_only and engine == "auto" else engine,
            side_by_side,
            lambda: _chunks(batch, plan, 1),
            batch.function.model,
            again,
        )
        plan.loop_only |= engine == "auto" and not vectorised
        if habits.remembered is not None:
            habits.remembered.restore()
        return result


def _compare(batch: Batch, plan: Plan) -> None:
    """Raise Disagreement if two groups side by side differ from one after the other.

    Not where the model draws random numbers, which it does in another order then.
    """
    two = replace(batch, examples=batch.examples.slice(0, 2 * batch.m), scale=lambda loss: loss)
    value, one, _ = _chunks(two, plan, 1)
    repeated, again, _ = _chunks(two, plan, 1)
    if not torch.equal(value, repeated) and _differ(batch, one, again):
        return
    if _differ(batch, one, _chunks(two, plan, 2)[1]):
        raise Disagreement("the gradient of a group differs")


def _differ(batch: Batch, a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    tolerance = _AGREEMENT.get(batch.function.dtype, 0.5)
    if torch.is_autocast_enabled(batch.function.device.type):
        tolerance = 0.5
    pairs = [
        (torch.zeros_like(p) if x is None else x, torch.zeros_like(p) if y is None else y)
        for p, x, y in zip(batch.shared.values(), a, b, strict=True)
    ]
    largest = max((float(x.abs().amax()) for x, _ in pairs if x.numel()), default=0.0)
    if not math.isfinite(largest):
        return False
    return any(bool(((x - y).abs() > tolerance * largest).any()) for x, y in pairs)


def _chunks(batch: Batch, plan: Plan, groups: int) -> Result:
    """Both passes over every chunk of at most `groups` groups; the smaller last group alone."""
    n, m = len(batch.examples), batch.m
    whole = n // m * m
    groups = math.ceil(n // m / math.ceil(n // m / groups))  # chunks of nearly equal size
    starts = [*range(0, whole, groups * m), *([whole] if whole < n else [])]
    objective = Objective(
        batch.function, batch.loss, batch.shared, plan.factored, plan.shapes, batch.recorder
    )
    value, weight = torch.zeros((2,), dtype=torch.float64, device=batch.function.device)
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
            shares = found.weight / n
            loss, parts = perturbed_gradient(
                objective, examples, count, epsilon, shares, batch.scale
            )
        # a loss that overflows at w + ε must not pass for a step that went well
        value = value + (found.loss * shares).sum() + 0.0 * loss
        weight = weight + shares.sum()
        averages.add(found.statistics, len(examples) // count, count)
        total = [_sum(a, b) for a, b in zip(total, _apart(parts), strict=True)]
    if float(weight) not in (0.0, 1.0):  # the batch weighs more or less than its examples
        total = [None if g is None else g.div_(weight.to(g.dtype)) for g in total]
        value = value / weight
    return value.to(batch.function.dtype), total, averages


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if total is None or part is None:
        return part if total is None else total
    return total.add_(part)


def _apart(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients to be added to in place: autograd may return one tensor for two parameters."""
    seen: set[int] = set()
    result: list[Tensor | None] = []
    for g in gradients:
        if g is not None:
            storage = g.untyped_storage()
            if storage.data_ptr() in seen or storage.nbytes() != g.nbytes:
                g = g.clone(memory_format=torch.contiguous_format)
            seen.add(g.untyped_storage().data_ptr())
        result.append(g)
    return result


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
    except (ValueError, ModelError) as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ModelError(
            f"BatchNorm in training mode has no statistics for a group of one value per channel "
            f"(m = {m}; the last group of a batch may be smaller): use a larger m, drop the last "
            "examples, or put BatchNorm in eval mode"
        ) from error
