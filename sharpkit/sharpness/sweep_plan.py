"""How a measurement is laid out: examples per chunk, when groups run alone, and in which layout.

All of it follows from sizes, never from timings, so that two runs give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sharpkit.contract.checks import Probe
from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.losses import MeanLoss
from sharpkit.contract.streams import Stream
from sharpkit.curvature.memory import require_memory
from sharpkit.errors import ArgumentError
from sharpkit.groupwise import low_rank
from sharpkit.groupwise.batch_passes import batch_passes
from sharpkit.groupwise.fallback import Disagreement
from sharpkit.groupwise.geometry import Tensors
from sharpkit.groupwise.image_layout import image_layout
from sharpkit.groupwise.memory import default_memory_budget, try_gradient
from sharpkit.groupwise.objective import Objective
from sharpkit.groupwise.packing import Packing
from sharpkit.groupwise.survey import GPU, Survey, chunk_that_fills, most_side_by_side, survey
from sharpkit.memory import available_memory
from sharpkit.sharpness.ascent_rules import Ascent
from sharpkit.sharpness.passes import OneBatchPasses, Transformed

# activations of a chunk up to which a larger one was faster on a CPU: enough work for the calls
# that evaluate it, and no more than its caches bear
_CPU_ACTIVATIONS = 96 * 2**20
# examples, at least and at most, where memory allows it: perceptrons took a third of the time with
# 1024 instead of 128, LeNet-5 0.8
_CPU_CHUNKS = (32, 1024)
_CPU_LEAST = 256 * 2**20  # activations that are enough work for the calls, whatever the chunk
_CPU_GROUPS = 256 * 2**20  # gradients and weights of groups, with the activations
# examples of a group alone at a time: at least, the fastest of every network measured, and at most,
# where their activations allow it (an LSTM at m = 256: 0.96 of the time with 128)
_CPU_BATCHES = (64, 256)
_GPU_BATCH = 128  # the same, and how many times what fills a GPU
_GPU_BATCHES = 4


@dataclass(frozen=True)
class SweepPlan:
    """How examples are cut (see `Objective`), for one model, loss and device.

    `memory` counts the bytes of a chunk: activations, and gradients and perturbed weights of its
    groups. `unused` names the weights that the loss does not depend on.
    """

    function: FunctionalModel
    loss: MeanLoss
    weights: Tensors
    chunk: int
    batch: int
    layout: torch.memory_format
    survey: Survey
    memory: int
    unused: list[str]

    def objective(self, chunk: int, *, loop: bool = False) -> Objective:
        """What is measured, in chunks of as many examples; group by group if `loop`."""
        device = self.function.device
        alone = min(self.survey.alone(device), most_side_by_side(chunk, device) + 1)
        return Objective(
            self.function, self.loss, self.weights, chunk,
            max(1, self.batch * chunk // self.chunk), 1 if loop else alone, self.layout,
        )  # fmt: skip

    def one_batch(self, rule: Ascent, *, compile: bool) -> OneBatchPasses:
        """Groups as one ordinary batch.

        Raises:
            Disagreement: If the model uses a weight in a way that is not known.
        """
        passes = batch_passes(
            self.function, self.loss, self.weights, self.survey, packed=rule.rule.packed
        )
        return OneBatchPasses(passes, compile=compile)


def sweep_plan(
    function: FunctionalModel,
    loss: MeanLoss,
    weights: Tensors,
    probe: Probe,
    ms: Sequence[int],
    chunk: int | Literal["auto"],
    memory_budget: int | None,
    *,
    allows_factors: bool,
) -> SweepPlan:
    """The plan for a model.

    `chunk` and `memory_budget` are what was asked for; `allows_factors` says whether gradients may
    stay in factors.

    Raises:
        ArgumentError: If not even one example fits the budget, or a chunk the memory.
    """
    device = function.device
    layout = image_layout(function, probe)
    block = math.gcd(*ms)
    found = survey(function, weights, probe.examples, smallest=block)
    per_example, unused = try_gradient(function, loss, weights, probe.examples)
    factored = found.factored(weights, block) if allows_factors else {}
    per_group = sum(
        factored[name].nbytes(w, block) if name in factored else w.nbytes
        for name, w in weights.items()
    )

    def bytes_of(chunk: int) -> int:
        # base gradients are held while one m at a time is merged and perturbed
        groups = math.ceil(chunk / block) + math.ceil(chunk / min(ms))
        return chunk * per_example + groups * per_group

    if chunk == "auto":
        budget = default_memory_budget(device) if memory_budget is None else memory_budget
        size = _chunk(found, bytes_of, per_example, budget, device)
        batch = _batch(found, per_example, budget, device)
    elif isinstance(chunk, int) and chunk >= 1:
        size = batch = chunk
    else:
        raise ArgumentError(f'chunk must be "auto" or a positive integer, got {chunk!r}')
    memory = bytes_of(size)
    if block >= found.alone(device):
        own = sum(w.nbytes for w in weights.values())
        memory = min(batch, max(ms)) * per_example + 3 * own  # home, moved, gradient
    if device.type == "cpu":  # elsewhere a chunk that does not fit is halved
        require_memory(
            memory, device, f"a chunk of {size} examples", "pass a smaller memory_budget or chunk"
        )
    return SweepPlan(function, loss, weights, size, batch, layout, found, memory, unused)


def keep_groups(stream: Stream, ms: Sequence[int], chunk: int) -> None:
    """Let a stream hold what is measured together: a group of all examples is read again instead.

    Raises:
        ArgumentError: If a group of a stream does not fit the memory.
    """
    held = max((m for m in ms if m < len(stream)), default=0) + chunk
    size, free = held * stream.first.example_bytes, available_memory(torch.device("cpu"))
    if free is not None and size > free:
        raise ArgumentError(
            f"the examples of a group are held while it is measured: {held} of them (m and a "
            f"chunk) need {size / 2**30:.2f} GiB, of which {free / 2**30:.2f} GiB is free: take "
            f"smaller m, or m = n = {len(stream)}, which is read again instead"
        )
    stream.keep(held)


def transformed(objective: Objective, probe: Probe, rule: Ascent) -> Transformed:
    """Groups under vmap.

    Raises:
        Disagreement: If the model cannot run at swapped weights.
    """
    f = objective
    reason = probe.try_swapping()
    if reason:
        raise Disagreement(reason)
    few = probe.examples.slice(0, 1)
    rows = factored_weights(f.model, f.weights, few) if rule.allows_factors else {}
    return Transformed(objective, Packing(f.weights, rule.apart(f.weights, rows)), rows)


def factored_weights(
    model: FunctionalModel, weights: Tensors, examples: Examples
) -> dict[str, low_rank.Rows]:
    """Rows of every weight matrix that is used by linear layers and nothing else.

    Found by one example, on the model's device.
    """
    matrices = {name: w for name, w in weights.items() if w.ndim == 2}
    rows = dict.fromkeys(matrices, 0)

    def rule(name: str, call: int, layer_input: Tensor, out: Tensor) -> Tensor:
        rows[name] += low_rank.rows(layer_input).shape[0]
        return out

    with model.evaluating(), low_rank.Calls(matrices, rule, watch=True) as calls:
        model(weights, examples.inputs)
    found = {name: low_rank.Rows(count) for name, count in rows.items() if count}
    return {
        name: own
        for name, own in found.items()
        if name not in calls.elsewhere and own.pay(weights[name])
    }


def _chunk(
    found: Survey,
    bytes_of: Callable[[int], int],
    per_example: int,
    budget: int,
    device: torch.device,
) -> int:
    """Examples per chunk, a power of two."""
    if bytes_of(1) > budget:
        raise ArgumentError(
            f"one example needs {bytes_of(1) / 2**30:.2f} GiB (activations, and a gradient and "
            f"weights of its own), but memory_budget is {budget / 2**30:.2f} GiB: pass a larger "
            "one if the memory is there, or select fewer weights with parameters="
        )
    if device.type != "cuda":
        return cpu_chunk(bytes_of, per_example, budget)
    most = chunk_that_fills(GPU, found.flops, found.calls)
    return _doubled(1, most, bytes_of, budget)


def cpu_chunk(bytes_of: Callable[[int], int], per_example: int, budget: int) -> int:
    """Examples per chunk on a CPU, a power of two, of activations of so many bytes.

    Example:
        >>> perceptron = lambda chunk: chunk * 4_000
        >>> cnn = lambda chunk: chunk * 1_000_000
        >>> [cpu_chunk(perceptron, 4_000, 2**32), cpu_chunk(cnn, 420_000, 2**32)]
        [1024, 128]
    """
    per_example = max(1, per_example)
    low = min(_CPU_CHUNKS[0], _CPU_LEAST // per_example)
    most = min(_CPU_CHUNKS[1], _CPU_ACTIVATIONS // per_example)
    least = _doubled(1, low, bytes_of, budget)
    return _doubled(least, most, bytes_of, min(budget, _CPU_GROUPS))


def _doubled(chunk: int, most: int, bytes_of: Callable[[int], int], budget: int) -> int:
    while 2 * chunk <= most and bytes_of(2 * chunk) <= budget:
        chunk *= 2
    return chunk


def _batch(found: Survey, per_example: int, budget: int, device: torch.device) -> int:
    """Examples at a time of a group alone."""
    if device.type != "cuda":
        return cpu_batch(per_example, budget)
    most = max(_GPU_BATCH, _GPU_BATCHES * chunk_that_fills(GPU, found.flops, found.calls))
    return max(1, min(most, budget // max(1, per_example)))


def cpu_batch(per_example: int, budget: int) -> int:
    """The same on a CPU, for activations of so many bytes.

    Example:
        >>> [cpu_batch(4_000, 2**32), cpu_batch(1_000_000, 2**32), cpu_batch(2**28, 2**32)]
        [256, 64, 16]
    """
    least, limit = _CPU_BATCHES
    most = _doubled(least, limit, lambda batch: batch * per_example, _CPU_ACTIVATIONS)
    return max(1, min(most, budget // max(1, per_example)))
