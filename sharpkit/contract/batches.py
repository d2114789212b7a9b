"""One batch of a pair (inputs, labels) as examples, or why it is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from sharpkit.contract.examples import Examples, Inputs
from sharpkit.errors import DataError

ACCEPTED = (
    "expected a pair (inputs, labels) of tensors, a Dataset or list of (input, label) pairs, "
    "a list of (inputs, labels) batches, a DataLoader, or a function that returns an iterator of "
    "batches; a dict with the key 'labels' may stand for a pair"
)


def paired(item: Any) -> Any:
    """A mapping with labels among its entries, as tokenizers and their collators make, as a pair.

    Anything else is given back as it is.

    Example:
        >>> paired({"input_ids": [1, 2], "labels": [0, 0]})
        ({'input_ids': [1, 2]}, [0, 0])
    """
    if isinstance(item, Mapping) and "labels" in item and len(item) > 1:
        return {key: value for key, value in item.items() if key != "labels"}, item["labels"]
    return item


def as_examples(pair: Any) -> Examples:
    """Inputs and labels as a whole, or a batch of them, after a check of everything but values."""
    pair = paired(pair)
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise _not_a_pair(pair)
    if isinstance(pair[0], list) and isinstance(pair[1], list):
        raise DataError(f"the data are a pair of lists: stack each into a tensor; {ACCEPTED}")
    inputs = pytree.tree_map(_as_input, _plain(pair[0]))
    labels = _as_labels(pair[1])
    leaves = pytree.tree_leaves(inputs)
    if not leaves:
        raise DataError("the inputs hold no tensor")
    if any(t.ndim == 0 for t in [*leaves, labels]):
        raise DataError(
            "the inputs or labels have a tensor without dimensions: expected one row per example"
        )
    lengths = {len(t) for t in [*leaves, labels]}
    if len(lengths) != 1:
        raise DataError(f"inputs and labels differ in length: {sorted(lengths)}")
    return Examples(inputs, labels)


def is_batch(item: Any) -> bool:
    """Whether an item of a list holds several examples, in the first dimension of its tensors."""
    item = paired(item)
    if not isinstance(item, tuple | list) or len(item) != 2:
        return False
    inputs = pytree.tree_leaves(_plain(item[0]))
    tensors = [item[1], *inputs]
    if not all(isinstance(t, Tensor | np.ndarray) and t.ndim >= 1 for t in tensors):
        return False
    return len({len(t) for t in tensors}) == 1 and any(t.ndim >= 2 for t in inputs)


def collated(items: list[Any]) -> Examples:
    """Single (input, label) items of one shape, stacked as torch does by default."""
    items = [paired(item) for item in items]
    for item in items:
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise _not_a_pair(item)
        _plain(item[0])
    try:
        batch = default_collate(items)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(
            f"the items of the data cannot be put together: {error}; expected tensors, arrays or "
            "numbers, or a DataLoader with a collate_fn that makes (inputs, labels) of them"
        ) from error
    return as_examples(batch)


def shapes(item: Any) -> list[Any]:
    """The shape of every tensor of an item, None for what is none.

    Example:
        >>> shapes((torch.zeros(2, 3), 1))
        [torch.Size([2, 3]), None]
    """
    return [getattr(t, "shape", None) for t in pytree.tree_leaves(item)]


def check_finite(batch: Examples) -> None:
    """Raise DataError if an input or label of uniform examples is NaN or infinite."""
    for what, tree in (("inputs", batch.inputs), ("labels", batch.labels)):
        if not all(map(_is_finite, pytree.tree_leaves(tree))):
            raise DataError(f"the {what} have NaN or infinite entries")


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return True
    rows = max(1, (1 << 22) * len(tensor) // tensor.numel())  # no temporary as large as the data
    return all(
        bool(torch.isfinite(piece).all())
        for piece in (tensor[i : i + rows] for i in range(0, len(tensor), rows))
    )


def _plain(inputs: Inputs) -> Inputs:
    """Mappings as dict and lists as tuple, so that the same inputs always have one structure."""
    if isinstance(inputs, PackedSequence):
        raise DataError(
            "the inputs are a PackedSequence, which has no rows per example: pass the padded "
            "inputs and their lengths as a tuple (x, lengths), and pack inside forward"
        )
    if isinstance(inputs, Mapping):
        return {key: _plain(value) for key, value in inputs.items()}
    if type(inputs) in (list, tuple):
        return tuple(_plain(value) for value in inputs)
    return inputs


def _not_a_pair(item: Any) -> DataError:
    found = f"{len(item)} items" if isinstance(item, tuple | list) else f"a {type(item).__name__}"
    return DataError(
        f"expected items that are pairs (input, label), got {found}; a DataLoader with a "
        "collate_fn that returns (inputs, labels) makes them of anything"
    )


def _as_input(leaf: Any) -> Tensor:
    if not isinstance(leaf, Tensor) and not hasattr(leaf, "__array__"):
        raise DataError(
            f"the inputs hold a {type(leaf).__name__}: expected a tensor, or a dict or tuple of "
            "tensors"
        )
    return _as_tensor(leaf, "inputs")


def _as_labels(labels: Any) -> Tensor:
    nested = isinstance(labels, tuple | list) and any(getattr(t, "ndim", 0) for t in labels)
    if nested or not (isinstance(labels, Tensor | tuple | list) or hasattr(labels, "__array__")):
        raise DataError(
            f"the labels are a {type(labels).__name__}: expected a tensor with one row per "
            "example; two batches are given as a list, not as a tuple"
        )
    return _as_tensor(labels, "labels")


def _as_tensor(values: Any, what: str) -> Tensor:
    try:
        tensor = torch.as_tensor(values if isinstance(values, tuple | list) else _array(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"the {what} are not numbers: {error}; {ACCEPTED}") from error
    if tensor.is_nested or tensor.layout is not torch.strided:
        raise DataError(
            f"the {what} are a nested or sparse tensor: expected dense ones; call to_dense(), or "
            "pad sequences to one length"
        )
    return tensor


def _array(values: Any) -> Any:
    return values if isinstance(values, Tensor) else np.asarray(values)
