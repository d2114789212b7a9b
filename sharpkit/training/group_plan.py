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

from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel, unfused_attention
from sharpkit.contract.losses import Loss, check_labels, resolve_loss
from sharpkit.errors import ModelError
from sharpkit.sharpness import low_rank
from sharpkit.sharpness.low_rank import pays
from sharpkit.sharpness.plan import activation_bytes, default_memory_budget
from sharpkit.training.group_passes import Shapes
from sharpkit.training.layer_calls import LayerUses
from sharpkit.training.noise import Noise
from sharpkit.training.radius import Radii

_KEPT_PER_MODEL = 16
# a group this large fills a CPU's vector units and cache by itself: side by side, groups only cost
# the copies that bring their channels together (benchmarks/bench_sam.py)
_FULL_CPU_GROUP = 16
_CPU_WORKING_SET = 96 * 2**20


@dataclass
class Plan:
    """Groups at a time, and how the parameters are handled (see `group_passes.Objective`)."""

    groups: int
    factored: frozenset[str]
    layers: frozenset[str]
    shapes: dict[int, Shapes]
    outputs: Tensor  # of one group, without storage
    loop_only: bool = False  # found not to be vectorisable


_PLANS: WeakKeyDictionary[nn.Module, dict[Any, Plan]] = WeakKeyDictionary()


def plan_for(
    function: FunctionalModel,
    shared: Mapping[str, Tensor],
    loss: Loss,
    group: Examples,
    radii: Radii,
) -> Plan:
    """The plan for groups like the given one; the same object for every step that is alike.

    Args:
        function: The model.
        shared: The trained parameters.
        loss: Mean loss of a batch.
        group: The first group, on the model's device.
        radii: Adaptive parameters are not kept in factors.
    """
    kind = function.device.type
    key = (
        tuple((tuple(t.shape), t.dtype) for t in pytree.tree_leaves(group.inputs)),
        tuple((name, tuple(p.shape)) for name, p in shared.items()),
        radii.adaptive,
        function.device,
        function.dtype,
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        tuple(module.training for module in function.model.modules()),
    )
    plans = _PLANS.setdefault(function.model, {})
    if key not in plans:
        if len(plans) >= _KEPT_PER_MODEL:
            plans.clear()
        plans[key] = _plan(function, shared, loss, group, radii)
    return plans[key]


def _plan(
    function: FunctionalModel,
    shared: Mapping[str, Tensor],
    loss: Loss,
    group: Examples,
    radii: Radii,
) -> Plan:
    m = len(group)
    weights = {name: p.detach() for name, p in shared.items()}
    matrices = {k: w for k, w in weights.items() if w.ndim == 2 and k not in radii.adaptive}
    shapes: Shapes = {name: [] for name in matrices}
    rows = dict.fromkeys(matrices, 0)

    def rule(name: str, call: int, layer_input: Tensor, out: Tensor) -> Tensor:
        rows[name] += low_rank.rows(layer_input).shape[0]
        shapes[name].append(out.shape)
        return out

    uses = LayerUses(weights)
    noise = Noise(function.device)
    with vmap_friendly(function.model):
        with torch.no_grad(), uses, low_rank.Calls(matrices, rule, watch=True) as calls:
            outputs = function(weights, group.inputs)
        if outputs.ndim == 0 or len(outputs) != m:
            raise ModelError(
                f"the model returned outputs of shape {tuple(outputs.shape)} for {m} examples: "
                "expected one row of outputs per example"
            )
        check_labels(group.labels, outputs, loss)
        with torch.no_grad():
            value = resolve_loss(loss)(outputs, group.labels)
        if value.ndim != 0:
            raise ModelError(
                f"the loss has shape {tuple(value.shape)}: expected a scalar, the mean over the "
                "examples of a group"
            )
        per_group = activation_bytes(function, weights, resolve_loss(loss), group)
    noise.replay()
    factored = frozenset(
        name
        for name, count in rows.items()
        if count and name not in calls.elsewhere and pays(weights[name], count)
    )
    dense = sum(w.nbytes for name, w in weights.items() if name not in factored)
    return Plan(
        _groups_at_a_time(per_group + 3 * dense, m, function.device),
        factored,
        uses.names(factored),
        {m: {name: shapes[name] for name in factored}},
        torch.empty_like(outputs, device="meta"),
    )


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
