"""Examples in memory, read from whatever form data come in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from sharpkit.errors import ArgumentError, DataError

Data: TypeAlias = "Dataset[Any] | DataLoader[Any] | tuple[Any, Tensor]"


Inputs: TypeAlias = Any  # a tensor, or a dict or tuple of tensors that all have the same length


@dataclass(frozen=True)
class Examples:
    """Inputs and labels held in memory, in the order in which they are measured."""

    inputs: Inputs  # leaves of shape (n, ...)
    labels: Tensor  # (n, ...)

    def __len__(self) -> int:
        """The number of examples."""
        return int(self.labels.shape[0])

    def slice(self, start: int, stop: int) -> Examples:
        """Examples start to stop, without a copy."""
        take = pytree.tree_map(lambda t: t[start:stop], self.inputs)
        return Examples(take, self.labels[start:stop])

    def chunks(self, size: int) -> Iterator[Examples]:
        """Consecutive examples, `size` at a time; the last chunk may be smaller."""
        for start in range(0, len(self), size):
            yield self.slice(start, start + size)

    def to(self, device: torch.device, dtype: torch.dtype) -> Examples:
        """On the device; floating-point inputs (and labels, if regression) in the dtype."""

        def move(t: Tensor) -> Tensor:
            return t.to(device, dtype) if t.is_floating_point() else t.to(device)

        return Examples(pytree.tree_map(move, self.inputs), move(self.labels))


def load_examples(data: Data, *, n: int | None = None, seed: int | None = 0) -> Examples:
    """The first n examples of a seeded random order of the data (its own order if seed is None).

    Args:
        data: A map-style `Dataset` (or list) of (input, label) pairs, a `DataLoader`, or a pair
            (inputs, labels) of tensors; inputs may be a dict or tuple of tensors. A loader with
            the plain sequential or shuffling sampler stands for its data set in index order;
            any other is read once, in the order it gives.
        n: How many examples; None for all.
        seed: Seed of the order; None keeps the data's own.

    Returns:
        Examples: On the CPU or wherever the given tensors are.

    Raises:
        DataError: If there are no examples, lengths differ, an item is not a pair, or an input is
            NaN or infinite.
        ArgumentError: If n is not between 1 and the number of examples.

    Example:
        >>> import torch
        >>> data = torch.arange(4.0).reshape(4, 1), torch.arange(4)
        >>> load_examples(data, n=2, seed=None).labels
        tensor([0, 1])
    """
    if isinstance(data, DataLoader):
        if isinstance(data.dataset, IterableDataset) or not visits_all_once(data):
            return _from_pair(_concatenate(list(data)), n, seed)
        if seed is None and isinstance(data.sampler, RandomSampler):
            raise DataError(
                "the DataLoader shuffles, so the data have no order of their own to keep: "
                "pass shuffle=False or an integer seed"
            )
        return _from_dataset(data.dataset, n, seed, data.collate_fn or _default_collate)
    if isinstance(data, tuple) or _is_pair(data):
        parts = list(cast("Iterable[Any]", data))
        if len(parts) != 2:
            raise DataError(f"expected a pair (inputs, labels), got {len(parts)} items")
        inputs = pytree.tree_map(torch.as_tensor, parts[0])
        return _choose(inputs, torch.as_tensor(parts[1]), n, seed)
    if type(data) is TensorDataset:  # a subclass may transform its items
        if len(data.tensors) != 2:
            raise DataError(
                f"expected a TensorDataset of inputs and labels, got {len(data.tensors)} tensors"
            )
        return _choose(data.tensors[0], data.tensors[1], n, seed)
    return _from_dataset(data, n, seed, _default_collate)


def load_in_order(data: Data, n: int | None = None) -> Examples:
    """The first n examples in the data's own order, for values that do not depend on the order.

    As `load_examples` without a seed, except that a loader that shuffles stands for its data set in
    index order.

    Args:
        data: As for `load_examples`.
        n: How many examples; None for all.

    Raises:
        DataError: As `load_examples`.
        ArgumentError: As `load_examples`.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.zeros(4, 1), torch.arange(4))
        >>> load_in_order(DataLoader(data, shuffle=True)).labels
        tensor([0, 1, 2, 3])
    """
    if (
        isinstance(data, DataLoader)
        and isinstance(data.sampler, RandomSampler)
        and visits_all_once(data)
    ):
        data = DataLoader(data.dataset, collate_fn=data.collate_fn)
    return load_examples(data, n=n, seed=None)


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


def add_to_digest(digest: hashlib._Hash, tensor: Tensor) -> None:
    """Feed a hash with the shape, dtype and values of a tensor."""
    digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def visits_all_once(loader: DataLoader[Any]) -> bool:
    """Whether a loader's sampling is the plain one, in order or shuffled."""
    sampler, batches = loader.sampler, loader.batch_sampler
    plain = type(batches) in (BatchSampler, type(None))
    if type(sampler) is RandomSampler:
        plain &= not sampler.replacement and sampler.num_samples == len(cast("Any", loader.dataset))
    elif type(sampler) is not SequentialSampler:
        return False
    return plain and getattr(batches, "sampler", sampler) is sampler


def _is_pair(data: Any) -> bool:
    return isinstance(data, list) and len(data) == 2 and isinstance(data[1], Tensor)


def _default_collate(items: Sequence[Any]) -> Any:
    from torch.utils.data import default_collate

    return default_collate(list(items))


def _from_dataset(
    dataset: Dataset[Any], n: int | None, seed: int | None, collate: Callable[[list[Any]], Any]
) -> Examples:
    if isinstance(dataset, IterableDataset):
        return _from_pair(_concatenate([collate([item]) for item in dataset]), n, seed)
    total = len(dataset)  # type: ignore[arg-type]
    order = _order(total, n, seed)
    batches = [
        collate([dataset[i] for i in order[start : start + 256].tolist()])
        for start in range(0, len(order), 256)
    ]
    inputs, labels = _pair(_concatenate(batches))
    return _checked(inputs, labels)


def _from_pair(pair: tuple[Any, Tensor], n: int | None, seed: int | None) -> Examples:
    return _choose(*_pair(pair), n, seed)


def _pair(batch: Any) -> tuple[Any, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise DataError("expected items that are pairs (input, label)")
    return batch[0], batch[1]


def _concatenate(batches: list[Any]) -> Any:
    if not batches:
        raise DataError("the data hold no examples")
    leaves, spec = zip(*(pytree.tree_flatten(batch) for batch in batches), strict=True)
    columns = [
        torch.cat([torch.as_tensor(t) for t in column]) for column in zip(*leaves, strict=True)
    ]
    return pytree.tree_unflatten(columns, spec[0])


def _order(total: int, n: int | None, seed: int | None) -> Tensor:
    if total == 0:
        raise DataError("the data hold no examples")
    n = total if n is None else n
    if not 1 <= n <= total:
        raise ArgumentError(f"n = {n} examples asked for: expected 1 to {total}")
    if seed is None:
        return torch.arange(n)
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:n]


def _choose(inputs: Inputs, labels: Tensor, n: int | None, seed: int | None) -> Examples:
    leaves = pytree.tree_leaves(inputs)
    lengths = {int(t.shape[0]) for t in leaves} | {int(labels.shape[0])}
    if len(lengths) != 1:
        raise DataError(f"inputs and labels differ in length: {sorted(lengths)}")
    order = _order(lengths.pop(), n, seed)
    if seed is None:
        k = len(order)
        return _checked(pytree.tree_map(lambda t: t[:k], inputs), labels[:k])
    return _checked(
        pytree.tree_map(lambda t: t[order.to(t.device)], inputs), labels[order.to(labels.device)]
    )


def _checked(inputs: Inputs, labels: Tensor) -> Examples:
    for leaf in pytree.tree_leaves(inputs):
        if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            raise DataError("the inputs have NaN or infinite entries")
    if labels.is_floating_point() and not bool(torch.isfinite(labels).all()):
        raise DataError("the labels have NaN or infinite entries")
    return Examples(inputs, labels)
