"""How a step of m-SAM is laid out: groups at a time, and which weights are handled how.

Everything follows from sizes and from a few forward passes, never from timings, and is kept for the
following steps on batches of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from sharpkit.channels_last import NeedsChannelsFirst
from sharpkit.contract.checks import check_rows
from sharpkit.contract.examples import Examples, label_diverse
from sharpkit.contract.holding import unfused_attention
from sharpkit.contract.losses import MeanLoss, check_is_mean, check_labels
from sharpkit.contract.modules import hooked
from sharpkit.contract.precision import may_use_tf32
from sharpkit.contract.recompute import without_checkpointing, without_reentry
from sharpkit.contract.state import Attributes
from sharpkit.groupwise.low_rank import Rows
from sharpkit.groupwise.memory import default_memory_budget, try_gradient
from sharpkit.groupwise.objective import floating_leaves, plain_gradient
from sharpkit.groupwise.one_batch import OneBatch, Point, Positions
from sharpkit.groupwise.survey import GPU, Survey, chunk_that_fills, most_side_by_side, survey
from sharpkit.training.group_passes import StepTask
from sharpkit.training.noise import DrawsOfCalls, Noise

_KEPT_PER_MODEL = 16
_PROBED = 32  # examples that a loss of unknown kind is tried on
_CPU_WORKING_SET = 384 * 2**20
# operations of a forward pass from which a group of two or more examples fills a CPU: WRN-16-4 at
# m = 4 took 1.04 loops alone and 1.12 side by side, ResNet-20 and a small ViT 1.1 and 1.05
_CPU_FULL_GROUP = 2e9
_LAYOUT_TRIED = 8  # examples that a memory layout is tried on
# relative to the largest entry of a gradient: what rounding may change, if it is amplified
_AGREEMENT = {torch.float64: 1e-6, torch.float32: 5e-2}


@dataclass
class StepPlan:
    """How groups of one size are evaluated, for one model, loss and device."""

    groups: int  # at a time; 1 where they run as fast alone
    factored: dict[str, Rows]  # of weights whose perturbations stay in factors
    positions: Positions  # (see `Survey`)
    layout: torch.memory_format  # of groups alone
    outputs: Any  # of one group, without storage
    loss: MeanLoss  # kept, for its identity is in the key
    writes: list[tuple[nn.Module, str]]  # attributes that a forward pass changes
    loss_sees_weights: bool
    one_batch: bool  # whether the model may run as one batch; False once it has not
    unused: frozenset[str]  # weights that the loss does not depend on
    compared: bool = False  # whether groups side by side were found to be right
    loop_only: bool = False  # found not to be vectorisable
    careful: bool = False  # found to have gradients whose squares leave float32
    # compiled passes over chunks by their form (see `compiled_passes`)
    code: dict[Any, Any] = field(default_factory=dict)
    not_compiled: str = ""  # why they are not compiled; empty if they may be


_PLANS: WeakKeyDictionary[nn.Module, dict[Any, StepPlan]] = WeakKeyDictionary()


def step_plan(task: StepTask) -> StepPlan:
    """The plan for groups like the first; the same object for every step that is alike."""
    function, kind = task.model, task.model.device.type
    group = task.examples.slice(0, task.m)
    key = (
        tuple((tuple(t.shape), t.dtype) for t in pytree.tree_leaves(group.inputs)),
        tuple((name, tuple(p.shape)) for name, p in task.shared.items()),
        task.radii.adaptive,
        task.variant,
        function.device,
        function.dtype,
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        tuple(module.training for module in function.model.modules()),
        task.loss.given if isinstance(task.loss.given, str) else id(task.loss.given),
    )
    plans = _PLANS.setdefault(function.model, {})
    if key not in plans:
        if len(plans) >= _KEPT_PER_MODEL:
            plans.clear()
        noise = Noise(function.device)
        with vmap_friendly(function.model), without_reentry():
            plans[key] = _plan(task, group, noise.replay)
        noise.replay()
        function.reset_buffers()
    return plans[key]


def _plan(task: StepTask, group: Examples, replay: Callable[[], None]) -> StepPlan:
    function, weights, loss = task.model, task.shared, task.loss
    attributes = Attributes(function.model)
    with torch.enable_grad(), function.assigned(weights):
        outputs = function.outputs(group.inputs)
        function.habits.attributes = attributes.changed()
        function.habits.remembered = attributes
        check_rows(function.model, outputs, task.m)
        check_labels(task.examples.labels, outputs, loss.given)
        loss.check(outputs, group.labels)
        fixed = pytree.tree_map(_detached, outputs)
        sees_weights = loss(fixed, group.labels).requires_grad
        if not loss.exact:
            _check_loss(task)
    tried = try_gradient(function, loss, weights, group)
    per_group = task.m * tried.bytes
    size = min(task.m, 2)  # statistics of a group need two examples
    with DrawsOfCalls() as draws, without_checkpointing():
        found = survey(function, weights, group, size)
    factored = {} if task.variant.by_name else found.factored(weights, task.m)
    factored = {name: rows for name, rows in factored.items() if name not in task.radii.adaptive}
    dense = sum(w.nbytes for name, w in weights.items() if name not in factored)
    layout = torch.contiguous_format
    if _prefers_channels_last(task, found):
        layout = _layout(task, group.slice(0, _LAYOUT_TRIED), replay)
    groups = _groups_at_a_time(per_group + 3 * dense, task.m, found, function.device)
    one_batch = not found.refused and not sees_weights and draws.are_of_examples
    one_batch = one_batch and (groups == 1 or _keeps_groups_apart(task, found.positions, replay))
    attributes.restore()
    return StepPlan(
        groups,
        factored,
        found.positions,
        layout,
        pytree.tree_map(lambda t: torch.empty_like(t, device="meta"), outputs),
        loss,
        function.habits.attributes,
        sees_weights,
        one_batch,
        frozenset(tried.unused),
    )


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _check_loss(task: StepTask) -> None:
    """Raise unless a loss of unknown kind is a mean over examples."""
    some = task.examples.select(label_diverse(task.examples, _PROBED))
    outputs = task.model.outputs(some.inputs)
    check_is_mean(task.loss, pytree.tree_map(_detached, outputs), some.labels)


def _groups_at_a_time(per_group: int, m: int, found: Survey, device: torch.device) -> int:
    """How many groups of m examples to evaluate together.

    `per_group` is the bytes of its activations, gradient, perturbation and perturbed weights; a CPU
    prefers a working set near its cache.
    """
    on_cpu = device.type != "cuda"
    if m >= found.alone(device):
        return 1
    if on_cpu:
        full = m > 1 and m * found.flops >= _CPU_FULL_GROUP
        groups = max(1, _CPU_WORKING_SET // per_group)
        return 1 if full or m > most_side_by_side(groups * m, device) else groups
    enough = chunk_that_fills(GPU, found.flops, found.calls)
    return max(1, min(default_memory_budget(device) // per_group, enough // m))


def _keeps_groups_apart(task: StepTask, positions: Positions, replay: Callable[[], None]) -> bool:
    """Whether the outputs of a group stay what they are if another lies beside it in the batch."""
    first = torch.arange(task.m)
    found = []
    for other in (first + task.m, first):
        both = task.examples.select(torch.cat([first, other]) % len(task.examples))
        replay()
        with (
            torch.no_grad(),
            without_checkpointing(),
            task.model.assigned(task.shared) as own,
            OneBatch(
                dict(zip(task.shared, own, strict=True)),
                Point(2, task.m, task.shared),
                positions=positions,
            ),
        ):
            outputs = task.model.outputs(both.inputs)
        found.append([t[: task.m] for t in floating_leaves(outputs)])
    rounding = 32 * torch.finfo(task.model.dtype).eps
    if may_use_tf32(task.model.device):  # sums in another order, of products of 10 bits
        rounding = 32 * torch.finfo(torch.float16).eps
    return all(same(a, b, rounding) for a, b in zip(*found, strict=True))


def same(a: Tensor, b: Tensor, rounding: float) -> bool:
    """Whether two tensors are the same but for rounding, relative to the largest entry."""
    largest = float(a.abs().nan_to_num().max()) if a.numel() else 0.0
    within = rounding * largest
    return torch.allclose(a, b, rtol=0.0, atol=within, equal_nan=True)


def _prefers_channels_last(task: StepTask, found: Survey) -> bool:
    """Whether images are faster in channels-last: on a CPU, and where a GPU is busy with TF32."""
    device = task.model.device
    if not any(isinstance(module, nn.Conv2d) for module in task.model.model.modules()):
        return False
    return device.type == "cpu" or (may_use_tf32(device) and task.m >= found.alone(device))


def _layout(task: StepTask, few: Examples, replay: Callable[[], None]) -> torch.memory_format:
    """Channels-last, if it is safe and the model gives the same then."""

    def gradient(layout: torch.memory_format) -> list[Tensor | None]:
        replay()
        found = plain_gradient(task.model, task.loss, task.shared, few, layout=layout)
        return list(found.gradient)

    try:
        with NeedsChannelsFirst() as seen:
            plain = gradient(torch.contiguous_format)
        if seen.found or differ(task, plain, gradient(torch.channels_last)):
            return torch.contiguous_format
    except Exception:  # a view of what is no longer contiguous; other errors come again
        return torch.contiguous_format
    return torch.channels_last


def differ(task: StepTask, a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    """Whether two gradients differ by more than rounding."""
    tolerance = agreement(task)
    pairs = [
        (torch.zeros_like(p) if x is None else x, torch.zeros_like(p) if y is None else y)
        for p, x, y in zip(task.shared.values(), a, b, strict=True)
    ]
    largest = max((float(x.abs().amax()) for x, _ in pairs if x.numel()), default=0.0)
    if not math.isfinite(largest):
        return False
    return any(not bool(((x - y).abs() <= tolerance * largest).all()) for x, y in pairs)


def agreement(task: StepTask) -> float:
    """What rounding may change, relative to the largest entry of a gradient."""
    device = task.model.device
    if torch.is_autocast_enabled(device.type) or may_use_tf32(device):
        return 0.5
    return _AGREEMENT.get(task.model.dtype, 0.5)


@contextmanager
def vmap_friendly(model: nn.Module) -> Iterator[None]:
    """Use kernels that vmap knows: unfused attention, and BatchNorm that is not of mixed dtype."""

    def widen(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].float() if args[0].dtype != torch.float64 else args[0], *args[1:])

    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    kind = next(model.parameters()).device.type
    hooks = [n.register_forward_pre_hook(widen) for n in norms if torch.is_autocast_enabled(kind)]
    with hooked(hooks), unfused_attention():
        yield
