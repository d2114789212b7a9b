"""How a step of m-SAM is laid out: groups at a time, and which weights are handled how.

Everything follows from sizes and from one forward pass of one group, never from timings, and is
kept for the following steps on batches of the same shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from sharpkit.contract.checks import check_rows
from sharpkit.contract.examples import Examples, label_diverse
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.holding import unfused_attention
from sharpkit.contract.losses import MeanLoss, check_is_mean, check_labels
from sharpkit.contract.recompute import without_reentry
from sharpkit.contract.state import Attributes
from sharpkit.groupwise import low_rank
from sharpkit.groupwise.low_rank import pays
from sharpkit.groupwise.memory import activation_bytes, default_memory_budget
from sharpkit.training.group_passes import Shapes
from sharpkit.training.noise import Noise
from sharpkit.training.radius import Radii

_KEPT_PER_MODEL = 16
_PROBED = 32  # examples that a loss of unknown kind is tried on
# a group this large fills a CPU's vector units and cache by itself: side by side, groups only cost
# the copies that bring their channels together (benchmarks/bench_sam.py)
_FULL_CPU_GROUP = 16
_CPU_WORKING_SET = 96 * 2**20


@dataclass
class Plan:
    """Groups at a time, and how the parameters are handled (see `group_passes.Objective`)."""

    groups: int
    factored: frozenset[str]
    shapes: dict[int, Shapes]
    outputs: Any  # of one group, without storage
    loss: MeanLoss  # kept, for its identity is in the key
    writes: list[tuple[nn.Module, str]]  # attributes that a forward pass changes
    compared: bool = False  # whether groups side by side were found to be right
    loop_only: bool = False  # found not to be vectorisable


_PLANS: WeakKeyDictionary[nn.Module, dict[Any, Plan]] = WeakKeyDictionary()


def plan_for(
    function: FunctionalModel,
    shared: Mapping[str, Tensor],
    loss: MeanLoss,
    examples: Examples,
    m: int,
    radii: Radii,
) -> Plan:
    """The plan for groups like the first; the same object for every step that is alike.

    Args:
        function: The model.
        shared: The trained parameters.
        loss: The loss of a batch.
        examples: The batch, on the model's device.
        m: Examples per group.
        radii: Adaptive parameters are not kept in factors.
    """
    kind = function.device.type
    group = examples.slice(0, m)
    key = (
        tuple((tuple(t.shape), t.dtype) for t in pytree.tree_leaves(group.inputs)),
        tuple((name, tuple(p.shape)) for name, p in shared.items()),
        radii.adaptive,
        function.device,
        function.dtype,
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        tuple(module.training for module in function.model.modules()),
        loss.given if isinstance(loss.given, str) else id(loss.given),
    )
    plans = _PLANS.setdefault(function.model, {})
    if key not in plans:
        if len(plans) >= _KEPT_PER_MODEL:
            plans.clear()
        noise = Noise(function.device)
        with vmap_friendly(function.model), without_reentry():
            plans[key] = _plan(function, shared, loss, examples, m, radii)
        noise.replay()
        function.reset_buffers()
    return plans[key]


def _plan(
    function: FunctionalModel,
    shared: Mapping[str, Tensor],
    loss: MeanLoss,
    examples: Examples,
    m: int,
    radii: Radii,
) -> Plan:
    group = examples.slice(0, m)
    weights = dict(shared)
    matrices = {k: w for k, w in weights.items() if w.ndim == 2 and k not in radii.adaptive}
    shapes: Shapes = {name: [] for name in matrices}
    rows = dict.fromkeys(matrices, 0)

    def rule(name: str, call: int, layer_input: Tensor, out: Tensor) -> Tensor:
        rows[name] += low_rank.rows(layer_input).shape[0]
        shapes[name].append(out.shape)
        return out

    watch = low_rank.Calls(matrices, rule, watch=True)
    loop_only, attributes = False, Attributes(function.model)
    try:
        with torch.no_grad(), watch:
            outputs = function(weights, group.inputs)
    except Exception:  # what cannot run at swapped weights still runs at assigned ones
        loop_only, watch = True, low_rank.Calls({}, rule)
        with torch.enable_grad(), function.assigned(weights):
            outputs = function.outputs(group.inputs)
    writes = attributes.changed()
    function.habits.attributes, function.habits.remembered = writes, attributes
    check_rows(function.model, outputs, m)
    check_labels(examples.labels, outputs, loss.given)
    loss.check(outputs, group.labels)
    if not loss.exact:
        _check_loss(function, weights, loss, examples)
    per_group = activation_bytes(function, weights, loss, group)
    factored = frozenset(
        name
        for name, count in rows.items()
        if count and not loop_only and name not in watch.elsewhere and pays(weights[name], count)
    )
    dense = sum(w.nbytes for name, w in weights.items() if name not in factored)
    attributes.restore()
    return Plan(
        _groups_at_a_time(per_group + 3 * dense, m, function.device),
        factored,
        {m: {name: shapes[name] for name in factored}},
        pytree.tree_map(lambda t: torch.empty_like(t, device="meta"), outputs),
        loss,
        writes,
        loop_only=loop_only,
    )


def _check_loss(
    function: FunctionalModel, weights: Mapping[str, Tensor], loss: MeanLoss, examples: Examples
) -> None:
    """Raise unless a loss of unknown kind is a mean over examples."""
    some = examples.select(label_diverse(examples, _PROBED))
    with torch.enable_grad(), function.assigned(weights):
        outputs = function.outputs(some.inputs)
    detached = pytree.tree_map(lambda t: t.detach(), outputs)
    check_is_mean(loss, detached, some.labels)


def _groups_at_a_time(per_group: int, m: int, device: torch.device) -> int:
    """How many groups of m examples to evaluate together.

    Args:
        per_group: Bytes of a group's activations, gradient, perturbation and perturbed weights.
        m: Examples per group.
        device: A CPU prefers a working set near its cache.
    """
    if device.type == "cpu" and m >= _FULL_CPU_GROUP:
        return 1
    memory = default_memory_budget(device) if device.type == "cuda" else _CPU_WORKING_SET
    return max(1, memory // per_group)


@contextmanager
def vmap_friendly(model: nn.Module) -> Iterator[None]:
    """Use kernels that vmap knows: unfused attention, and BatchNorm that is not of mixed dtype."""

    def widen(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].float() if args[0].dtype != torch.float64 else args[0], *args[1:])

    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    kind = next(model.parameters()).device.type
    hooks = [n.register_forward_pre_hook(widen) for n in norms if torch.is_autocast_enabled(kind)]
    try:
        with unfused_attention():
            yield
    finally:
        for hook in hooks:
            hook.remove()
