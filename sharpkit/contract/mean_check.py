"""Whether a loss of unknown form is what it must be: a mean over examples, or given with weights.

The losses of unequal parts of some examples must add up to the loss of all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sharpkit.contract.terms import Terms
from sharpkit.errors import ModelError, SharpkitError, first_sentence

Function: TypeAlias = Callable[[Any, Tensor], Terms]

_MOST = 30  # examples, each evaluated alone as well
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
_HALF = 5e-2


def check_parts(terms: Function, outputs: Any, labels: Tensor) -> None:
    """Raise ModelError unless the terms of parts add up, and a loss is a function of its arguments.

    Outputs have a row per example; labels are as different as there are, sorted.
    """
    with torch.no_grad():
        outputs, labels = _few(outputs, labels)
        whole = _whole(terms, outputs, labels)
        _check_constant_weights(terms, outputs, labels)
        n = labels.shape[0]
        singles = [_alone(terms, outputs, labels, i) for i in range(n)]
        _check_weights([whole, *singles])
        _check_sum(whole, singles, outputs, labels, "its examples one by one")
        for cut in sorted({1, n // 3} - {0, n}):
            bounds = ((0, cut), (cut, n))
            parts = [terms(_rows(outputs, n, *b), labels[slice(*b)]) for b in bounds]
            _check_sum(whole, parts, outputs, labels, f"the first {cut} and the other {n - cut}")


def _few(outputs: Any, labels: Tensor) -> tuple[Any, Tensor]:
    """At most `_MOST` examples, spread evenly."""
    n = labels.shape[0]
    if n <= _MOST:
        return outputs, labels
    chosen = torch.linspace(0, n - 1, _MOST, dtype=torch.float64).round().long().to(labels.device)
    return _of_examples(lambda t: t[chosen], outputs, n), labels[chosen]


def _of_examples(function: Callable[[Tensor], Tensor], tree: Any, n: int) -> Any:
    """A function of every leaf that has a row per example; what else there is stays."""

    def apply(leaf: Any) -> Any:
        has_rows = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == n
        return function(leaf) if has_rows else leaf

    return pytree.tree_map(apply, tree)


def _rows(outputs: Any, n: int, start: int, stop: int) -> Any:
    return _of_examples(lambda t: t[start:stop], outputs, n)


def _whole(terms: Function, outputs: Any, labels: Tensor) -> Terms:
    """The terms of all examples; the same in two calls that leave their arguments alone."""
    first, given = _call(terms, outputs, labels)
    if not _same(given, (outputs, labels)):
        raise ModelError(
            "the loss writes to the outputs or labels that it is given: use operations that are "
            "not in place (x = x - y, not x -= y)"
        )
    second, _ = _call(terms, outputs, labels)
    if not (_close(first[0], second[0]) and _close(first[1], second[1])):
        raise ModelError(
            f"the loss is random: two calls with the same outputs and labels give "
            f"{float(first[0]):.9g} and {float(second[0]):.9g}"
        )
    return first


def _call(terms: Function, outputs: Any, labels: Tensor) -> tuple[Terms, Any]:
    """The terms of copies of the arguments, and what the call has left of them."""
    copies = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, (outputs, labels))
    try:
        return terms(*copies), copies
    except SharpkitError:
        raise
    except Exception as error:
        raise ModelError(
            f"the loss fails for {_shapes(outputs, labels)}: {first_sentence(error)}"
        ) from error


def _same(a: Any, b: Any) -> bool:
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return all(
        x.shape == y.shape and torch.equal(x.nan_to_num(), y.nan_to_num())
        for x, y in pairs
        if isinstance(x, Tensor)
    )


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e3 * torch.finfo(a.dtype).eps if a.dtype in _TOLERANCES else _HALF
    return torch.allclose(a, b, rtol=tolerance, atol=0.0, equal_nan=True)


def _check_constant_weights(terms: Function, outputs: Any, labels: Tensor) -> None:
    """A call with outputs that require gradients: weights that depend on them are refused there."""
    with torch.enable_grad():
        leaves = pytree.tree_map(
            lambda t: (
                t.clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
            ),
            outputs,
        )
        terms(_of_examples(torch.clone, leaves, labels.shape[0]), labels.clone())


def _alone(terms: Function, outputs: Any, labels: Tensor, i: int) -> Terms:
    one = _rows(outputs, labels.shape[0], i, i + 1), labels[i : i + 1]
    try:
        return terms(*one)
    except Exception as error:
        raise ModelError(
            f"the loss does not accept a single example ({_shapes(*one)}): {first_sentence(error)}"
        ) from error


def _check_weights(terms: list[Terms]) -> None:
    weights = torch.stack([weight for _, weight in terms]).cpu()
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ModelError(
            f"the loss has returned weights that sum to {float(weights.min()):g}: expected finite "
            "numbers of at least 0 as the second of (sums, weights)"
        )


def _check_sum(
    whole: Terms, parts: list[Terms], outputs: Any, labels: Tensor, described: str
) -> None:
    """Raise unless Σ weight · mean / Σ weight over parts is the mean of the whole."""
    values = torch.stack([mean for mean, _ in [whole, *parts]]).double()
    weights = torch.stack([weight for _, weight in parts])
    total = float(weights.sum())
    if not bool(torch.isfinite(values[0])) or total == float(whole[1]) == 0:
        return  # reported where the loss is measured
    tolerance = _TOLERANCES.get(whole[0].dtype, _HALF)
    if abs(total - float(whole[1])) > tolerance * total:
        raise ModelError(
            f"the weights that the loss returns do not add up: {float(whole[1]):.6g} for all "
            f"{labels.shape[0]} examples, {total:.6g} for {described}; return (sums, weights) of "
            "the examples, not their means"
        )
    expected = float((weights * values[1:]).sum() / total)
    # not finite for parts only: a mean over what the labels count, and they count nothing there
    if not abs(float(values[0]) - expected) <= tolerance * float(values.abs().max()):
        raise ModelError(
            f"the loss is not a mean over examples: {float(values[0]):.6g} for "
            f"{labels.shape[0]} examples together, {expected:.6g} as the mean of {described}; "
            + (_broadcast(outputs, labels) or _REMEDY)
        )


_REMEDY = (
    'give a mean over examples (reduction="mean"), a loss module of torch\'s such as '
    "CrossEntropyLoss(weight=..., ignore_index=...), or a callable that returns (sums, weights)"
)


def _broadcast(outputs: Any, labels: Tensor) -> str | None:
    """The likely cause, if outputs and labels broadcast to more entries than either has."""
    if not isinstance(outputs, Tensor):
        return None
    try:
        shape = torch.broadcast_shapes(outputs.shape, labels.shape)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return None
    if shape in (outputs.shape, labels.shape):
        return None
    return (
        f"{_shapes(outputs, labels)} broadcast to {tuple(shape)}, so that every output is compared "
        "with every label: give them equal shapes"
    )


def _shapes(outputs: Any, labels: Tensor) -> str:
    shapes = [tuple(t.shape) for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]
    shown = str(shapes[0]) if isinstance(outputs, Tensor) else str(shapes)
    return f"outputs of shape {shown} and labels of shape {tuple(labels.shape)}"
