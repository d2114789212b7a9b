"""A fast fingerprint of examples in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sharpkit.contract.examples import Examples

_WORDS = 1 << 17  # a megabyte at a time stays in the cache
_ODD = -7046029254386353131  # 2^64 over the golden ratio, as a signed integer


def checksum(examples: Examples) -> int:
    """A fingerprint of shapes, dtypes and bytes, to notice data that were changed in place.

    The bytes are summed as integers x_i with distinct odd weights w_i, modulo 2^64, as Σ w_i x_i
    and, for the high bits, Σ w_i ⌊x_i / 2^32⌋. It is fast, not cryptographic.

    Example:
        >>> x = torch.zeros(2, 3)
        >>> before = checksum(Examples(x, torch.arange(2)))
        >>> x[1, 2] = 1
        >>> before == checksum(Examples(x, torch.arange(2)))
        False
    """
    parts = examples.chunks(max(1, len(examples)))
    return fingerprint(t for part in parts for t in pytree.tree_leaves((part.inputs, part.labels)))


def fingerprint(given: Iterable[Tensor]) -> int:
    """That of tensors in their order, as `checksum` of examples; 64 bits.

    Example:
        >>> fingerprint([torch.zeros(())]) == fingerprint([torch.zeros(1)])
        False
    """
    tensors = list(given)
    kinds = [(tuple(t.shape), str(t.dtype)) for t in tensors]
    pieces = (words for t in tensors for words in _words(t))
    sums = [_weighted_sums(words) for words in _gathered(pieces)]
    found = repr((kinds, [pair.tolist() for pair in sums]))
    return int.from_bytes(hashlib.sha256(found.encode()).digest()[:8])


def _words(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor as int64, some rows at a time."""
    tensor = tensor.detach()
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    if tensor.numel() == 0:
        return
    tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
    row_bytes = tensor[:1].numel() * tensor.element_size()
    for rows in _cut(tensor, max(1, 8 * _WORDS // row_bytes)):
        raw = rows.resolve_neg().contiguous().flatten().view(torch.uint8)
        if len(raw) % 8 or raw.storage_offset() % 8:
            raw = torch.cat([raw, raw.new_zeros(-len(raw) % 8)])
        yield from _cut(raw.view(torch.int64), _WORDS)


def _cut(tensor: Tensor, size: int) -> Iterator[Tensor]:
    return (tensor[start : start + size] for start in range(0, len(tensor), size))


def _gathered(pieces: Iterator[Tensor]) -> Iterator[Tensor]:
    """Neighbours on one device put together, up to a megabyte."""
    held: list[Tensor] = []
    size = 0
    for piece in pieces:
        if held and (size + len(piece) > _WORDS or piece.device != held[0].device):
            yield torch.cat(held) if len(held) > 1 else held[0]
            held, size = [], 0
        held.append(piece)
        size += len(piece)
    if held:
        yield torch.cat(held)


def _weighted_sums(words: Tensor) -> Tensor:
    weights = torch.arange(len(words), device=words.device) * _ODD | 1
    return torch.stack([(words * weights).sum(), ((words >> 32) * weights).sum()])
