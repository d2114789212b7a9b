"""Examples that are read again, batch by batch, for every pass over them, and never held whole."""

from __future__ import annotations

import inspect
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from sharpkit.contract.batches import as_examples, check_finite, collated, is_batch, paired, shapes
from sharpkit.contract.checksum import checksum
from sharpkit.contract.examples import Examples
from sharpkit.errors import ArgumentError, DataError

_Change: TypeAlias = Callable[[Examples], Examples]

_COLLATED = 64  # single items put together
_FEW = 32  # examples that are kept of the first pass, for checks
_SAME = "every pass must give the same examples in the same order"
_HOLD = "or, if they fit into memory, hold one pass of them as a list of batches, list(...)"


class Stream(Examples):
    """Examples of a source that is iterated again for every pass; a few batches are in memory.

    What follows the order (`slice`, `chunks`, `bounds`) is as for examples in memory: a slice is
    read, and held by whoever asked for it. Going back starts another pass. Each batch is compared
    with that of the first pass by its fingerprint. What needs all examples at once (`inputs`,
    `labels`, `select`) is refused.

    Attributes:
        first: What the first pass told.

    Example:
        >>> def batches():
        ...     for i in range(3):
        ...         yield torch.full((2, 1), float(i)), torch.tensor([0, 1])
        >>> stream = read_stream(batches, None)
        >>> len(stream), stream.slice(3, 5).inputs.flatten().tolist()
        (6, [1.0, 2.0])
    """

    __slots__ = ("_changes", "_reader", "first")
    in_memory = False

    def __init__(self, reader: _Reader, changes: tuple[_Change, ...] = ()) -> None:
        self._reader, self._changes, self.first = reader, changes, reader.first
        self._starts = (*reader.first.starts, reader.first.n)

    @property
    def uniform(self) -> bool:
        """Whether every example has the same shape."""
        return len(self._starts) == 2

    @property
    def inputs(self) -> NoReturn:
        """Refused: they are never in memory together."""
        raise _needs_memory(len(self))

    @property
    def labels(self) -> NoReturn:
        """Refused: they are never in memory together."""
        raise _needs_memory(len(self))

    def slice(self, start: int, stop: int) -> Examples:
        """Examples start to stop, read from the source unless they have just been."""
        start, stop, _ = slice(start, stop).indices(len(self))
        return self._changed(self._reader.read(start, max(start, stop)))

    def chunks(self, size: int) -> Iterator[Examples]:
        """Consecutive examples of one shape, at most `size` at a time, and never all of them."""
        size = self.first.longest if size >= len(self) else size
        for start, stop in self.bounds(size):
            yield self.slice(start, stop)

    def select(self, indices: Tensor) -> NoReturn:
        """Refused: examples have no other order than that of the source."""
        raise _needs_memory(len(self))

    def diverse(self, k: int) -> Examples:
        """At most k of the examples kept from the first pass, with labels as different."""
        return self._changed(self.first.few).diverse(k)

    def widest(self, k: int) -> Examples:
        """At most k examples of the shape that takes most memory."""
        return self._changed(self.first.widest.slice(0, k))

    def to(self, device: torch.device, dtype: torch.dtype) -> Stream:
        """The same, moved as they are read."""
        return self._with_change(lambda examples: examples.to(device, dtype))

    def changed(self, change: Callable[[Tensor], Tensor]) -> Stream:
        """The same, with every tensor of the inputs changed as it is read."""
        return self._with_change(lambda examples: examples.changed(change))

    def keep(self, k: int) -> None:
        """Hold the last k examples that were read: going back as far starts no other pass."""
        self._reader.keep = k

    def head(self, n: int | None) -> Stream:
        """The first n examples as a stream; all if n is None."""
        if n is None or n == len(self):
            return self
        _check_count(n, len(self))
        return Stream(_Reader(self._reader.batches, n), self._changes)

    def _with_change(self, change: _Change) -> Stream:
        return Stream(self._reader, (*self._changes, change))

    def _changed(self, examples: Examples) -> Examples:
        for change in self._changes:
            examples = change(examples)
        return examples


def read_stream(source: Any, n: int | None) -> Stream:
    """The first n examples of a source (see `is_stream`), after one pass over them.

    Raises:
        DataError: If the source can be iterated once only, or an item is no pair or batch.
        ArgumentError: If n is larger than the number of examples.
    """
    if isinstance(source, Iterator):
        raise DataError(
            f"the data are a {type(source).__name__}, which can be read only once, and {_SAME}: "
            f"pass a function without arguments that makes a new one each time, {_HOLD}"
        )
    if not isinstance(source, Iterable):
        _check_signature(source)
    if n is not None and n < 1:
        raise ArgumentError(f"n = {n} examples asked for: expected at least 1")
    return Stream(_Reader(lambda: _batches(source), n))


def is_stream(data: Any) -> bool:
    """Whether data that are nothing else may be a source: iterable, or a function that makes one.

    Example:
        >>> is_stream(lambda: iter([])), is_stream(nn.Linear(1, 1)), is_stream("text")
        (True, False, False)
    """
    if isinstance(data, str | bytes | Tensor | nn.Module | type):
        return False
    return isinstance(data, Iterable) or callable(data)


@dataclass
class _First:
    """What the first pass told, in a few numbers for each batch."""

    n: int = 0
    starts: list[int] = field(default_factory=list)  # where examples of another shape begin
    prints: array[int] = field(default_factory=lambda: array("Q"))  # of every batch
    longest: int = 0  # examples of a batch
    example_bytes: int = 0  # of the largest
    few: Examples = None  # type: ignore[assignment]  # labels as different as there are
    widest: Examples = None  # type: ignore[assignment]
    _shapes: Any = None

    def add(self, batch: Examples) -> None:
        check_finite(batch)
        few = batch.diverse(_FEW)
        self.few = few if self.n == 0 else Examples.joined([self.few, few]).diverse(_FEW)
        leaves = pytree.tree_leaves((batch.inputs, batch.labels))
        size = -(-sum(t.nbytes for t in leaves) // len(batch))
        if size > self.example_bytes:
            self.example_bytes = size
            self.widest = batch.select(torch.arange(min(len(batch), _FEW)))
        alike = [t.shape[1:] for t in leaves]
        if alike != self._shapes:
            self.starts.append(self.n)
            self._shapes = alike
        self.prints.append(checksum(batch))
        self.longest = max(self.longest, len(batch))
        self.n += len(batch)


class _Reader:
    """One pass at a time over batches, and those that were read last."""

    def __init__(self, batches: Callable[[], Iterator[Examples]], n: int | None) -> None:
        self.batches, self.keep = batches, 0
        self.first = _First()
        self._n = n
        for batch in self._pass():
            self.first.add(batch)
        _check_count(n, self.first.n)
        self._rewind()

    def read(self, start: int, stop: int) -> Examples:
        """Examples start to stop."""
        if start < self._begin:
            self._rewind()
        while self._end < stop:
            self._forget(start)
            self._next()
        self._forget(start)
        held, place = [], self._begin
        for batch in self._held:
            if place < stop:
                held.append(batch.slice(start - place if start > place else 0, stop - place))
            place += len(batch)
        return Examples.joined(held) if stop > start else self.first.few.slice(0, 0)

    def _pass(self) -> Iterator[Examples]:
        """The batches of one pass, as far as they are used."""
        left = self._n
        for batch in self.batches():
            if left is not None:
                batch = batch.slice(0, left)
                left -= len(batch)
            if len(batch):
                yield batch
            if left == 0:
                return

    def _rewind(self) -> None:
        self._iterator: Iterator[Examples] | None = None  # the old pass ends before another begins
        self._held: deque[Examples] = deque()
        self._begin = self._end = self._read = 0

    def _forget(self, start: int) -> None:
        """Let go of batches that end before an example, but for those to be kept and the last."""
        start = min(start, self._end - self.keep)
        while len(self._held) > 1 and self._begin + len(self._held[0]) <= start:
            self._begin += len(self._held.popleft())

    def _next(self) -> None:
        if self._iterator is None:
            self._iterator = self._pass()
        batch = next(self._iterator, None)
        if batch is None:
            end = self._end
            self._rewind()
            raise DataError(
                f"the data ended after {end} examples, in the first pass after {self.first.n}: "
                f"{_SAME}; an iterator that is used up? Let the function make a new one, {_HOLD}"
            )
        if checksum(batch) != self.first.prints[self._read]:
            place = f"batch {self._read} of the data (from example {self._end})"
            self._rewind()
            raise DataError(
                f"{place} is another than in the first pass: {_SAME}; leave out shuffling and "
                f"random augmentation, or seed them anew for every pass, {_HOLD}"
            )
        self._check_own(batch)
        self._held.append(batch)
        self._read += 1
        self._end += len(batch)
        if self._end == self.first.n and next(self._iterator, None) is not None:
            self._rewind()
            raise DataError(
                f"the data go on after {self.first.n} examples, where the first pass ended: {_SAME}"
            )

    def _check_own(self, batch: Examples) -> None:
        """Raise if a batch lies where the last one does, and has written over it."""
        if not self._held or _places(batch).isdisjoint(_places(self._held[-1])):
            return
        if checksum(self._held[-1]) != self.first.prints[self._read - 1]:
            raise DataError(
                f"batch {self._read} of the data is written over the one before: let the source "
                "give tensors of its own for each batch (batch.clone())"
            )


def _places(batch: Examples) -> set[int]:
    return {t.data_ptr() for t in pytree.tree_leaves((batch.inputs, batch.labels))}


def _batches(source: Any) -> Iterator[Examples]:
    """The batches of one pass; single items are put together where they have one shape."""
    while not isinstance(source, Iterable):
        source = source()
        if isinstance(source, tuple | dict | Tensor) or not is_stream(source):
            raise DataError(
                f"the function returned a {type(source).__name__}: expected an iterator, a list or "
                "a loader of (inputs, labels) batches"
            )
    if isinstance(source, DataLoader) and source.batch_sampler is not None:
        yield from map(as_examples, source)
        return
    items = iter(source)
    head = list(islice(items, 1))
    if head and is_batch(head[0]):
        yield as_examples(head.pop())
        for item in items:
            if not is_batch(item):
                raise DataError(
                    "the data mix batches (inputs, labels) and single examples: expected one kind"
                )
            yield as_examples(item)
        return
    while head:
        head += islice(items, _COLLATED - len(head))
        read = [paired(item) for item in head]
        for _, run in groupby(read, key=shapes):
            yield collated(list(run))
        head = list(islice(items, _COLLATED))


def _check_count(n: int | None, found: int) -> None:
    if found == 0:
        raise DataError("the data hold no examples")
    if n is not None and not 1 <= n <= found:
        raise ArgumentError(f"n = {n} examples asked for: expected 1 to {found}")


def _check_signature(source: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(source)
    except (TypeError, ValueError):  # of a built-in function
        return
    try:
        signature.bind()
    except TypeError as error:
        raise DataError(
            f"the data are a function that cannot be called without arguments ({error}): expected "
            "one that takes none and returns an iterator of (inputs, labels) batches"
        ) from None


def _needs_memory(n: int) -> DataError:
    return DataError(
        f"the data are a stream of {n} examples, read batch by batch, and this needs all of them "
        "in memory: pass a list of their batches, list(...), of as many as fit, or tensors"
    )
