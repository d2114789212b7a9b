"""One batch of m-SAM: its groups in chunks, both passes of a chunk one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sharpkit.contract.holding import run_eagerly
from sharpkit.contract.losses import check_labels
from sharpkit.contract.state import Attributes
from sharpkit.errors import ModelError
from sharpkit.groupwise.fallback import Disagreement, Engine, first_that_works, vectorised_or_loop
from sharpkit.groupwise.survey import most_side_by_side
from sharpkit.training.batch_norm_statistics import Averages
from sharpkit.training.compiled_passes import AsCompiled, leave_uncompiled, tell
from sharpkit.training.group_passes import (
    Alone,
    AsOneBatch,
    ChunkGradient,
    Passes,
    StepTask,
    Vectorised,
)
from sharpkit.training.noise import Noise
from sharpkit.training.step_plan import StepPlan, differ, step_plan, vmap_friendly


@dataclass(frozen=True)
class Result:
    """What a step gives: the mean loss, the gradients (None if unused), BatchNorm's averages."""

    value: Tensor
    gradient: list[Tensor | None]
    averages: Averages
    finite: bool
    doubtful: bool


Way = type[AsOneBatch] | type[Vectorised] | type[Alone]


def run(task: StepTask, engine: Engine) -> Result:
    """The gradient of a batch.

    Raises:
        ModelError: If the engine is "vectorized" and the model has an operation that cannot be.
    """
    with _no_autocast_cache(), task.recorder.attached(), _group_errors(task.m), run_eagerly():
        plan = step_plan(task)
        check_labels(task.examples.labels, plan.outputs, task.loss.given)
        step, habits = _Step(task, plan, Noise(task.model.device)), task.model.habits
        if task.compile and (engine == "loop" or step.are_alone):
            tell(task, f"groups of {task.m} are evaluated one after the other")
        elif task.compile and not plan.one_batch:
            tell(task, "its groups cannot run as one batch")
        habits.loss_sees_weights = plan.loss_sees_weights
        if plan.writes:  # caches and the like: every pass starts from what they were
            habits.attributes = plan.writes
            habits.remembered = Attributes(task.model.model)
        result, was_vectorised = vectorised_or_loop(
            "loop" if plan.loop_only and engine == "auto" else engine,
            step.side_by_side,
            lambda: step.by(Alone, 1),
            task.model.model,
            step.again,
        )
        plan.loop_only |= engine == "auto" and not was_vectorised
        if habits.remembered is not None:
            habits.remembered.restore()
        return result


class _Step(NamedTuple):
    """The ways of evaluating a batch; what is learnt on one is kept in the plan for the next."""

    task: StepTask
    plan: StepPlan
    noise: Noise

    def again(self) -> None:
        """Random state and buffers as before the batch."""
        self.noise.replay()
        self.task.model.reset_buffers()

    def by(self, way: Way, groups: int) -> Result:
        """Along a way that has proved right, and once more where a norm needs more care."""
        task, plan = self.task, self.plan
        if way is not Alone and not plan.compared and len(task.examples) >= 2 * task.m:
            _compare(task, plan, way)
            self.again()
            plan.compared = True
        result = _chunks(task, plan, way, groups)
        if result.doubtful and not plan.careful:
            plan.careful = True
            self.again()
            result = _chunks(task, plan, way, groups)
        return result

    @property
    def are_alone(self) -> bool:
        """Whether groups run as fast one after the other, by their work or because they are few."""
        task = self.task
        few = task.m > most_side_by_side(len(task.examples), task.model.device)
        return self.plan.groups == 1 or few

    def side_by_side(self) -> Result:
        """All groups of a chunk together."""
        if self.are_alone:
            return self.by(Alone, 1)
        if not self.plan.one_batch:
            return self.by(Vectorised, self.plan.groups)
        return first_that_works(self._as_one_batch, self._under_vmap)

    def _as_one_batch(self) -> Result:
        result = self.by(AsOneBatch, self.plan.groups)
        if not result.finite and self.plan.code:
            self.again()
            plain = replace(self.task, compile=False)
            result = self._replace(task=plain).by(AsOneBatch, self.plan.groups)
            if result.finite:
                leave_uncompiled(self.task, self.plan, "it gave a loss that is not finite then")
        if not result.finite:  # a weight was used otherwise than before, or training diverged
            self.again()
            other = self.by(Alone, 1)
            self.plan.one_batch = not other.finite
            result = other
        return result

    def _under_vmap(self) -> Result:
        self.plan.one_batch = self.plan.compared = False
        self.again()
        return self.by(Vectorised, self.plan.groups)


def _compare(task: StepTask, plan: StepPlan, way: Way) -> None:
    """Raise Disagreement if two groups side by side differ from one after the other.

    Not where the model draws random numbers, which it does in another order then.
    """
    two = replace(
        task, examples=task.examples.slice(0, 2 * task.m), scale=lambda loss: loss, compile=False
    )
    careful = replace(plan, careful=True)
    one, repeated = (_chunks(two, careful, Alone, 1) for _ in range(2))
    draws = task.variant.by_name or not torch.equal(one.value, repeated.value)
    if draws and differ(two, one.gradient, repeated.gradient):
        return
    if differ(two, one.gradient, _chunks(two, careful, way, 2).gradient):
        raise Disagreement("the gradient of a group differs")


def _chunks(task: StepTask, plan: StepPlan, way: Way, groups: int) -> Result:
    """Both passes over every chunk of at most `groups` groups; the smaller last group alone."""
    n, m = len(task.examples), task.m
    way = way if n >= 2 * m else Alone
    compiled = way is AsOneBatch and task.compile and not plan.not_compiled
    passes: Passes = AsCompiled(task, plan) if compiled else way(task, plan)
    whole = n // m * m
    groups = _groups_of_a_chunk(n // m, groups, alike=compiled)
    total, averages = _Total(len(task.shared)), Averages()
    chunks: list[ChunkGradient] = []
    with ExitStack() as stack:
        if isinstance(passes, Alone):
            stack.enter_context(passes.held())
        for start in [*range(0, whole, groups * m), *([whole] if whole < n else [])]:
            stop = n if start == whole else min(start + groups * m, whole)
            examples = task.examples.slice(start, stop)
            count = max(1, len(examples) // m)
            if count == 1 and way is not Alone:
                way, passes = Alone, Alone(task, plan)
            with vmap_friendly(task.model.model) if way is Vectorised else nullcontext():
                found = passes(examples, count)
            averages.add(found.statistics, len(examples) // count, count)
            total.add(found.gradient)
            chunks.append(found._replace(gradient=[], statistics={}))
    weights = torch.cat([found.weight for found in chunks])
    value, weight = torch.dot(torch.cat([found.loss for found in chunks]), weights), weights.sum()
    # a loss that overflows at w + ε must not pass for a step that went well
    value = value + 0.0 * torch.stack([found.after for found in chunks]).sum()
    doubts = torch.stack([found.doubtful for found in chunks]).any()
    mean, whole_weight, doubtful = torch.stack([value, weight, doubts]).tolist()  # the one wait
    if whole_weight:
        value = value / whole_weight
    gradient = total.tensors
    if task.variant.combine is not None:  # which is given zeros in their place
        pairs = zip(task.shared, gradient, strict=True)
        gradient = [None if name in plan.unused else g for name, g in pairs]
    if whole_weight not in (0.0, n):  # the batch weighs more or less than its examples
        torch._foreach_div_([g for g in gradient if g is not None], whole_weight / n)
    return Result(value.to(task.model.dtype), gradient, averages, math.isfinite(mean), doubtful > 0)


def _groups_of_a_chunk(groups: int, most: int, *, alike: bool) -> int:
    """Groups of a chunk: nearly equal chunks, or `alike` ones where that costs at most twice more.

    Example:
        >>> [_groups_of_a_chunk(128, 50, alike=alike) for alike in (False, True)]
        [43, 32]
    """
    chunks = math.ceil(groups / most)
    if alike:
        chunks = next((k for k in range(chunks, 2 * chunks) if groups % k == 0), chunks)
    return math.ceil(groups / chunks)


class _Total:
    """The sum of gradients, added up in place; None stays None until there is something."""

    def __init__(self, parameters: int) -> None:
        self.tensors: list[Tensor | None] = [None] * parameters

    @torch.no_grad()
    def add(self, more: Sequence[Tensor | None]) -> None:
        """Add the gradients of a chunk."""
        pairs = [
            (a, b) for a, b in zip(self.tensors, more, strict=True)
            if a is not None and b is not None
        ]  # fmt: skip
        if pairs:
            torch._foreach_add_([a for a, _ in pairs], [b for _, b in pairs])
        new = [b if a is None else None for a, b in zip(self.tensors, more, strict=True)]
        if any(b is not None for b in new):
            self.tensors = [
                b if a is None else a for a, b in zip(self.tensors, _apart(new), strict=True)
            ]


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
