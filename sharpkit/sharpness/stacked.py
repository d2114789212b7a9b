"""m-sharpness of many networks, those of one shape together, as one call of the model for all."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sharpkit.contract.checks import Probe, examine, warn_of_unused
from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.holding import frozen, fused_attention
from sharpkit.contract.loading import Data, load_examples
from sharpkit.contract.losses import Loss, MeanLoss, resolve_loss
from sharpkit.contract.network_shape import network_shape
from sharpkit.contract.parameters import floating_parameters, left_out
from sharpkit.contract.precision import current_precision, may_use_tf32
from sharpkit.contract.state import Found
from sharpkit.errors import ArgumentError, ModelError
from sharpkit.groupwise import geometry
from sharpkit.groupwise.batch_passes import BatchPasses
from sharpkit.groupwise.fallback import Disagreement, first_that_works, in_memory, strict_vmap
from sharpkit.groupwise.geometry import Tensors
from sharpkit.groupwise.objective import PlainGradient, is_numbers, plain_gradient
from sharpkit.groupwise.survey import survey
from sharpkit.groupwise.vmap_passes import VmapPasses
from sharpkit.sharpness.blocks import Blocks
from sharpkit.sharpness.m_sharpness import SharpnessResult, m_sharpness, read_grid, result_of
from sharpkit.sharpness.measurement import Groups
from sharpkit.sharpness.stacked_sweep import StackedSweep
from sharpkit.sharpness.sweep_plan import SweepPlan, sweep_plan

# what a network alone and in a stack may differ by: gradients relative to the largest entry, losses
_AGREEMENT = {torch.float64: (1e-6, 1e-9), torch.float32: (1e-2, 1e-3)}
_COARSE = 0.3, 0.1  # of TF32


def m_sharpness_stacked(
    models: Sequence[nn.Module],
    data: Data,
    *,
    m: int | Sequence[int],
    rho: float | Sequence[float],
    loss: Loss = "cross_entropy",
    adaptive: bool = False,
    n: int | None = None,
    seed: int | None = 0,
    parameters: str | Sequence[str] | None = None,
    chunk: int | Literal["auto"] = "auto",
    memory_budget: int | None = None,
) -> list[SharpnessResult | Exception]:
    """m-sharpness of many networks on the same groups: `m_sharpness` of each, up to rounding.

    Networks of one shape (the same layers and settings, names, shapes and dtypes of their tensors)
    are planned once and evaluated together: every operation is one for the groups of all of them,
    which on a GPU costs little more than those of one while the networks are small. BatchNorm
    statistics and parameters that are not perturbed are each network's own.

    Each network's losses and gradients in the stack are compared with those that it has by itself.
    One that differs, has a loss that is not finite, or a gradient whose norm is doubtful, is
    measured alone by `m_sharpness`; so is one of a shape of its own, or all of a shape that cannot
    run side by side, with a warning.

    Args:
        models: Modules in any state; left as they were found.
        data: As for `m_sharpness`, the same for all; so are the following.
        m: Group size in examples; one or several.
        rho: Radius; one or several.
        loss: "cross_entropy", "mse", a torch loss module or a callable.
        adaptive: Measure perturbations in units of |w|.
        n: Number of examples; None for all.
        seed: Order of the examples, the same for all networks.
        parameters: Names or patterns of what is perturbed; None for all that require gradients.
        chunk: Examples of each network evaluated at a time.
        memory_budget: Bytes for one chunk of all networks.

    Returns:
        list: For each network its `SharpnessResult`, or the exception that `m_sharpness` raises for
            it. Of a stack, `seconds` is a network's share, and `peak_memory` that of all.

    Raises:
        ArgumentError: For m or rho out of range, or groups of more examples than there are.
        DataError: If the data cannot be read.

    Source:
        Foret et al., ICLR 2021, section 4.1.

    Example:
        >>> import torch
        >>> networks = [torch.nn.Linear(3, 2) for _ in range(4)]
        >>> data = torch.randn(8, 3), torch.randint(0, 2, (8,))
        >>> results = m_sharpness_stacked(networks, data, m=[1, 4], rho=0.1)
        >>> alone = m_sharpness(networks[2], data, m=[1, 4], rho=0.1)
        >>> bool(abs(results[2].value - alone.value).max() < 1e-5)
        True
    """
    ms, rhos = read_grid(m, rho)
    loss_fn = resolve_loss(loss)
    examples = load_examples(data, n=n, seed=seed)
    if max(ms) > len(examples):
        raise ArgumentError(f"m = {max(ms)} is larger than n = {len(examples)} examples")
    request = _Request(
        examples, ms, rhos, m, rho, loss_fn, adaptive, parameters, chunk, memory_budget
    )
    found: dict[int, SharpnessResult] = {}
    shapes: dict[Any, list[int]] = {}
    for place, model in enumerate(models):
        shapes.setdefault(network_shape(model), []).append(place)
    for places in shapes.values():
        found |= _of_one_shape(request, {place: models[place] for place in places})

    def alone(model: nn.Module) -> SharpnessResult | Exception:
        try:
            return m_sharpness(
                model, data, m=m, rho=rho, loss=loss, adaptive=adaptive, n=n, seed=seed,
                parameters=parameters, chunk=chunk, memory_budget=memory_budget, progress=False,
            )  # fmt: skip
        except Exception as error:  # whatever a network does, the others are measured
            return error

    return [found.get(place) or alone(model) for place, model in enumerate(models)]


@dataclass(frozen=True)
class _Request:
    """What is measured of every network."""

    examples: Examples
    ms: tuple[int, ...]
    rhos: tuple[float, ...]
    m: int | Sequence[int]  # as given
    rho: float | Sequence[float]
    loss: MeanLoss
    adaptive: bool
    parameters: str | Iterable[str] | None
    chunk: int | Literal["auto"]
    memory_budget: int | None


def _of_one_shape(request: _Request, models: dict[int, nn.Module]) -> dict[int, SharpnessResult]:
    """The results of networks of one shape, by place; without those to be measured alone."""
    found: dict[int, SharpnessResult] = {}
    left = list(models)
    while len(left) > 1:
        try:
            with strict_vmap():
                most, of_first = _of_stack(request, {place: models[place] for place in left})
        except ModelError:  # of the first, by which all are planned
            left = left[1:]
            continue
        except Exception as error:
            warnings.warn(
                f"{len(left)} networks of one shape are measured one by one, which is slower, "
                f"because side by side {_because(error)}",
                stacklevel=3,
            )
            break
        found |= of_first
        left = left[most:]
    return found


def _because(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, Disagreement) else f"{type(error).__name__}: {text}"


def _of_stack(
    request: _Request, models: dict[int, nn.Module]
) -> tuple[int, dict[int, SharpnessResult]]:
    """How many of the networks, the first ones, were measured together, and the results by place.

    Raises:
        ModelError: If the first one cannot be measured.
        Disagreement: If none of this shape can be measured side by side.
    """
    began = time.perf_counter()
    if not (request.examples.in_memory and request.examples.uniform):
        raise Disagreement("examples have different shapes, or are read batch by batch")
    first = next(iter(models.values()))
    with frozen(first) as state:
        shape = _planned(request, first, state)
        plan, device = shape.plan, shape.plan.function.device
        most, chunk = len(models), plan.chunk
        if request.chunk == "auto":  # examples of all networks together
            most = min(most, plan.chunk)
            chunk = plan.chunk // most
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        singles = {place: _alone(models[place], shape) for place in [*models][:most]}
        known = {place: single for place, single in singles.items() if single is not None}
        if next(iter(singles)) not in known:
            raise Disagreement("the model gives other outputs each time")
        found = in_memory(lambda chunk: _measured(request, shape, known, chunk), chunk)
        shape.probe.confirm()
        outside = left_out(first, plan.weights)
    peak = plan.memory
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    how: dict[str, Any] = {
        "seconds": (time.perf_counter() - began) / most,
        "engine": "vectorized",
        "parameters": sum(w.numel() for w in plan.weights.values()),
        "left_out": outside,
        "precision": current_precision(),
        "peak_memory": peak,
    }
    return most, {
        place: result_of(levels, request.ms, request.rhos, request.m, request.rho, **how)
        for place, levels in found.items()
        if float(levels[0].weights.sum()) > 0
    }


class _Shape(NamedTuple):
    """What networks of one shape share: a module of theirs, examined, and a plan by sizes."""

    probe: Probe
    plan: SweepPlan
    by_example: list[PlainGradient]  # of each of the probe's examples


class _Single(NamedTuple):
    """A network by itself: all its tensors, and its loss and gradient for the probe's examples."""

    state: Tensors
    found: PlainGradient


def _planned(request: _Request, model: nn.Module, state: Found) -> _Shape:
    """The plan by one of the networks, inside `frozen`, which gave `state`."""
    examples, loss = request.examples, request.loss
    loss = loss.where_all_count(part.labels for part in examples.chunks(len(examples)))
    selected = floating_parameters(model, request.parameters)
    function = FunctionalModel(model, whole=not loss.exact)
    weights = {name: function.value(name) for name in selected}
    probe = examine(function, loss, examples, state)
    if state.entered_eval or function.habits.buffers:
        raise Disagreement("the model has a mode of its own, or keeps state in buffers")
    plan = sweep_plan(
        function, loss, weights, probe, request.ms, request.chunk, request.memory_budget,
        allows_factors=False,
    )  # fmt: skip
    warn_of_unused(plan.unused, weights)
    few = probe.examples
    by_example = [
        plain_gradient(function, loss, weights, few.slice(i, i + 1)) for i in range(len(few))
    ]
    return _Shape(probe, plan, by_example)


def _alone(model: nn.Module, shape: _Shape) -> _Single | None:
    """A network by itself, by plain autograd; None for one that fails."""
    template, loss = shape.plan.function, shape.plan.loss
    try:
        with frozen(model):
            function = FunctionalModel(model, whole=template.whole)
            function.habits.writes_inputs = template.habits.writes_inputs
            state = function.state()
            weights = {name: state[name] for name in shape.plan.weights}
            return _Single(state, plain_gradient(function, loss, weights, shape.probe.examples))
    except Exception:  # told when it is measured by itself
        return None


def _measured(
    request: _Request, shape: _Shape, singles: dict[int, _Single], chunk: int
) -> dict[int, list[Groups]]:
    """What the groups of every m gave, by place; without networks that something is wrong with.

    Raises:
        Disagreement: If none of them can be measured side by side.
    """
    function, loss, selected = shape.plan.function, shape.plan.loss, shape.plan.weights
    weights, rest, well = _stacked([single.state for single in singles.values()], selected)
    alone = [single.found for single in singles.values()]

    def measured(passes: BatchPasses | VmapPasses) -> dict[int, list[Groups]]:
        with passes.held(), fused_attention():
            sweep = StackedSweep(
                passes, passes.packing.joined(weights), rest, request.examples, request.adaptive,
                chunk,
            )  # fmt: skip
            rows = (well & _agrees(sweep, shape, alone)).nonzero().squeeze(1)
            if not len(rows):
                raise Disagreement("each network differs from what it is alone")
            groups, fine = sweep.of(rows).measured(request.ms, request.rhos)
        places = list(singles)
        found = zip(rows.tolist(), groups, fine, strict=True)
        return {places[row]: levels for row, levels, is_well in found if is_well}

    def as_one_batch() -> dict[int, list[Groups]]:
        fixed = {name: t[0] for name, t in rest.items()}
        first = {name: t[0] for name, t in weights.items()}
        found = survey(function, first | fixed, shape.probe.examples)
        if found.refused:
            raise Disagreement(f"as one batch, {found.refused}")
        passes = BatchPasses(function, loss, selected, {}, fixed=fixed, positions=found.positions)
        return measured(passes)

    def transformed() -> dict[int, list[Groups]]:
        reason = shape.probe.try_swapping()
        if reason:
            raise Disagreement(reason)
        return measured(VmapPasses(function, loss, selected))

    return first_that_works(as_one_batch, transformed)


def _stacked(states: Sequence[Tensors], names: Iterable[str]) -> tuple[Tensors, Tensors, Tensor]:
    """The selected parameters of all networks, (networks, *shape), what else differs between them,
    and which networks have finite numbers, and no other difference.
    """
    together = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    weights = {name: together.pop(name) for name in names}
    numbers = [t for t in (*weights.values(), *together.values()) if is_numbers(t)]
    rows = torch.cat([torch.isfinite(t).reshape(len(states), t[0].numel()) for t in numbers], 1)
    well, rest = rows.all(1), {}
    differ = {
        name: (t != t[:1]).reshape(len(states), t[0].numel()).any(1)
        for name, t in together.items()
        if not name.endswith("num_batches_tracked")  # which is not used in eval mode
    }
    anywhere = torch.stack([d.any() for d in differ.values()]).tolist() if differ else []
    for (name, differs), somewhere in zip(differ.items(), anywhere, strict=True):
        if somewhere and together[name].is_floating_point():
            rest[name] = together[name]
        elif somewhere:
            well = well & ~differs
    return weights, rest, well


def _agrees(sweep: StackedSweep, shape: _Shape, singles: Sequence[PlainGradient]) -> Tensor:
    """Whether each network's losses and gradient in the stack are those that it has by itself.

    Raises:
        Disagreement: If single examples of the first one differ, which concerns all.
    """
    few, function = shape.probe.examples, shape.plan.function
    near, close = _COARSE
    if not may_use_tf32(function.device):
        near, close = _AGREEMENT.get(function.dtype, _COARSE)
    examples = sweep.repeated(few)
    each = sweep.gradients(examples, len(few))
    whole, again = each.merged(1), sweep.losses(examples, len(few))

    def agree(side: Blocks, found: Sequence[PlainGradient]) -> Tensor:
        one = _blocks(found, sweep.passes)
        shift = torch.where(torch.isfinite(one.exponent), one.exponent - side.exponent, 0.0)
        gaps = {
            name: t - side.tensors[name] * geometry.expand(torch.exp2(shift), t)
            for name, t in one.tensors.items()
        }
        same = geometry.largest(gaps) <= near * geometry.largest(one.tensors)
        return same & torch.isclose(side.loss, one.loss, close)

    well = agree(whole, singles)
    well &= torch.isclose(again, each.loss, close).view(sweep.networks, -1).all(1)
    first = replace(each, networks=1).slice(0, len(few))
    if not bool(agree(first, shape.by_example).all() | ~well[0]):
        raise Disagreement("gradients differ from those of one group after the other")
    return well


def _blocks(found: Sequence[PlainGradient], passes: BatchPasses | VmapPasses) -> Blocks:
    """Gradients of one set of examples each."""
    tensors = {
        name: torch.stack([torch.zeros_like(w) if g is None else g for g in gradients])
        for (name, w), gradients in zip(
            passes.weights.items(), zip(*(f.gradient for f in found), strict=True), strict=True
        )
    }
    mean, weight, exponent = (
        torch.stack([getattr(f, name) for f in found]) for name in ("mean", "weight", "exponent")
    )
    return Blocks(1, {}, mean, weight, passes.packing.joined(tensors), {}, exponent)
