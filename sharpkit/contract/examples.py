"""Examples in memory, in the order in which they are measured."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, groupby, pairwise
from typing import Any, ClassVar, TypeAlias

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from sharpkit.channels_last import channels_first
from sharpkit.errors import ArgumentError, DataError

Inputs: TypeAlias = Any  # a tensor, or a dict or tuple of tensors that all have the same length
_Part: TypeAlias = tuple[Tensor, ...]  # examples of one shape: leaves of the inputs, then labels


class Examples:
    """Inputs and labels held in memory, in the order in which they are measured.

    They are uniform (every example has the same shape), or ragged: a sequence of parts, each of
    its own shape, as batches that are padded to different lengths are. Operations that follow the
    order (`slice`, `chunks`, `select`) take both; `inputs` and `labels` exist for uniform ones.

    Args:
        inputs: Leaves of shape (n, ...).
        labels: Shape (n, ...).

    Example:
        >>> short = Examples(torch.zeros(2, 3), torch.arange(2))
        >>> both = Examples.joined([short, Examples(torch.zeros(4, 5), torch.arange(4))])
        >>> len(both), both.uniform, both.bounds(3)
        (6, False, [(0, 2), (2, 5), (5, 6)])
        >>> both.select(torch.tensor([5, 2])).inputs.shape
        torch.Size([2, 5])
    """

    __slots__ = ("_parts", "_starts", "_structure")
    in_memory: ClassVar[bool] = True  # a stream's are read again for every pass
    _structure: Any  # the inputs with each leaf's place in a part instead of it
    _parts: tuple[_Part, ...]
    _starts: tuple[int, ...]  # where each part starts, and the number of examples

    def __init__(self, inputs: Inputs, labels: Tensor) -> None:
        leaves, structure = pytree.tree_flatten(inputs)
        places = pytree.tree_unflatten(range(len(leaves)), structure)
        self._hold(places, [(*leaves, labels)])

    @classmethod
    def joined(cls, parts: Iterable[Examples]) -> Examples:
        """One after the other; neighbours of the same shape become one part.

        Raises:
            DataError: If there are no examples, or parts differ in more than their sizes.
        """
        given = [part for part in parts if len(part)]
        if not given:
            raise DataError("the data hold no examples")
        _check_alike(given)
        pieces = [piece for part in given for piece in part._parts]
        return given[0]._with([_concatenated(list(run)) for _, run in groupby(pieces, key=_shapes)])

    def __len__(self) -> int:
        """The number of examples."""
        return self._starts[-1]

    @property
    def uniform(self) -> bool:
        """Whether every example has the same shape."""
        return len(self._parts) == 1

    @property
    def inputs(self) -> Inputs:
        """Leaves of shape (n, ...)."""
        return pytree.tree_map(self._only().__getitem__, self._structure)

    @property
    def labels(self) -> Tensor:
        """Shape (n, ...)."""
        return self._only()[-1]

    def slice(self, start: int, stop: int) -> Examples:
        """Examples start to stop, without a copy."""
        start, stop, _ = slice(start, stop).indices(len(self))
        if stop <= start:
            return self._with([_cut(self._parts[0], 0, 0)])
        first, last = bisect_right(self._starts, start) - 1, bisect_left(self._starts, stop)
        touched = zip(self._starts[first:last], self._parts[first:last], strict=True)
        return self._with([_cut(part, max(0, start - s), stop - s) for s, part in touched])

    def bounds(self, size: int) -> list[tuple[int, int]]:
        """Where the chunks of at most `size` examples start and stop."""
        return [
            (start, min(start + size, end))
            for begin, end in pairwise(self._starts)
            for start in range(begin, end, size)
        ]

    def chunks(self, size: int) -> Iterator[Examples]:
        """Consecutive examples of one shape, at most `size` at a time, without a copy."""
        if self.uniform and 0 < len(self) <= size:
            yield self
            return
        for start, stop in self.bounds(size):
            yield self.slice(start, stop)

    def select(self, indices: Tensor) -> Examples:
        """Copies of the examples with the given indices (k,), in their order.

        Raises:
            ArgumentError: If an index is not between 0 and n - 1.
        """
        if len(indices) == 0:
            return self.slice(0, 0)
        if not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise ArgumentError(f"expected indices of examples from 0 to {len(self) - 1}")
        if self.uniform:
            return self._with([_rows(self._parts[0], indices)])
        starts = torch.tensor(self._starts)
        indices = indices.cpu()
        places = torch.searchsorted(starts, indices, right=True) - 1
        runs = torch.unique_consecutive(places, return_counts=True)
        rows = torch.split(indices - starts[places], runs[1].tolist())
        chosen = zip(runs[0].tolist(), rows, strict=True)
        return Examples.joined(self._with([_rows(self._parts[p], r)]) for p, r in chosen)

    def diverse(self, k: int) -> Examples:
        """Copies of at most k examples, with labels as different as there are."""
        return self.select(label_diverse(self, k))

    def widest(self, k: int) -> Examples:
        """At most k examples of the shape that takes most memory, without a copy."""
        starts = pairwise(self._starts)
        sizes = [sum(t.nbytes for t in part) / max(len(part[-1]), 1) for part in self._parts]
        bounds = max(zip(sizes, starts, strict=True), key=lambda pair: pair[0])[1]
        return self.slice(bounds[0], min(bounds[1], bounds[0] + k))

    def to(self, device: torch.device, dtype: torch.dtype) -> Examples:
        """On the device; floating-point inputs (and labels, if regression) in the dtype.

        Complex ones are moved to the complex dtype of the same precision. Images on a CPU get their
        channels first in memory (see `channels_last`).
        """

        def move(t: Tensor) -> Tensor:
            if t.is_complex():
                return t.to(device, dtype.to_complex())
            return channels_first(t.to(device, dtype)) if t.is_floating_point() else t.to(device)

        return self._with([tuple(map(move, part)) for part in self._parts])

    def changed(self, change: Callable[[Tensor], Tensor]) -> Examples:
        """The same labels with every tensor of the inputs changed, example by example."""
        return self._with([(*map(change, part[:-1]), part[-1]) for part in self._parts])

    def _with(self, parts: list[_Part]) -> Examples:
        examples = Examples.__new__(Examples)
        examples._hold(self._structure, parts)
        return examples

    def _hold(self, structure: Any, parts: list[_Part]) -> None:
        self._structure, self._parts = structure, tuple(parts)
        self._starts = tuple(accumulate((len(part[-1]) for part in parts), initial=0))

    def _only(self) -> _Part:
        if not self.uniform:
            a, b = (_described(self._with([part])) for part in self._parts[:2])
            raise DataError(
                f"the examples differ in shape: {a} and {b}; pad all batches to one length, or use "
                "m_sharpness and the curvature operators, which take them as they are"
            )
        return self._parts[0]


def label_diverse(examples: Examples, k: int) -> Tensor:
    """Indices of at most k examples, spread evenly over all when sorted by their labels.

    The smallest and the largest are among them. Labels of several entries are sorted by how many of
    them count (integers below 0 mark positions to ignore), then by Σ_j j y_j over those.

    Example:
        >>> labels = torch.tensor([2, 0, 0, 0, 1, 0])
        >>> label_diverse(Examples(torch.zeros(6, 1), labels), 3)
        tensor([1, 3, 0])
    """
    keys = torch.cat([_sort_keys(chunk.labels) for chunk in examples.chunks(1024)])
    order = keys[:, 1].argsort(stable=True)
    order = order[keys[order, 0].argsort(stable=True)]
    n = len(order)
    k = min(k, n)
    return order[torch.arange(k) * (n - 1) // max(k - 1, 1)]


def standard_tensor(array: NDArray[Any]) -> Tensor:
    """A copy of an array in the standard layout.

    Pickling changes strides and alignment of an array, and the last bits of a sum depend on both.

    Example:
        >>> import numpy as np
        >>> standard_tensor(np.arange(6).reshape(2, 3).T).stride()
        (2, 1)
    """
    writeable = array if array.flags.writeable else array.copy()  # torch warns of others
    return torch.from_numpy(writeable).clone(memory_format=torch.contiguous_format)


def _cut(part: _Part, start: int, stop: int) -> _Part:
    return tuple(t[start:stop] for t in part)


def _rows(part: _Part, indices: Tensor) -> _Part:
    return tuple(t[indices.to(t.device)] for t in part)


def _concatenated(run: list[_Part]) -> _Part:
    return run[0] if len(run) == 1 else tuple(map(torch.cat, zip(*run, strict=True)))


def _shapes(part: _Part) -> list[torch.Size]:
    return [t.shape[1:] for t in part]


def _check_alike(parts: list[Examples]) -> None:
    """Raise unless all have one structure, and leaves of one kind."""

    def kind(part: Examples) -> Any:
        return part._structure, [(t.ndim, t.dtype, t.device) for t in part._parts[0]]

    expected = kind(parts[0])
    for part in parts:
        if kind(part) != expected:
            raise DataError(
                f"parts of the data differ: {_described(parts[0])} and {_described(part)}; "
                "expected the same structure, number of dimensions, dtype and device in all"
            )


def _described(examples: Examples) -> str:
    def leaf(t: Tensor) -> str:
        shape = ", ".join(["n", *map(str, t.shape[1:])])
        return f"({shape}) {t.dtype} on {t.device}".replace("torch.", "").removesuffix(" on cpu")

    leaves = [leaf(t) for t in examples._parts[0]]
    inputs = pytree.tree_map(leaves.__getitem__, examples._structure)
    return f"inputs {inputs} with labels {leaves[-1]}"


def _sort_keys(labels: Tensor) -> Tensor:
    """Shape (n, 2): how many entries count, and their sum weighted by position."""
    labels = torch.view_as_real(labels) if labels.is_complex() else labels
    values = labels.detach().cpu().double()
    if values.ndim == 1:
        return torch.stack([torch.ones_like(values), values], 1)
    values = values.flatten(1)
    counted = torch.ones_like(values, dtype=torch.bool)
    if not labels.is_floating_point():
        counted = values >= 0
    weights = torch.arange(1.0, values.shape[1] + 1, dtype=torch.float64)
    return torch.stack([counted.sum(1).double(), torch.where(counted, values, 0.0) @ weights], 1)
