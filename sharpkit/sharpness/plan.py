"""How a measurement is laid out: examples per chunk, and which linear weights stay factored.

Both follow from sizes alone, never from timings, so that two runs give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.errors import ArgumentError
from sharpkit.groupwise import low_rank
from sharpkit.groupwise.geometry import Tensors
from sharpkit.groupwise.low_rank import pays

# activations of a chunk that run fastest on a CPU: they stay in its cache, and are enough work for
# the calls that evaluate them (benchmarks/bench_m_sharpness.py)
_CPU_ACTIVATIONS = 20 * 2**20


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
    device: torch.device,
) -> int:
    """Examples per chunk, a power of two.

    Args:
        per_example: Bytes of activations an example needs.
        per_group: Bytes of the gradient and the perturbed weights of a group.
        ms: Group sizes; each m has groups of its own in a chunk.
        memory_budget: Bytes that the chunk may take.
        device: Where it runs: a CPU prefers chunks that fit its cache.

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
    chunk, ceiling = 1, 4096
    if device.type != "cuda":
        ceiling = max(16, min(ceiling, _CPU_ACTIVATIONS // max(1, per_example)))
    while 2 * chunk <= ceiling and bytes_of(2 * chunk) <= memory_budget:
        chunk *= 2
    return chunk
