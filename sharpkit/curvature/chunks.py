"""Chunks of an operator's examples: how they are cut, how many graphs are kept, what each gave.

Everything follows from sizes, never from timings, so that two runs give the same bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sharpkit.contract.checksum import checksum
from sharpkit.contract.examples import Examples
from sharpkit.curvature.memory import default_budget, require_memory, saved_bytes
from sharpkit.curvature.second_derivatives import Product
from sharpkit.curvature.together import vectors_together
from sharpkit.errors import DataError, ModelError
from sharpkit.memory import available_memory

# bytes of kept graph per chunk that run fastest (benchmarks/bench_curvature.py); with more, the
# C library returns freed memory to the system, which clears it again in every product
_CPU_WORKING_SET = 16 * 2**20
_GPU_WORKING_SET = 1024 * 2**20
# deep networks keep much per example: fewer examples are slow, and may take up to this
_CPU_FEW = 64
_CPU_FEW_BYTES = 128 * 2**20


@dataclass(frozen=True)
class ChunkPlan:
    """Chunks of nearly equal size, the first `keep` of which stay in memory."""

    bounds: list[tuple[int, int]]  # where each chunk starts and stops
    keep: int  # how many of them are kept
    keep_bytes: int  # what they take
    budget: int  # what they may take
    together: int  # vectors in one backward pass


def graph_bytes(
    record: Callable[[Examples], object], examples: Examples, known: list[Tensor], most: int = 4
) -> tuple[int, int]:
    """Bytes that a kept graph takes per example, and besides per chunk.

    Where examples differ in shape the largest ones are recorded, at most so many (and two);
    `known` tensors do not count.
    """
    part = examples.widest(max(most, 2))
    many = len(part)
    few = max(1, many // 2)

    def size(count: int) -> int:
        kept: list[Tensor] = []

        def recorded() -> object:
            graph = record(part.slice(0, count))
            if isinstance(graph, Linearised):
                kept.extend(graph.kept)
            return graph

        return saved_bytes(recorded, known) + sum(t.nbytes for t in kept)

    small = size(few)
    if many == few:
        return max(small, 1), 0
    large = size(many)
    per_example = max((large - small) // (many - few), 1)
    return per_example, max(small - few * per_example, 0)


def chunk_plan(
    examples: Examples,
    graph: tuple[int, int],
    weights: Sequence[Tensor],
    chunk: int | Literal["auto"],
    memory_budget: int | None,
) -> ChunkPlan:
    """Choose the chunks, each of examples of one shape, and keep as many as the budget allows.

    `graph` is bytes per example and per chunk; the budget is for kept graphs, None for the default.

    Raises:
        ArgumentError: If one chunk, or what the budget asks for, does not fit the memory.
    """
    per_example, per_chunk = graph
    device = weights[0].device
    most = _automatic_chunk(per_example, weights) if isinstance(chunk, str) else chunk
    bounds = [b for part in examples.bounds(len(examples)) for b in _evenly(*part, most)]
    count, longest = len(bounds), max(stop - start for start, stop in bounds)
    size = per_example * longest + per_chunk
    require_memory(
        size, device, f"the graph of one chunk of {longest} examples", "pass a smaller chunk"
    )
    budget = default_budget(device) if memory_budget is None else memory_budget
    keep = min(count, budget // max(size, 1)) if budget else 0
    require_memory(
        keep * size, device, f"keeping {keep} of {count} chunks", "pass a smaller memory_budget"
    )
    together = vectors_together(size, weights, available_memory(device))
    return ChunkPlan(bounds, keep, keep * size, budget, together)


def _evenly(start: int, stop: int, most: int) -> list[tuple[int, int]]:
    n = stop - start
    count = -(-n // most)
    return list(itertools.pairwise(start + n * i // count for i in range(count + 1)))


def _automatic_chunk(per_example: int, weights: Sequence[Tensor]) -> int:
    if not per_example:
        return 64
    on_cpu = weights[0].device.type == "cpu"
    # adding a chunk's product to the total should cost little beside it
    target = max(_CPU_WORKING_SET if on_cpu else _GPU_WORKING_SET, sum(w.nbytes for w in weights))
    few = min(_CPU_FEW, _CPU_FEW_BYTES // per_example) if on_cpu else 1
    return min(max(target // per_example, few, 1), 1024 if on_cpu else 8192)


@dataclass(frozen=True)
class Linearised:
    """A chunk of examples, linearised at the weights: its loss, gradient and matrix."""

    mean: Tensor  # of the loss, scalar, detached
    weight: Tensor  # of the mean among those of other chunks, float64 scalar
    gradient: Sequence[Tensor | None]  # per parameter, None where it is not used
    product: Product
    kept: tuple[Tensor, ...] = ()  # what the product keeps beside the graph


@dataclass
class Chunk:
    """What examples start to stop gave, and their product if its graph is kept."""

    start: int
    stop: int
    mean: float
    weight: float
    fingerprint: int
    product: Product | None


def recorded(start: int, stop: int, examples: Examples, product: Product | None) -> Chunk:
    """A chunk of these examples; its loss and weight are read later, with those of all others."""
    return Chunk(start, stop, math.nan, math.nan, checksum(examples), product)


def read_losses(chunks: Sequence[Chunk], linears: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Fill in means and weights, which are on the device: the host waits for them once.

    Raises:
        ModelError: If a loss is not finite.
    """
    for chunk, mean, weight in zip(chunks, *_read(zip(*linears, strict=True)), strict=True):
        chunk.mean, chunk.weight = mean, weight
        if not math.isfinite(mean):
            raise ModelError(
                f"the loss of examples {chunk.start} to {chunk.stop - 1} is {mean}: expected a "
                "finite number"
            )


def check_unchanged(chunk: Chunk, examples: Examples) -> None:
    """Raise DataError if a chunk's examples are others than when it was recorded first."""
    if checksum(examples) != chunk.fingerprint:
        raise DataError(
            f"examples {chunk.start} to {chunk.stop - 1} have changed since the operator was made: "
            "give it a copy of the data, or make a new operator"
        )


def check_repeated(chunks: Sequence[Chunk], means: Sequence[Tensor]) -> None:
    """Raise ModelError if a chunk's loss is another than when it was recorded first."""
    if not means:
        return
    rounding = 1e3 * torch.finfo(means[0].dtype).eps
    for chunk, mean in zip(chunks, *_read([means]), strict=True):
        if not math.isclose(mean, chunk.mean, rel_tol=rounding, abs_tol=rounding):
            raise ModelError(
                f"at the same weights the loss of examples {chunk.start} to {chunk.stop - 1} is "
                f"{mean:.6g}, it was {chunk.mean:.6g}: the model computes something else than "
                "when the operator was made (its mode or its attributes have changed)"
            )


def _read(columns: Iterable[Sequence[Tensor]]) -> list[list[float]]:
    """Scalars of a device, in one transfer."""
    found: list[list[float]] = torch.stack(
        [torch.stack([t.double() for t in column]) for column in columns]
    ).tolist()
    return found
