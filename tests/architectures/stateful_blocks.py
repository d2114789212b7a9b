"""Building blocks that keep state or forget it: caches, merges, counters, checkpoints.

A module with an attribute `plain` has a trick (a cache, checkpointing) that it leaves out when
`plain` is true; its outputs stay the same. References use it so.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from custom_blocks import Apply, matrix
from layer_blocks import IMAGE, SEQUENCE, VECTOR, Shape, affine, block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Checkpointed(nn.Module):
    """Forgets its activations, and computes them again in the backward pass."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant, self.plain = inner, reentrant, False

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def _body(shape: Shape) -> nn.Module:
    return nn.Sequential(affine(shape), nn.Tanh(), affine(shape))


@block()
def checkpoint_reentrant(shape: Shape, rng: Random) -> nn.Module:
    # the layer in front gives it an input with a gradient: without, this mode has none inside
    return nn.Sequential(affine(shape), Checkpointed(_body(shape), reentrant=True))


@block()
def checkpoint_nonreentrant(shape: Shape, rng: Random) -> nn.Module:
    return Checkpointed(_body(shape), reentrant=False)


@block()
def buffers(shape: Shape, rng: Random) -> nn.Module:
    made = Apply(_counted, layer=affine(shape))
    made.register_buffer("shift", torch.randn(shape[-1]))
    made.register_buffer("calls", torch.zeros((), dtype=torch.long))
    return made


def _counted(s: Any, x: Tensor) -> Tensor:
    s.calls += 1
    return torch.tanh(s.layer(x) + s.shift)


class CachedBias(nn.Module):
    """Keeps a gathered bias in eval mode, and forgets it when training starts (as LeViT)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layer, self.plain = affine(shape), False
        self.biases = nn.Parameter(torch.randn(3))
        self.register_buffer("index", torch.randint(0, 3, shape), persistent=False)
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> CachedBias:
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def bias(self) -> Tensor:
        if self.plain:
            return self.cache.get("cpu", self.biases[self.index])
        if self.training:
            return self.biases[self.index]
        if "cpu" not in self.cache:
            self.cache["cpu"] = self.biases[self.index]
        return self.cache["cpu"]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x) + self.bias())


@block()
def cached_in_eval(shape: Shape, rng: Random) -> nn.Module:
    return CachedBias(shape).eval()


@block()
def cached_before(shape: Shape, rng: Random) -> nn.Module:
    """The model has been evaluated before: as it is found, it does not depend on the biases."""
    made = CachedBias(shape).eval()
    with torch.no_grad():
        made.bias()
    return made


class Adapter(nn.Module):
    """A frozen layer W with an update BA, which eval() merges into W and train() takes out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.lora_a, self.lora_b = matrix(2, width), matrix(width, 2)
        self.merged = False

    def train(self, mode: bool = True) -> Adapter:
        super().train(mode)
        if mode == self.merged:
            with torch.no_grad():
                self.base.weight += (-1 if mode else 1) * self.lora_b @ self.lora_a
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y if self.merged else y + x @ self.lora_a.T @ self.lora_b.T


@block(VECTOR, SEQUENCE)
def merged_in_eval(shape: Shape, rng: Random) -> nn.Module:
    return nn.Sequential(Adapter(shape[-1]), nn.Tanh())


class AlwaysEval(nn.Sequential):
    """Stays in eval mode whatever it is told."""

    def train(self, mode: bool = True) -> AlwaysEval:
        return super().train(False)


@block(VECTOR, IMAGE)
def overridden_train(shape: Shape, rng: Random) -> nn.Module:
    norm = nn.BatchNorm2d if len(shape) == IMAGE else nn.BatchNorm1d
    channels = shape[0]
    return AlwaysEval(affine(shape), norm(channels), nn.Dropout(0.3), nn.Tanh())
