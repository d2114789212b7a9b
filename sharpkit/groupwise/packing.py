"""Small parameters side by side in one tensor, so that a step over all of them is one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sharpkit.groupwise.geometry import Tensors

# numbers up to which a call for a parameter costs a CPU more than to move it in and out of a pack,
# for every group: with 2^14 an encoder of two layers took 1.1 times as long at m = 1
_SMALL = 2**12
_JOINED = "all small parameters"


class Packing:
    """Which parameters lie side by side; the others are packs of their own, in their own shape.

    Names that are `apart` stay packs of their own.

    Example:
        >>> weights = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
        >>> packs = Packing(weights).joined(weights)
        >>> [tuple(t.shape) for t in packs.values()]
        [(10,)]
        >>> [tuple(t.shape) for t in Packing(weights).parts(packs).values()]
        [(2, 3), (4,)]
    """

    def __init__(self, weights: Tensors, apart: frozenset[str] = frozenset()) -> None:
        def is_small(w: Tensor) -> bool:
            return w.device.type == "cuda" or w.numel() <= _SMALL

        self._shapes = {name: w.shape for name, w in weights.items()}
        small = [name for name, w in weights.items() if name not in apart and is_small(w)]
        self._small = small if len(small) > 1 else []

    def joined(self, tensors: Tensors) -> Tensors:
        """Packs of tensors (..., *shape), all with the same axes in front."""
        small = [tensors[name] for name in self._small]
        packs = {name: t for name, t in tensors.items() if name not in self._small}
        if small:
            lead = small[0].shape[: small[0].ndim - len(self._shapes[self._small[0]])]
            packs[_JOINED] = torch.cat([t.reshape(*lead, -1) for t in small], -1)
        return packs

    def parts(self, packs: Tensors, *, copied: bool = False) -> Tensors:
        """The tensors in packs, as views; or of small parameters contiguous copies, by one call."""
        tensors = {name: t for name, t in packs.items() if name != _JOINED}
        if _JOINED in packs:
            pack = packs[_JOINED]
            shapes = [self._shapes[name] for name in self._small]
            split = torch.split_with_sizes_copy if copied else torch.split_with_sizes
            pieces: Any = split(pack, [shape.numel() for shape in shapes], -1)
            for name, shape, piece in zip(self._small, shapes, pieces, strict=True):
                tensors[name] = piece if len(shape) == 1 else piece.view(*pack.shape[:-1], *shape)
        return tensors
