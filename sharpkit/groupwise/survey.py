"""What a forward pass costs and how it uses its weights, from one pass over a few examples.

Plans follow from these counts and from a description of the device by constants, never from
timings: two runs give the same bits.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, replace

import torch

from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.groupwise.geometry import Tensors
from sharpkit.groupwise.low_rank import Rows
from sharpkit.groupwise.one_batch import OneBatch, Point, Positions

# two different numbers of examples: an axis that has as many by chance is found out
_TRIED = (3, 2)


@dataclass(frozen=True)
class Device:
    """A device in some constants."""

    flops: float  # floating-point operations a second that layers of ordinary size reach in float32
    call: float  # seconds that one call of an operation takes at least
    # what a forward pass of a group should take for the group alone to use the device as well as
    # groups side by side do: seconds, or so many times its calls
    seconds: float
    fill: float
    least: int  # examples that a group alone has at least
    most: int  # examples of groups side by side

    def alone(self, flops: float, calls: int) -> int:
        """Group size from which groups run as fast one by one.

        Operations are those of a forward pass, `flops` per example.

        Example:
            >>> CPU.alone(flops=1e8, calls=69)  # a small ViT
            10
        """
        if flops <= 0:
            return max(self.least, 16)
        enough = max(self.seconds, self.fill * calls * self.call) * self.flops / flops
        return min(max(self.least, math.ceil(enough)), self.most + 1)


# two cores of an AMD EPYC: 50 GFLOP/s in convolutions of 16 to 64 channels, 5 us a call. Side by
# side, groups took of their time alone: a small ViT (103 MFLOP) 0.9 at m = 8, an encoder of words
# (6) 0.7 at 16 and 0.9 at 64, a perceptron (0.4) 0.2 at 16, 0.7 at 64 and 0.9 at 256
CPU = Device(flops=5e10, call=5e-6, seconds=0.02, fill=0.0, least=8, most=256)
# the same where most of the work is convolutions, for which the images of a group must lie beside
# each other (a CNN of 37 MFLOP took 0.8 at 8 and 0.9 at 16, ResNet-20 (81) 0.7 at 4 and 0.9 at 8),
# unless the work is small beside what a group costs (LeNet-5 0.6 at 16, 0.8 at 32 and 1.1 at 64);
# where there are recurrent layers, for one of which oneDNN has a kernel (an LSTM took 0.8 at 16,
# 1.0 at 32); and under vmap
_WITH_CONVOLUTIONS = replace(CPU, seconds=0.016, most=16)
_WITH_SMALL_CONVOLUTIONS = replace(CPU, seconds=0.002, most=32)
_WITH_RECURRENCE = replace(CPU, most=16)
_UNDER_VMAP = replace(CPU, seconds=0.016, most=16)
# an H100 or H200 without TF32: 30 TFLOP/s, 8 us a call. Groups alone cost the launches of a loop:
# side by side a CNN took 0.4 of its time at m = 64 and 2.9 at 256, ResNet-20 0.5 and 1.5, WRN-28-10
# 0.75 at 4 and 1.26 at 16 (benchmarks/results)
GPU = Device(flops=3e13, call=8e-6, seconds=0.0, fill=1.0, least=8, most=sys.maxsize - 1)
# so many groups of several examples gain something side by side on a CPU: of m-SAM two took 1.1 to
# 1.3 of their time alone at m = 2 to 16, four as long, eight 0.9
_SEVERAL = 4


@dataclass(frozen=True)
class Survey:
    """How a model uses its weights."""

    refused: str  # why it cannot run as one batch; empty if it can
    # name to rows per example of every weight of linear layers and convolutions
    rows: dict[str, int]
    looked_up: dict[str, int]  # the same of every table
    whole: frozenset[str]  # weights that something else uses as well, or only
    flops: float  # of a forward pass in those layers, per example
    calls: int  # of operations in a forward pass
    positions: Positions = field(default_factory=dict)
    convolved: float = 0.0  # the share of convolutions in these operations
    recurs: bool = False  # whether there are recurrent layers

    def factored(self, weights: Tensors, m: int = 1) -> dict[str, Rows]:
        """Rows of the weights whose gradient for m examples is better kept in factors."""
        rows = {name: Rows(count) for name, count in self.rows.items()}
        tables = {name: Rows(count, True) for name, count in self.looked_up.items()}
        if self.refused:  # function transforms know layers alone
            tables = {}
        elsewhere = self.whole | (rows.keys() & tables.keys())
        return {
            name: found
            for name, found in {**rows, **tables}.items()
            if found.number and name not in elsewhere and found.pay(weights[name], m)
        }

    def alone(self, device: torch.device) -> int:
        """Group size from which groups run as fast one by one (see `Device.alone`)."""
        if device.type == "cuda":
            return GPU.alone(self.flops, self.calls)
        kinds = [CPU]
        if self.refused:
            kinds = [_UNDER_VMAP]
        elif self.recurs:
            kinds = [_WITH_RECURRENCE]
        elif self.convolved > 0.5:
            kinds = [_WITH_CONVOLUTIONS, _WITH_SMALL_CONVOLUTIONS]
        return max(kind.alone(self.flops, self.calls) for kind in kinds)


def survey(
    model: FunctionalModel,
    weights: Tensors,
    examples: Examples,
    size: int = 1,
    *,
    smallest: int = 1,
) -> Survey:
    """Run a model as one batch of a few examples, and note how it uses the weights.

    If groups of the `smallest` size run alone, it is not found out whether the model can run as one
    batch.
    """
    refused, positions = "", None
    found = Survey("", {}, {}, frozenset(), 0.0, 0)
    if model.habits.loss_sees_weights:
        refused = "the loss depends on the weights themselves"
    if model.habits.needs_grad_mode:
        refused = "it differentiates, and that would have to be differentiated again"
    with torch.no_grad(), model.assigned(weights) as own:
        if any(p.is_complex() for p in own):
            refused = "weights are complex"
        held = dict(zip(weights, own, strict=True))
        for count in _TRIED:
            few = examples.select(torch.arange(count * size) % len(examples))
            try:
                with OneBatch(held, Point(count, size, weights)) as batch:
                    model.outputs(few.inputs)
            except Exception as error:
                refused = refused or f"it failed: {type(error).__name__}"
                continue
            if batch.decides:
                refused = refused or "it looks at values, which decides for all examples at once"
            if batch.elsewhere:
                refused = refused or f"{min(batch.elsewhere)!r} is used by more than layers"
            if positions not in (None, batch.positions) or batch.positions.keys() & batch.looked_up:
                refused = refused or "it looks up rows of a table that are not those of examples"
            positions = batch.positions
            by_name = {name: 2.0 * n * weights[name].numel() for name, n in batch.rows.items()}
            flops = sum(by_name.values())
            convolved = sum(f for name, f in by_name.items() if weights[name].ndim > 2)
            found = Survey(
                refused, batch.rows, batch.looked_up, frozenset(batch.whole), flops, batch.calls,
                positions, convolved / flops if flops else 0.0, batch.recurs,
            )  # fmt: skip
            if smallest >= found.alone(model.device):
                return replace(found, refused=refused or "groups run faster one by one")
    return replace(found, refused=refused)


def most_side_by_side(examples: int, device: torch.device) -> int:
    """Group size up to which the groups of so many examples gain anything side by side.

    Example:
        >>> [most_side_by_side(n, torch.device("cpu")) for n in (2, 16, 64)]
        [1, 4, 16]
    """
    return sys.maxsize if device.type == "cuda" else max(1, examples // _SEVERAL)


def chunk_that_fills(device: Device, flops: float, calls: int) -> int:
    """Examples, a power of two, whose forward pass takes ten times its calls.

    More at a time would be faster by a tenth at most.

    Example:
        >>> chunk_that_fills(GPU, flops=1e10, calls=110)  # WRN-28-10
        32
    """
    if flops <= 0:
        return sys.maxsize
    power: int = max(0, math.ceil(math.log2(10 * calls * device.call * device.flops / flops)))
    return int(2**power)
