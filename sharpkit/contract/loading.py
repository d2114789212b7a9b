"""Examples read from whatever form data come in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from sharpkit.contract.batches import (
    ACCEPTED,
    as_examples,
    check_finite,
    collated,
    is_batch,
    paired,
    shapes,
)
from sharpkit.contract.distributed_data import DistributedData
from sharpkit.contract.examples import Examples
from sharpkit.contract.streams import Stream, is_stream, read_stream
from sharpkit.errors import ArgumentError, DataError

Data: TypeAlias = (
    "Dataset[Any] | DataLoader[Any] | tuple[Any, Tensor] | Sequence[tuple[Any, Any]]"
    " | Iterable[Any] | Callable[[], Iterable[Any]] | Stream"
)

_READ_AT_ONCE = 256


def load_examples(data: Data, *, n: int | None = None, seed: int | None = 0) -> Examples:
    """The first n examples of a seeded random order of the data (its own order if seed is None).

    Inputs may be a tensor, or a dict or tuple of tensors. Examples of different shapes are kept as
    they are: see `Examples`. A stream is not held: see `Stream`.

    Args:
        data: One of

            - a pair (inputs, labels) of tensors or arrays;
            - a `Dataset` of (input, label) pairs;
            - a list of (input, label) pairs;
            - a list of (inputs, labels) batches, as other tools take them: the labels of each are
              a tensor with one row per example, and so are all its inputs, one of which has two
              dimensions or more. If single examples look like that, pass them as a `Dataset`;
            - a `DataLoader`. With the plain sequential or shuffling sampler it stands for its data
              set in index order; any other is read once, in the order it gives. A `collate_fn`
              gets the batches that the loader would give it without shuffling, so that padding is
              that of a loop over the loader. For a seeded choice of some examples, the batches
              that hold them are read whole, unless shapes do not depend on the batch;
            - a stream: an `IterableDataset`, a `DataLoader` of one, any other iterable, or a
              function without arguments that returns an iterator or a loader, of batches or of
              single pairs. It is read again for every pass, must give the same each time, and
              keeps its own order whatever the seed is.

            In the place of a pair may be a mapping with "labels" among its entries, as tokenizers
            give; the others are the inputs.
        n: How many examples; None for all.
        seed: Seed of the order; None keeps the data's own.

    Returns:
        Examples: On the CPU or wherever the given tensors are; without a copy if seed is None and
        the data are tensors.

    Raises:
        DataError: If there are no examples, lengths differ, an item is not a pair of tensors, an
            input or label is NaN or infinite, or a stream can be read only once.
        ArgumentError: If n is not between 1 and the number of examples.

    Example:
        >>> import torch
        >>> data = torch.arange(4.0).reshape(4, 1), torch.arange(4)
        >>> load_examples(data, n=2, seed=None).labels
        tensor([0, 1])
        >>> batches = [(torch.zeros(3, 5), torch.ones(3)), (torch.zeros(2, 7), torch.ones(2))]
        >>> len(load_examples(batches))
        5
    """
    return _finite(_load(data, n, seed))


def load_in_order(data: Data, n: int | None = None) -> Examples:
    """The first n examples in the data's own order, for values that do not depend on the order.

    As `load_examples` without a seed, except that a loader that shuffles stands for its data set in
    index order.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.zeros(4, 1), torch.arange(4))
        >>> load_in_order(DataLoader(data, shuffle=True)).labels
        tensor([0, 1, 2, 3])
    """
    if isinstance(data, DataLoader) and _is_plain(data):
        return _finite(_from_plain_loader(data, n, None))
    return load_examples(data, n=n, seed=None)


def load_part(
    data: Data, cut: Callable[[int], slice], *, n: int | None = None, seed: int | None = None
) -> tuple[Examples, Examples, int]:
    """A part of the examples that `load_examples` gives; other items of a data set are not read.

    Args:
        data: As there; so are n and seed.
        cut: Of their number, which ones.

    Returns:
        The part, which may be empty; the first and the last example of all; and their number.

    Example:
        >>> data = torch.zeros(5, 1), torch.arange(5)
        >>> part, ends, total = load_part(data, lambda total: slice(total // 2, total), n=4)
        >>> part.labels, ends.labels, total
        (tensor([2, 3]), tensor([0, 3]), 4)
    """
    items = _separate_items(data, seed)
    if items is None:
        whole = load_examples(data, n=n, seed=seed)
        total, part = len(whole), cut(len(whole))
        ends = Examples.joined([whole.slice(0, 1), whole.slice(total - 1, total)])
        return whole.slice(part.start, part.stop), ends, total
    order = _order(len(items), n, seed).tolist()
    ends = load_examples(Subset(items, [order[0], order[-1]]), seed=None)
    chosen = order[cut(len(order))]
    if not chosen:
        return ends.slice(0, 0), ends, len(order)
    return load_examples(Subset(items, chosen), seed=None), ends, len(order)


def _separate_items(data: Data, seed: int | None) -> Any:
    """The data set whose items are the examples, one by one; None if data are of another form."""
    if isinstance(data, DataLoader):
        shuffles = seed is None and isinstance(data.sampler, RandomSampler)
        batched = data.batch_sampler is not None and data.collate_fn is default_collate
        data = data.dataset if batched and not shuffles and _is_plain(data) else data
    found = isinstance(data, Dataset) and not isinstance(data, IterableDataset)
    known = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return data if found and known and type(data) is not TensorDataset else None


def _load(data: Data, n: int | None, seed: int | None) -> Examples:
    if isinstance(data, DistributedData):
        raise DataError(
            "the data are DistributedData, and this is computed in one process: pass the data "
            "themselves (.data), on one rank; m_sharpness, Tracker and the curvature operators "
            "work together"
        )
    if isinstance(data, Stream):
        return data.head(n)
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
        return _from_loader(data, n, seed)
    if type(data) is TensorDataset:  # a subclass may transform its items
        if len(data.tensors) != 2:
            raise DataError(
                f"expected a TensorDataset of inputs and labels, got {len(data.tensors)} tensors"
            )
        return _choose(as_examples(data.tensors), n, seed)
    data = paired(data)
    if _is_pair(data):
        return _choose(as_examples(data), n, seed)
    if isinstance(data, list | tuple):
        return _from_list(data, n, seed)
    sequence = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    loader = isinstance(data, DataLoader | IterableDataset)
    whole = isinstance(data, Tensor | np.ndarray | Mapping | str | PackedSequence)
    if loader or (not (sequence or whole) and is_stream(data)):
        return read_stream(data, n)
    if not sequence or whole:
        raise DataError(f"the data are a {type(data).__name__}: {ACCEPTED}")
    return _from_items(data, n, seed)


def _is_pair(data: Any) -> bool:
    """Whether data are inputs and labels as a whole: any tuple of two, [inputs, tensor]."""
    if isinstance(data, list):
        return len(data) == 2 and isinstance(data[1], Tensor | np.ndarray)
    return isinstance(data, tuple) and len(data) == 2


def _from_loader(loader: DataLoader[Any], n: int | None, seed: int | None) -> Examples:
    if _is_plain(loader):
        if seed is None and isinstance(loader.sampler, RandomSampler):
            raise DataError(
                "the DataLoader shuffles, so the data have no order of their own to keep: "
                "pass shuffle=False or an integer seed"
            )
        return _from_plain_loader(loader, n, seed)
    if loader.batch_sampler is None:
        return _from_list(list(loader), n, seed)
    return _choose(Examples.joined(map(as_examples, loader)), n, seed)


def _is_plain(loader: DataLoader[Any]) -> bool:
    """Whether a loader visits every item once, in order or shuffled."""
    sampler, batches = loader.sampler, loader.batch_sampler
    if type(sampler) not in (SequentialSampler, RandomSampler):
        return False
    if getattr(sampler, "replacement", False):
        return False
    if len(sampler) != len(loader.dataset):  # type: ignore[arg-type]
        return False
    return batches is None or (type(batches) is BatchSampler and batches.sampler is sampler)


def _from_plain_loader(loader: DataLoader[Any], n: int | None, seed: int | None) -> Examples:
    dataset, collate = loader.dataset, loader.collate_fn
    if loader.batch_sampler is None:
        items = range(len(cast("Any", dataset)))
        return _from_list([collate(dataset[i]) for i in items], n, seed)
    if collate is default_collate:
        return _from_items(dataset, n, seed)
    size = cast("Any", loader.batch_sampler).batch_size
    return _from_own_batches(dataset, collate, size, n, seed)


def _from_own_batches(
    dataset: Any, collate: Callable[[list[Any]], Any], size: int, n: int | None, seed: int | None
) -> Examples:
    """Examples as they are in batches of consecutive items that the user's function collates."""
    total = len(dataset)
    order = _order(total, n, seed)

    def batch(start: int, stop: int) -> Examples:
        examples = as_examples(collate([dataset[i] for i in range(start, min(stop, total))]))
        if len(examples) != min(stop, total) - start:
            raise DataError(
                f"the loader's collate_fn made {len(examples)} examples of "
                f"{min(stop, total) - start} items: expected as many; leave items out of the "
                "data set instead"
            )
        return examples

    if seed is not None and len(order) < total:
        first = int(order[0]) // size * size
        probe = batch(first, first + size)
        examples = Examples.joined([probe, *(batch(i, i + 1) for i in order.tolist())])
        if examples.uniform:
            return examples.slice(len(probe), len(examples))
    ordered, places = order.sort()
    parts = []
    numbers, counts = torch.unique_consecutive(ordered // size, return_counts=True)
    chosen = torch.split(ordered % size, counts.tolist())
    for start, rows in zip((numbers * size).tolist(), chosen, strict=True):
        examples = batch(start, start + size)
        parts.append(examples if len(rows) == len(examples) else examples.select(rows))
    examples = Examples.joined(parts)
    return examples if seed is None else examples.select(places.argsort())


def _from_list(items: Sequence[Any], n: int | None, seed: int | None) -> Examples:
    batches = [is_batch(item) for item in items]
    if not any(batches):
        return _from_items(items, n, seed)
    if not all(batches):
        raise DataError(
            f"item {batches.index(True)} of the list is a batch (inputs, labels), item "
            f"{batches.index(False)} is not: expected a list of batches, or of single examples; "
            "pass single examples that look like batches as a Dataset"
        )
    return _choose(Examples.joined(map(as_examples, items)), n, seed)


def _from_items(items: Any, n: int | None, seed: int | None) -> Examples:
    """Examples of single (input, label) items; runs of items of one shape are read together."""
    order = _order(len(items), n, seed).tolist()
    parts = []
    for start in range(0, len(order), _READ_AT_ONCE):
        read = [paired(items[i]) for i in order[start : start + _READ_AT_ONCE]]
        parts += [collated(list(run)) for _, run in groupby(read, key=shapes)]
    return Examples.joined(parts)


def _order(total: int, n: int | None, seed: int | None) -> Tensor:
    if total == 0:
        raise DataError("the data hold no examples")
    n = total if n is None else n
    if not 1 <= n <= total:
        raise ArgumentError(f"n = {n} examples asked for: expected 1 to {total}")
    if seed is None:
        return torch.arange(n)
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:n]


def _choose(examples: Examples, n: int | None, seed: int | None) -> Examples:
    order = _order(len(examples), n, seed)
    return examples.slice(0, len(order)) if seed is None else examples.select(order)


def _finite(examples: Examples) -> Examples:
    if examples.in_memory:  # a stream's have been looked at as they were read
        for part in examples.chunks(len(examples)):
            check_finite(part)
    return examples


def as_data(examples: Examples) -> Data:
    """Examples as data again, which keep their order where they are loaded with `seed=None`.

    A data set; a pair if inputs are a structure; a list of batches if they differ in shape; a
    stream as it is.

    Example:
        >>> as_data(Examples(torch.zeros(2, 1), torch.arange(2))).tensors[1]
        tensor([0, 1])
    """
    if isinstance(examples, Stream):
        return examples
    if not examples.uniform:
        return [(part.inputs, part.labels) for part in examples.chunks(len(examples))]
    if isinstance(examples.inputs, Tensor):
        return TensorDataset(examples.inputs, examples.labels)
    return examples.inputs, examples.labels
