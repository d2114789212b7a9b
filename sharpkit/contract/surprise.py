"""−log p of labels from logits; of many logits in slices, with one tensor of their size at a time.

Written out, the formula and its derivatives take several tensors of the size of the logits. A
language model has so many that these are its memory. In slices nothing of that size is kept but the
logits themselves, which the network made, and its derivative by them is a single one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn.functional import softplus

# bytes of logits that are cut into slices, and of a slice; a GPU is slow for small ones
_LARGE = {"cpu": 2**24, "cuda": 2**28}
_SLICES = 8  # slices that fit into what is not cut yet
_WIDE = (torch.float32, torch.float64)  # halves are left to autocast


def surprise(outputs: Tensor, labels: Tensor) -> Tensor:
    """−log p of every label, (..., C) and (...) -> (...), also where p rounds to 1.

    Derivatives of every order and both modes, also under torch.func. Large logits go in slices: the
    same numbers but for rounding.

    Example:
        >>> surprise(torch.tensor([[30.0, 0.0]]), torch.tensor([0])).item()  # exp(-30)
        9.357...e-14
    """
    large = outputs.numel() * outputs.element_size() > large_bytes(outputs.device)
    if not large or outputs.ndim < 2 or outputs.shape[-1] < 2 or outputs.dtype not in _WIDE:
        return _written_out(outputs, labels)
    found: Tensor = _Surprise.apply(outputs, labels)  # type: ignore[no-untyped-call]
    return found


def mean_surprise(outputs: Tensor, labels: Tensor, groups: int = 1) -> Tensor:
    """The mean of `surprise` over each of some equally large groups of the first axis, (groups,).

    Example:
        >>> mean_surprise(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), 2)  # log 2
        tensor([0.6931, 0.6931])
    """
    known = is_small(outputs) and not (outputs.requires_grad and torch.is_grad_enabled())
    return _means(_known(outputs, labels)[0] if known else surprise(outputs, labels), groups)


def group_slopes(
    outputs: Tensor, labels: Tensor, groups: int, factor: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`mean_surprise` of logits that are small, and its derivatives by them, in closed form.

    Returns means (groups,), derivatives shaped as the outputs times a factor, a number or one for
    each group (groups,), and None. Without a factor it is 2^exponent, which takes the largest of a
    group to between 1 and 2, and exponents (groups,) in float64 come last, +inf where all are 0.
    """
    losses, others, wrong = _known(outputs, labels)
    of_groups = wrong.reshape(groups, -1)
    share, exponent = 1.0 / of_groups.shape[1], None
    if factor is None:
        top = of_groups.amax(1).double() * share
        moves = (top > 0) & (top < torch.inf)
        exponent = torch.where(moves, -torch.floor(torch.log2(top)), torch.inf)
        factor = torch.exp2(exponent.masked_fill(~moves, 0.0))
    slopes = others.scatter_(-1, labels.unsqueeze(-1), -wrong)
    if isinstance(factor, Tensor):  # whose range may be larger than that of the slopes
        wide = slopes.reshape(groups, -1).double() * (factor * share).unsqueeze(1)
        slopes = wide.to(slopes.dtype).reshape(slopes.shape)
    else:
        slopes = slopes * (factor * share)
    return _means(losses, groups), slopes, exponent


def is_small(outputs: Tensor) -> bool:
    """Whether these are a few logits of full precision, and no transform differentiates them."""
    return (
        outputs.ndim > 1
        and outputs.shape[-1] > 1
        and outputs.dtype in _WIDE
        and outputs.numel() * outputs.element_size() <= large_bytes(outputs.device)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _means(losses: Tensor, groups: int) -> Tensor:
    # halves are summed in float32, as torch does
    wide = torch.promote_types(losses.dtype, torch.float32)
    return losses.reshape(groups, -1).mean(1, dtype=wide).to(losses.dtype)


def _known(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (...), p of every other class, 0 at the label (..., C), and their sum (..., 1)."""
    place = labels.unsqueeze(-1)
    logs = outputs.log_softmax(-1)
    losses, others = -logs.gather(-1, place), logs.exp_().scatter_(-1, place, 0.0)
    wrong = others.sum(-1, keepdim=True)
    # where p of the label is nearly 1 its logarithm has lost what the others know
    losses = torch.where(wrong < 0.5, -torch.log1p(-wrong), losses)
    return losses.squeeze(-1), others, wrong


def large_bytes(device: torch.device) -> int:
    """From how many bytes on logits are cut into slices."""
    return _LARGE.get(device.type, _LARGE["cuda"])


def slices(outputs: Tensor) -> Iterator[tuple[slice, ...]]:
    """Where to cut logits (..., C) into slices, along the longest axis before the classes."""
    leading = list(outputs.shape[:-1])
    axis = max(range(len(leading)), key=leading.__getitem__)
    size = outputs.numel() * outputs.element_size()
    count = min(leading[axis], -(-size * _SLICES // large_bytes(outputs.device)))
    for i in range(count):
        start, stop = (leading[axis] * j // count for j in (i, i + 1))
        yield *[slice(None)] * axis, slice(start, stop)


def _written_out(outputs: Tensor, labels: Tensor) -> Tensor:
    # the default threshold of 20 would round softplus'' to 0 above it
    return softplus(torch.logsumexp(_others(outputs, labels), -1), threshold=80.0)


def _others(outputs: Tensor, labels: Tensor) -> Tensor:
    """Logits minus that of the label, which itself is −inf."""
    place = labels.unsqueeze(-1)
    return (outputs - outputs.gather(-1, place)).scatter(-1, place, -torch.inf)


def slope(outputs: Tensor, labels: Tensor, factor: Tensor) -> Tensor:
    """The factor (...) times the derivative by the logits: p_j, and p_y − 1 at the label."""
    others, wrong = _shares(outputs, labels)
    wrong = wrong * factor.unsqueeze(-1)
    return (others * wrong).scatter(-1, labels.unsqueeze(-1), -wrong)


def curved(outputs: Tensor, labels: Tensor, factor: Tensor, u: Tensor) -> Tensor:
    """The factor (...) times the second derivative, applied to u: p ∘ u − p (p·u).

    The entry of u at the most probable class is subtracted first, which changes nothing but
    rounding, where p is nearly 1.
    """
    place, factor = labels.unsqueeze(-1), factor.unsqueeze(-1)
    others, wrong = _shares(outputs, labels)
    p = (others * wrong).scatter(-1, place, 1.0 - wrong)
    u = u - u.gather(-1, outputs.argmax(-1, keepdim=True))
    mean = (p.unsqueeze(-2) @ u.unsqueeze(-1)).squeeze(-1)
    return p * factor * (u - mean)


def _shares(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of every other class among the others, 0 at the label; and p of all others, (..., 1)."""
    others = _others(outputs, labels)
    total = torch.logsumexp(others, -1, keepdim=True)
    among = torch.exp(others - total.masked_fill(total == -torch.inf, 0.0))  # where all are −inf
    return among, torch.sigmoid(total)


class _Surprise(Function):
    """(..., C) and (...) -> (...)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(outputs: Tensor, labels: Tensor) -> Tensor:
        axis = len(next(slices(outputs))) - 1
        return torch.cat([_written_out(outputs[s], labels[s]) for s in slices(outputs)], axis)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None]:
        return _Slope.apply(*ctx.saved_tensors, factor), None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        outputs, labels = ctx.saved_tensors
        ones = torch.ones_like(outputs[..., 0])
        found: Tensor = _Slope.apply(outputs, labels, ones)  # type: ignore[no-untyped-call]
        return (found * tangent).sum(-1)


class _Slope(Function):
    """(..., C), (...) and (...) -> (..., C)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(outputs: Tensor, labels: Tensor, factor: Tensor) -> Tensor:
        result = outputs * factor.unsqueeze(-1)  # of all axes that vmap adds to either
        for s in slices(outputs):
            result[s] = slope(outputs[s], labels[s], factor[s])
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        outputs, labels, factor = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a third derivative
            return (
                curved(outputs, labels, factor, u), None,
                (slope(outputs, labels, torch.ones_like(factor)) * u).sum(-1),
            )  # fmt: skip
        for_outputs = for_factor = None
        if ctx.needs_input_grad[0]:
            for_outputs = _curved_in_slices(outputs, labels, factor, u)
        if ctx.needs_input_grad[2]:
            for_factor = torch.cat(
                [
                    (slope(outputs[s], labels[s], torch.ones_like(factor[s])) * u[s]).sum(-1)
                    for s in slices(outputs)
                ],
                len(next(slices(outputs))) - 1,
            )
        return for_outputs, None, for_factor

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, _: Any, factor_tangent: Tensor | None) -> Tensor:
        outputs, labels, factor = ctx.saved_tensors
        result = torch.zeros_like(outputs)
        if tangent is not None:
            result = result + curved(outputs, labels, factor, tangent)
        if factor_tangent is not None:
            result = result + slope(outputs, labels, factor_tangent)
        return result


def _curved_in_slices(outputs: Tensor, labels: Tensor, factor: Tensor, u: Tensor) -> Tensor:
    result = torch.addcmul(outputs, u, factor.unsqueeze(-1))  # of all axes of vmap, as above
    for s in slices(outputs):
        result[s] = curved(outputs[s], labels[s], factor[s], u[s])
    return result
