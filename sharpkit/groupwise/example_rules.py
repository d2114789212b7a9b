"""How functions other than layers run when one of their weights differs from example to example."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from sharpkit.contract.embeddings import EmbeddingCall
from sharpkit.contract.normalisation import BatchNormCall
from sharpkit.groupwise import low_rank, pooling, recurrent
from sharpkit.groupwise.attention import attention
from sharpkit.groupwise.group_layers import channels_of_groups, examples_of_groups

if TYPE_CHECKING:
    from sharpkit.groupwise.one_batch import OneBatch

Function: TypeAlias = Callable[..., Any]
Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]
Rule = Callable[["OneBatch", Function, Args, Kwargs], Any]


def _batch_norm(batch: OneBatch, func: Function, args: Args, kwargs: Kwargs) -> Tensor | None:
    """Channels of their own for every example in eval mode, and for every group in training."""
    call = BatchNormCall(*args, **kwargs)
    x, mean, variance = call.input, call.running_mean, call.running_var
    if not batch.holds_examples(x):
        return None
    if call.training:
        return _group_statistics(batch, call)
    if mean is None or variance is None:
        return None
    n = len(x)

    def repeated(t: Tensor) -> Tensor:
        if batch.name_of(t) is not None:
            return batch.flat_of_examples(t)
        key = (t.data_ptr(), t._version, n)
        if key not in batch.kept:
            batch.kept[key] = t.repeat(n)
        return batch.kept[key]

    def own(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        return t.repeat(n) if batch.name_of(t) is None else batch.flat_of_examples(t)

    out = F.batch_norm(
        x.reshape(1, -1, *x.shape[2:]), repeated(mean), repeated(variance),
        own(call.weight), own(call.bias), False, 0.0, call.eps,
    )  # fmt: skip
    result: Tensor = torch.ops.aten._unsafe_view(out, x.shape)
    return result


def _group_statistics(batch: OneBatch, call: BatchNormCall) -> Tensor | None:
    """BatchNorm in training: each group is normalised by its own statistics.

    Running statistics, if any, must have the channels of all groups, one after the other.
    """
    groups, x = batch.point.groups, call.input
    running = (call.running_mean, call.running_var)
    if any(t is not None and t.numel() != groups * x.shape[1] for t in running):
        return None

    def own(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        value = t if batch.name_of(t) is None else batch.of_groups(t)
        return value.repeat(groups) if value.ndim == 1 else value.flatten()

    out = F.batch_norm(
        channels_of_groups(x, groups), *running, own(call.weight), own(call.bias),
        True, call.momentum, call.eps,
    )  # fmt: skip
    return examples_of_groups(out, groups)


def _training_batch_norm(
    batch: OneBatch, func: Function, args: Args, kwargs: Kwargs
) -> Tensor | None:
    training = BatchNormCall(*args, **kwargs).training
    return _batch_norm(batch, func, args, kwargs) if training else None


def _layer_norm(batch: OneBatch, func: Function, args: Args, kwargs: Kwargs) -> Tensor | None:
    given = _named(("input", "normalized_shape"), args, kwargs)
    x, shape = given["input"], tuple(given["normalized_shape"])
    if not batch.holds_examples(x) or x.ndim <= len(shape):
        return None
    out = F.layer_norm(x, shape, None, None, given["eps"])
    return _scaled(batch, out, given["weight"], given["bias"], lambda t: t)


def _group_norm(batch: OneBatch, func: Function, args: Args, kwargs: Kwargs) -> Tensor | None:
    given = _named(("input", "num_groups"), args, kwargs)
    x = given["input"]
    if not batch.holds_examples(x):
        return None
    out = F.group_norm(x, given["num_groups"], None, None, given["eps"])

    def per_channel(t: Tensor) -> Tensor:
        return t.view(*t.shape, *[1] * (x.ndim - 2))

    return _scaled(batch, out, given["weight"], given["bias"], per_channel)


def _rms_norm(batch: OneBatch, func: Function, args: Args, kwargs: Kwargs) -> Tensor | None:
    names = ("input", "normalized_shape", "weight", "eps")
    given = {"eps": None} | dict(zip(names, args, strict=False)) | kwargs
    x, shape = given["input"], tuple(given["normalized_shape"])
    if not batch.holds_examples(x) or x.ndim <= len(shape):
        return None
    out = F.rms_norm(x, shape, None, given["eps"])
    return _scaled(batch, out, given["weight"], None, lambda t: t)


def _prelu(batch: OneBatch, func: Function, args: Args, kwargs: Kwargs) -> Tensor | None:
    given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
    x, weight = given["input"], given["weight"]
    if batch.name_of(weight) is None or not batch.holds_examples(x) or weight.ndim != 1:
        return None
    own = batch.flat_of_examples(weight)
    out = F.prelu(x.reshape(1, len(own), -1), own)
    result: Tensor = torch.ops.aten._unsafe_view(out, x.shape)
    return result


def _named(first: tuple[str, ...], args: Args, kwargs: Kwargs) -> Kwargs:
    """The arguments of a normalisation by name, with the defaults of those that are not given."""
    given = dict(zip((*first, "weight", "bias", "eps"), args, strict=False))
    return {"weight": None, "bias": None, "eps": 1e-5} | given | kwargs


def _scaled(
    batch: OneBatch,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shaped: Callable[[Tensor], Tensor],
) -> Tensor:
    """x · weight + bias, each shared or per example."""

    def value(t: Tensor) -> Tensor:
        if batch.name_of(t) is None:
            return shaped(t.unsqueeze(0)).squeeze(0)
        return _beside(shaped(batch.of_examples(t)), x)

    if weight is not None and bias is not None:
        return torch.addcmul(value(bias), x, value(weight))
    if weight is not None:
        return x * value(weight)
    return x if bias is None else x + value(bias)


def _beside(t: Tensor, x: Tensor) -> Tensor:
    """(n, ...) shaped to broadcast from the right against (n, ...) with more axes."""
    return t.view(len(t), *[1] * (x.ndim - t.ndim), *t.shape[1:])


def _embedding(batch: OneBatch, func: Function, args: Args, kwargs: Kwargs) -> Tensor | None:
    call = EmbeddingCall(*args, **kwargs)
    index, weight = call.input, call.weight
    special = (call.padding_idx, call.max_norm, call.scale_grad_by_freq, call.sparse)
    name = batch.name_of(weight)
    if name is None or any(v not in (None, False) for v in special):
        return None
    if index.ndim == 0 or batch.is_part(weight):
        return None
    if len(index) != batch.examples or name in (batch.known or ()):
        return _positions(batch, name, call)
    batch.looked_up[name] = batch.looked_up.get(name, 0) + index[0].numel()
    tables, rows = batch.of_groups(weight), index.reshape(batch.point.groups, -1).long()
    if name in batch.point.probed and torch.is_grad_enabled():
        found = F.embedding(index, tables).requires_grad_()
        batch.inputs[name].append(rows)
        batch.probes[name].append(found)
        return found.clone()  # a leaf may not be written to
    if tables.ndim == weight.ndim:
        found = F.embedding(index, tables)
        if name in batch.point.thin:
            moved, by = batch.point.thin[name]
            found = found + (low_rank.same_row(rows, moved).to(by.dtype) @ by).view(found.shape)
        return found
    by_group = index.reshape(batch.point.groups, -1, *index.shape[1:])
    return _own_rows(tables, by_group).flatten(0, 1)


def _own_rows(tables: Tensor, index: Tensor) -> Tensor:
    """Rows of the tables (groups, rows, ...) of groups; the index has their axis, or 1, first."""
    first = torch.arange(len(tables), device=index.device) * tables.shape[1]
    return F.embedding(index + first.view(-1, *[1] * (index.ndim - 1)), tables.flatten(0, 1))


def _positions(batch: OneBatch, name: str, call: EmbeddingCall) -> Tensor | None:
    """Rows of a table that are the same for all examples, which is known by the index's shape."""
    index, weight = call.input, call.weight
    if batch.known is not None and index.shape not in batch.known.get(name, ()):
        return None
    batch.positions[name] = batch.positions.get(name, frozenset()) | {index.shape}
    tables, one = batch.of_groups(weight), index.unsqueeze(0)
    value = _own_rows(tables, one) if tables.ndim > weight.ndim else F.embedding(index, tables)
    return batch.part(weight, F.embedding(index, weight), value)


def _part(batch: OneBatch, func: Function, args: Args, kwargs: Kwargs) -> Tensor | None:
    """A slice of a weight, or one with a further axis of 1."""
    if not args or batch.name_of(args[0]) is None:
        return None
    weight, value = args[0], batch.of_groups(args[0])
    own = value.ndim > weight.ndim
    if func is torch.Tensor.__getitem__:
        entries = args[1] if isinstance(args[1], tuple) else (args[1],)
        if not all(_is_plain(entry) for entry in entries):
            return None
        value = value[(slice(None), *entries)] if own else value[entries]
    else:
        axis = kwargs["dim"] if kwargs else args[1]
        value = value.unsqueeze(axis + 1 if own and axis >= 0 else axis)
    return batch.part(weight, func(*args, **kwargs), value)


def _is_plain(entry: Any) -> bool:
    """Whether an entry of an index is a number, None, ... or a slice by numbers."""
    if isinstance(entry, slice):
        return all(_is_plain(end) for end in (entry.start, entry.stop, entry.step))
    return entry is None or entry is Ellipsis or type(entry) is int


def _elementwise(batch: OneBatch, func: Function, args: Args, kwargs: Kwargs) -> Tensor | None:
    """A weight beside a tensor with examples on its first axis, and broadcast over that axis."""
    if len(args) != 2 or (
        batch.name_of(args[0]) is not None and batch.name_of(args[1]) is not None
    ):
        return None
    at = 0 if batch.name_of(args[0]) is not None else 1
    weight, x = args[at], args[1 - at]
    if batch.name_of(weight) is None or not batch.holds_examples(x):
        return None
    own = batch.of_examples(weight)
    if weight.ndim == x.ndim and len(weight) == 1:
        own = own.squeeze(1)
    elif weight.ndim >= x.ndim:
        return None
    own = _beside(own, x)
    result: Tensor = func(own, x, **kwargs) if at == 0 else func(x, own, **kwargs)
    return result


def _expand(batch: OneBatch, func: Function, args: Args, kwargs: Kwargs) -> Tensor | None:
    """A weight with a first axis of 1, expanded to the examples, such as a class token."""
    weight, *sizes = args
    if len(sizes) == 1 and not isinstance(sizes[0], int):
        sizes = list(sizes[0])
    if batch.name_of(weight) is None or kwargs or len(sizes) != weight.ndim or len(weight) != 1:
        return None
    if sizes[0] != batch.examples:
        return None
    return batch.of_examples(weight).squeeze(1).expand(*sizes)


def max_pool(func: Function, args: Args, kwargs: Kwargs) -> Tensor:
    """Max pooling, by a faster way where there is one; it has no weights."""
    if not pooling.is_plain(*args, **kwargs):
        result: Tensor = func(*args, **kwargs)
        return result
    x = args[0] if args else kwargs["input"]
    if torch.is_grad_enabled() and x.requires_grad:
        pool: Tensor = pooling.MaxPool2x2.apply(x)  # type: ignore[no-untyped-call]
        return pool
    return pooling.pooled(x)


POOLINGS: tuple[Function, ...] = (F.max_pool2d, torch.max_pool2d)
_ELEMENTWISE = [
    getattr(home, name + end)
    for name in ("add", "sub", "mul", "div")
    for home, ends in ((torch.Tensor, ("", "_")), (torch, ("",)))
    for end in ends
]
# what mixes the examples of a batch, whether or not it takes a weight
GROUP_NORMALISING: dict[Function, Rule] = {F.batch_norm: _training_batch_norm}
RULES: dict[Function, Rule] = {
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.rms_norm: _rms_norm,
    F.prelu: _prelu,
    F.embedding: _embedding,
    F.multi_head_attention_forward: attention,
    torch.Tensor.expand: _expand,
    **dict.fromkeys((torch.Tensor.__getitem__, torch.Tensor.unsqueeze, torch.unsqueeze), _part),
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(recurrent.LAYERS, recurrent.recurrent_layer),
    **dict.fromkeys(recurrent.CELLS, recurrent.recurrent_cell),
}
# what brings values to Python, where they may decide for all examples at once
DECISIONS: frozenset[Function] = frozenset(
    {
        torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__bool__,
        torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__,
        torch.Tensor.is_nonzero, torch.is_nonzero, torch.equal, torch.allclose,
        torch.Tensor.equal, torch.Tensor.allclose,
    }
)  # fmt: skip
# what only asks for the form of a weight
QUESTIONS: frozenset[Function] = frozenset(
    {
        torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__,
        torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.is_contiguous,
        *(
            getattr(torch.Tensor, name).__get__
            for name in ("shape", "dtype", "device", "ndim", "is_cuda", "layout", "requires_grad")
        ),
    }
)  # fmt: skip
