"""How a measurement is laid out: examples per chunk, and which linear weights stay factored.

Both follow from sizes alone, never from timings, so that two runs give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.losses import MeanLoss
from sharpkit.errors import ArgumentError, SharpkitError
from sharpkit.memory import allowed_memory
from sharpkit.sharpness import low_rank
from sharpkit.sharpness.geometry import Tensors
from sharpkit.sharpness.low_rank import pays

# activations of a chunk that run fastest on a CPU: they stay in its cache, and are enough work for
# the calls that evaluate them (benchmarks/bench_m_sharpness.py)
_CPU_ACTIVATIONS = 20 * 2**20
_CPU_MEMORY_BUDGET = 4 * 2**30


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


def activation_bytes(
    model: FunctionalModel, weights: Tensors, loss: MeanLoss, one: Examples
) -> int:
    """Bytes that the gradient pass keeps per example: what autograd saves for one example."""
    own = {w.untyped_storage().data_ptr() for w in weights.values()}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        # not the storage's size: an input is a view of the whole data set
        if t.untyped_storage().data_ptr() not in own:
            saved[t.data_ptr()] = max(saved.get(t.data_ptr(), 0), t.nbytes)
        return t.detach()  # the tensor itself may own the graph that it is saved in: a leak

    with torch.enable_grad(), model.assigned(weights):
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                loss(model.outputs(one.inputs), one.labels)
        except SharpkitError:
            raise
        except Exception:  # function transforms inside the model allow no hooks
            with ResultSizes() as sizes:
                loss(model.outputs(one.inputs), one.labels)
            return int(sizes.bytes)
    return sum(saved.values())


class ResultSizes(TorchFunctionMode):
    """Adds up the bytes of everything that torch's functions return: what they save at most."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the function and add up what it returns."""
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.bytes += out.numel() * out.element_size()
        return out


def default_memory_budget(device: torch.device) -> int:
    """4 GiB on a CPU, half of the memory of a GPU; at most half of what a worker is allowed."""
    budget = _CPU_MEMORY_BUDGET
    if device.type == "cuda":
        budget = torch.cuda.get_device_properties(device).total_memory // 2
    allowed = allowed_memory(device)
    return budget if allowed is None else min(budget, allowed // 2)


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
