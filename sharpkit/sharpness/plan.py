"""How a measurement is laid out: examples per chunk, when groups run alone, and in which layout.

All of it follows from sizes, never from timings, so that two runs give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sharpkit.contract.checks import close
from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.losses import MeanLoss
from sharpkit.errors import ArgumentError
from sharpkit.groupwise import low_rank
from sharpkit.groupwise.batch_passes import batch_passes
from sharpkit.groupwise.fallback import Disagreement
from sharpkit.groupwise.geometry import Tensors
from sharpkit.groupwise.low_rank import pays
from sharpkit.groupwise.memory import activation_bytes, default_memory_budget
from sharpkit.groupwise.objective import Objective, in_layout
from sharpkit.groupwise.packing import Packing
from sharpkit.groupwise.survey import GPU, Survey, chunk_that_fills, survey
from sharpkit.sharpness.ascent import Ascent
from sharpkit.sharpness.passes import OneBatchPasses, Transformed

# activations of a chunk that run fastest on a CPU: they stay in its cache, and are enough work for
# the calls that evaluate them (benchmarks/bench_speed.py)
_CPU_ACTIVATIONS = 40 * 2**20
_CPU_CHUNKS = (32, 128)  # at least and at most, where memory allows it


@dataclass(frozen=True)
class Plan:
    """How examples are cut (see `Objective`), for one model, loss and device."""

    function: FunctionalModel
    loss: MeanLoss
    weights: Tensors
    chunk: int
    batch: int
    layout: torch.memory_format
    survey: Survey

    def objective(self, chunk: int, *, loop: bool = False) -> Objective:
        """What is measured, in chunks of as many examples; group by group if `loop`."""
        return Objective(
            self.function, self.loss, self.weights, chunk, min(self.batch, max(chunk, 1)),
            1 if loop else self.survey.alone(self.function.device), self.layout,
        )  # fmt: skip

    def one_batch(self) -> OneBatchPasses:
        """Groups as one ordinary batch.

        Raises:
            Disagreement: If the model uses a weight in a way that is not known.
        """
        return OneBatchPasses(batch_passes(self.function, self.loss, self.weights, self.survey))


def plan_of(
    function: FunctionalModel,
    loss: MeanLoss,
    weights: Tensors,
    few: Examples,
    ms: Sequence[int],
    chunk: int | Literal["auto"],
    memory_budget: int | None,
    *,
    allows_factors: bool,
) -> Plan:
    """The plan for a model.

    Args:
        function: The model.
        loss: The loss.
        weights: The perturbed parameters.
        few: Two or more examples, on the model's device.
        ms: Group sizes.
        chunk: Examples at a time, if that was asked for.
        memory_budget: Bytes for a chunk; None for the default.
        allows_factors: Whether gradients may stay in factors.

    Raises:
        ArgumentError: If not even one example fits the budget.
    """
    device = function.device
    layout = _layout(function, few)
    found = survey(function, weights, few)
    if chunk != "auto":
        if not (isinstance(chunk, int) and chunk >= 1):
            raise ArgumentError(f'chunk must be "auto" or a positive integer, got {chunk!r}')
        return Plan(function, loss, weights, chunk, chunk, layout, found)
    budget = default_memory_budget(device) if memory_budget is None else memory_budget
    per_example = activation_bytes(function, weights, loss, few.slice(0, 1))
    factored = found.factored(weights) if allows_factors else {}
    dense = sum(w.nbytes for name, w in weights.items() if name not in factored)
    enough = chunk_that_fills(GPU, found.flops, found.calls) if device.type == "cuda" else None
    size = chunk_size(per_example, dense, ms, budget, enough)
    return Plan(function, loss, weights, size, size, layout, found)


def _layout(function: FunctionalModel, few: Examples) -> torch.memory_format:
    """Channels-last for images on a CPU, where it is the faster one, if the model takes it."""
    images = few.uniform and any(isinstance(m, nn.Conv2d) for m in function.model.modules())
    if function.device.type != "cpu" or not images:
        return torch.contiguous_format
    with function.evaluating(), function.assigned({}):
        plain = function.outputs(few.inputs)
        try:
            other = function.outputs(in_layout(few.inputs, torch.channels_last))
        except Exception:  # a view of what is no longer contiguous
            return torch.contiguous_format
    return torch.channels_last if close(plain, other) else torch.contiguous_format


def transformed(objective: Objective, few: Examples, rule: Ascent) -> Transformed:
    """Groups under vmap.

    Raises:
        Disagreement: If the model cannot run at swapped weights.
    """
    f = objective
    if f.model.habits.not_functional:
        raise Disagreement(f.model.habits.not_functional)
    rows = factored_weights(f.model, f.weights, few.slice(0, 1)) if rule.allows_factors else {}
    return Transformed(objective, Packing(f.weights, frozenset(rows)), rows)


def factored_weights(
    model: FunctionalModel, weights: Tensors, examples: Examples
) -> dict[str, int]:
    """Rows per example of every weight matrix that is used by linear layers and nothing else.

    Args:
        model: The model.
        weights: The perturbed parameters.
        examples: One example, on the model's device.
    """
    matrices = {name: w for name, w in weights.items() if w.ndim == 2}
    rows = dict.fromkeys(matrices, 0)

    def rule(name: str, call: int, layer_input: Tensor, out: Tensor) -> Tensor:
        rows[name] += low_rank.rows(layer_input).shape[0]
        return out

    with model.evaluating(), low_rank.Calls(matrices, rule, watch=True) as calls:
        model(weights, examples.inputs)
    return {
        name: count
        for name, count in rows.items()
        if count and name not in calls.elsewhere and pays(weights[name], count)
    }


def chunk_size(
    per_example: int,
    per_group: int,
    ms: Sequence[int],
    memory_budget: int,
    enough: int | None,
) -> int:
    """Examples per chunk, a power of two.

    Args:
        per_example: Bytes of activations an example needs.
        per_group: Bytes of the gradient and the perturbed weights of a group.
        ms: Group sizes; each m has groups of its own in a chunk.
        memory_budget: Bytes that the chunk may take.
        enough: Examples that fill the device; None for a CPU, which prefers what fits its cache.

    Raises:
        ArgumentError: If not even one example fits the budget.
    """
    block = math.gcd(*ms)

    def bytes_of(chunk: int) -> int:
        # base gradients are held while one m at a time is merged and perturbed
        groups = math.ceil(chunk / block) + math.ceil(chunk / min(ms))
        return chunk * per_example + groups * per_group

    if bytes_of(1) > memory_budget:
        raise ArgumentError(
            f"one example needs {bytes_of(1) / 2**30:.2f} GiB, but memory_budget is "
            f"{memory_budget / 2**30:.2f} GiB"
        )
    chunk, ceiling = 1, enough or 0
    if enough is None:
        low, high = _CPU_CHUNKS
        ceiling = min(high, max(low, _CPU_ACTIVATIONS // max(1, per_example)))
    while 2 * chunk <= ceiling and bytes_of(2 * chunk) <= memory_budget:
        chunk *= 2
    return chunk
