"""Whether products of second derivatives are right: held against differences of first ones.

PyTorch's second derivatives of some operations are missing, and of some they are wrong. On a few
examples, a product with a random direction v must be what first derivatives give,

    H v ≈ [∇L(w + h v) − ∇L(w − h v)] / 2h,

and the matrix must be symmetric. The differences are taken in float64 where the model runs in it:
their step is then so small that hardly any ReLU switches within it. They count only if two steps
agree with each other; if none do (a model that computes in lower precision inside), symmetry alone
is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from sharpkit.contract.checks import close, reason
from sharpkit.contract.embeddings import padding_rows, renormalised
from sharpkit.contract.examples import Examples
from sharpkit.contract.precision import current_precision
from sharpkit.curvature.plain_rules import plain_rules
from sharpkit.curvature.problem import Problem
from sharpkit.errors import ModelError, SharpkitError
from sharpkit.groupwise.objective import floating_leaves
from sharpkit.memory import available_memory

Tensors: TypeAlias = Sequence[Tensor]  # one per parameter
# maps a vector, as one tensor per parameter, to the product; None stands for zeros
Product: TypeAlias = Callable[[Tensors], Sequence[Tensor | None]]
# in the order in which they are tried; the second is for models that transform convolutions
Mode = Literal["reverse", "plain reverse", "forward", "finite difference"]
# what users ask for: by default differences where nothing else works
Method = Literal["auto", "exact", "finite_difference"]
_MODES: tuple[Mode, ...] = ("reverse", "plain reverse", "forward")

# (step, body): what body returns for the leaves, moved by the step, while the model holds them
Moved: TypeAlias = Callable[[float, Callable[[Tensors], Any]], Any]
# the product of some examples by differences of what the model gives when moved by ± a step
Differences: TypeAlias = Callable[[Moved, Examples, float], Tensors]

_FINE = ((1e-9, 1e-8), (1e-6, 1e-5))  # steps in float64, in units of the size of the weights
_COARSE = (3e-3, 1e-2)
_COMPARED = 4  # examples
_COPIES = 8  # tensors of the size of the weights that differences in float64 take
# from this rounding on (TF32, float32, float64): the relative error and asymmetry of a product
_LIMITS = ((1e-4, 0.3, 1e-2), (1e-8, 1e-2, 1e-4), (0.0, 1e-3, 1e-8))
_UNITS = 100  # rounding errors of a gradient, at most, in units of its last place


@dataclass(frozen=True)
class Reference:
    """Two directions, and the product with the first one, by differences where these can tell."""

    first: list[Tensor]  # a direction, one tensor per parameter
    second: list[Tensor]  # another one
    product: list[Tensor] | None  # in float64, or None
    tolerance: float  # of the product, relative
    noise: float  # the error, in norm, that rounding may make in a product


def choose_mode(
    problem: Problem,
    differences: Differences,
    product_of: Callable[[Examples, Mode], Product],
    method: Method = "auto",
) -> tuple[Mode, str]:
    """The first way to differentiate twice that works and gives what differences give.

    Where none does, differences of first derivatives themselves, if these are a gradient's. Returns
    the mode, and what was wrong with reverse mode if it is not that, nor what was asked for.

    Raises:
        ModelError: If none does, with what was wrong with the first; if the differences asked for
            are not those of a gradient.
    """
    few, model = problem.few(problem.probe.at_most(_COMPARED)), problem.function.model
    wrong: list[str] = []
    _check_formulas(problem, few)
    try:
        with plain_rules():
            reference = reference_product(problem, few, differences)
    except SharpkitError:
        raise
    except Exception as error:
        raise ModelError(f"the model cannot be differentiated: {reason(error, model)}") from error
    if method == "finite_difference":
        failure = no_gradient(problem, few, reference, differences)
        if failure:
            raise ModelError(f"differences of its gradients are no second derivatives: {failure}")
        return "finite difference", ""
    for mode in _MODES:
        try:
            product = product_of(few, mode)
            one, two = (problem.filled(product(v)) for v in (reference.first, reference.second))
        except SharpkitError:
            raise
        except Exception as error:
            wrong.append(reason(error, model) + _backward_pass(error))
            continue
        failure = disagreement(reference, one, two, list(problem.weights), model)
        if not failure:
            return mode, wrong[-1] if mode == "forward" else ""
        wrong.append(failure)
    if method == "auto" and not no_gradient(problem, few, reference, differences):
        return "finite difference", wrong[0]
    raise ModelError(
        f"the model cannot be differentiated twice: {wrong[0]}; write that operation in plain "
        "tensor operations (the page on second derivatives lists what PyTorch lacks)"
    )


def no_gradient(
    problem: Problem, few: Examples, reference: Reference, differences: Differences
) -> str:
    """Why differences of its first derivatives are not to be trusted; "" if they are.

    The loss must change along a direction as its gradient says,
    [L(w + h v) − L(w − h v)] / 2h = ∇L(w)·v, and u·Hv must be v·Hu.
    """
    named, scaled = problem.function.model.named_parameters(), renormalised(problem.function.model)
    limited = [name for name, p in named if id(p) in scaled and name in problem.weights]
    if limited:
        return (
            f"rows of {limited[0]!r} are scaled to max_norm wherever they move, and the gradient "
            "does not know (leave the table out by parameters=)"
        )
    anywhere = without_padding(problem, [torch.ones_like(w) for w in problem.weights.values()])
    with plain_rules():
        other = reference_product(problem, few, differences, (reference.second, reference.first))
        failure = _unlike_the_loss(problem, few, _direction(problem, anywhere, 2))
    if failure:
        return failure
    if reference.product is None or other.product is None:
        return "they differ from step to step, also on a few examples"
    asymmetry = max(reference.tolerance, other.tolerance)
    return _asymmetry(reference, reference.product, other.product, asymmetry)


def without_padding(problem: Problem, vector: Tensors) -> list[Tensor]:
    """A vector with zeros in the rows that are padding, copied where there are any.

    Their gradient is 0 by definition, and so are their rows and columns of the matrix, though
    gradients of others change when they move.
    """
    rows, own = padding_rows(problem.function.model), problem.function.model.named_parameters()
    of = {name: rows[id(p)] for name, p in own if id(p) in rows}
    return [
        _with_zeros(v, of[name]) if name in of else v
        for name, v in zip(problem.weights, vector, strict=True)
    ]


def _with_zeros(table: Tensor, row: int) -> Tensor:
    table = table.clone()
    table[row] = 0.0
    return table


def _unlike_the_loss(problem: Problem, few: Examples, direction: Tensors) -> str:
    """How the gradient differs from how the loss changes; "" if it does not."""
    double = _runs_in_float64(problem, few)
    dtype, step, tolerance = (
        (torch.float64, 1e-6, 1e-3) if double else (problem.function.dtype, _COARSE[1], 5e-2)
    )
    examples = few.to(problem.function.device, dtype)
    at = partial(_moved, problem, direction, dtype)

    def mean(_: Tensors) -> float:
        with problem.function.evaluating():
            return float(problem.terms(examples)[0])

    above, below = at(step, mean), at(-step, mean)
    slope = _inner(at(0.0, lambda leaves: problem.slopes(leaves, examples)), direction)
    noise = _UNITS * _rounding(dtype, problem.function.device) * max(abs(above), abs(below)) / step
    if abs((above - below) / (2 * step) - slope) <= tolerance * abs(slope) + noise:
        return ""
    return (
        f"the loss changes by {(above - below) / (2 * step):.6g} along a direction, and its "
        f"gradient says {slope:.6g} (a detach, a hook, a straight-through estimator, or a ReLU of "
        "exactly 0?)"
    )


def reference_product(
    problem: Problem,
    few: Examples,
    differences: Differences,
    directions: tuple[list[Tensor], list[Tensor]] | None = None,
) -> Reference:
    """What a product of some examples must be, by differences of their first derivatives."""
    values = [w.detach() for w in problem.weights.values()]
    gradient = problem.at(values, lambda leaves: problem.slopes(leaves, few))
    first, second = directions or [_direction(problem, gradient, seed) for seed in (0, 1)]
    size, own = _norm(gradient), problem.function.dtype
    noise = _UNITS * _rounding(own, problem.function.device) * size
    attempts = [(own, _COARSE, 5e-2)]
    if _runs_in_float64(problem, few):
        attempts = [(torch.float64, steps, 1e-3) for steps in _FINE] + attempts
    for dtype, steps, tolerance in attempts:
        moved = partial(_moved, problem, first, dtype)
        examples = few.to(problem.function.device, dtype)
        small, large = (_tried(differences, moved, examples, step) for step in steps)
        rounding = _rounding(dtype, problem.function.device)
        doubt = noise + _UNITS * rounding * size / steps[0]
        if small and large and _norm(_minus(small, large)) <= tolerance * _norm(small) + doubt:
            return Reference(first, second, small, tolerance, doubt)
    return Reference(first, second, None, 0.0, noise)


def disagreement(
    reference: Reference, product: Tensors, other: Tensors, names: Sequence[str], model: nn.Module
) -> str:
    """How the products with both directions differ from what they must be; "" if they do not."""
    rounding = _rounding(reference.first[0].dtype, reference.first[0].device)
    relative, asymmetry = next(limits for least, *limits in _LIMITS if rounding >= least)
    product, other = ([t.detach().double() for t in given] for given in (product, other))
    if not all(bool(torch.isfinite(t).all()) for t in (*product, *other)):
        return ""  # reported with the product that it belongs to
    if reference.product is not None:
        relative = max(reference.tolerance, relative)
        worst = _worst(product, reference.product, relative, reference.noise)
        if worst is not None:
            error = _norm(_minus(product, reference.product)) / _norm(reference.product)
            return (
                f"products differ by {error:.2g} of their norm from differences of its gradients, "
                f"most in {_owner(names[worst], model)} (an operation whose second derivative is "
                "wrong in PyTorch, or a gradient that is not that of the loss: a detach, a hook, a "
                "straight-through estimator?)"
            )
    return _asymmetry(reference, product, other, asymmetry)


def _asymmetry(reference: Reference, product: Tensors, other: Tensors, asymmetry: float) -> str:
    """How far u·Hv is from v·Hu, if that is further than this share of the norms; "" if not."""
    one, two = _inner(reference.second, product), _inner(reference.first, other)
    scale = _norm(reference.second) * _norm(product) + _norm(reference.first) * _norm(other)
    if abs(one - two) > asymmetry * scale + 1e-30:
        return f"its matrix is not symmetric: u·Hv = {one:.6g}, v·Hu = {two:.6g}"
    return ""


def _backward_pass(error: BaseException) -> str:
    """Whose backward pass an error comes from, if that is Python code."""
    found, trace = None, error.__traceback__
    while trace is not None:
        found = trace.tb_frame.f_locals.get("ctx", found)
        trace = trace.tb_next
    return "" if found is None else f" (in {type(found).__name__})"


def _check_formulas(problem: Problem, few: Examples) -> None:
    """Raise unless the loss is the same with the formulas of `plain_rules`."""

    def loss() -> list[Tensor]:
        with problem.function.evaluating():
            return [problem.terms(few)[0].detach()]

    given = loss()
    with plain_rules():
        computed = loss()
    if not close(given, computed):
        raise ModelError(
            f"the loss is {float(given[0]):.6g}, and {float(computed[0]):.6g} with the formulas "
            "that have second derivatives: please report this model"
        )


def _worst(product: Tensors, expected: Tensors, relative: float, noise: float) -> int | None:
    """The parameter whose part of a product is furthest off, or None if all are near enough."""
    floor = 0.1 * relative * _norm(expected) + noise + 1e-30
    allowed = [relative * float(t.norm()) + floor for t in expected]
    excess = [
        float((a - b).norm()) / most for a, b, most in zip(product, expected, allowed, strict=True)
    ]
    worst = max(range(len(excess)), key=excess.__getitem__)
    return worst if excess[worst] > 1 else None


def _direction(problem: Problem, gradient: Tensors, seed: int) -> list[Tensor]:
    """Random numbers of the size of each weight; 0 where the gradient is (padding, dead units).

    Also 0 for tables whose rows are renormalised: their gradient is by definition not the
    derivative of what happens when they move.
    """
    device = problem.function.device
    generator = torch.Generator(device).manual_seed(seed)
    model = problem.function.model
    scaled = renormalised(model)
    fixed = {name for name, p in model.named_parameters() if id(p) in scaled}
    sizes = {name: float(w.detach().square().mean().sqrt()) for name, w in problem.weights.items()}
    least = 0.1 * max(*sizes.values(), 1e-3)
    anywhere = all(not bool(g.any()) for g in gradient)
    return [
        max(sizes[name], least)
        * torch.randn(w.shape, generator=generator, dtype=w.dtype, device=device)
        * ((g != 0) | anywhere)
        * (name not in fixed)
        for (name, w), g in zip(problem.weights.items(), gradient, strict=True)
    ]


def _moved(
    problem: Problem,
    direction: Tensors,
    dtype: torch.dtype,
    step: float,
    body: Callable[[Tensors], Any],
) -> Any:
    pairs = zip(problem.weights.values(), direction, strict=True)
    return problem.at([w.detach().to(dtype) + step * d.to(dtype) for w, d in pairs], body)


def _tried(
    differences: Differences, moved: Moved, examples: Examples, step: float
) -> list[Tensor] | None:
    """What differences give, or None where the model does not run in this precision."""
    try:
        found = [t.double() for t in differences(moved, examples, step)]
    except SharpkitError:
        raise
    except Exception:
        return None
    return found if all(bool(torch.isfinite(t).all()) for t in found) else None


def _runs_in_float64(problem: Problem, few: Examples) -> bool:
    """Whether the model takes weights and inputs in float64, and gives the same outputs."""
    function = problem.function
    if function.dtype == torch.float64:
        return True
    values = [w.detach() for w in problem.weights.values()]
    needed = _COPIES * 8 * sum(w.numel() for w in values)
    free = available_memory(function.device)
    # what changes in a forward pass is put back in the model's own precision only
    if function.habits.buffers or (free is not None and needed > free):
        return False

    def outputs(dtype: torch.dtype) -> Any:
        inputs = few.to(function.device, dtype).inputs
        with function.evaluating():
            return problem.at([w.to(dtype) for w in values], lambda _: function.outputs(inputs))

    try:
        return close(_single(outputs(torch.float64)), _single(outputs(function.dtype)))
    except Exception:
        return False


def _single(outputs: Any) -> Any:
    return [t.to(torch.float32) for t in floating_leaves(outputs)]


def _owner(name: str, model: nn.Module) -> str:
    """A parameter with the module it belongs to."""
    path = name.rpartition(".")[0].partition(".parametrizations")[0]
    kind = type(model.get_submodule(path)).__name__.removeprefix("Parametrized")
    return f"{name!r} of {path!r} ({kind})" if path else f"{name!r} of the model ({kind})"


def _rounding(dtype: torch.dtype, device: torch.device) -> float:
    """How much a number is rounded at most, relative."""
    allowed = current_precision() == "tf32" and device.type == "cuda"
    return 2.0**-11 if allowed and dtype == torch.float32 else torch.finfo(dtype).eps


def _minus(a: Tensors, b: Tensors) -> list[Tensor]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _norm(tensors: Tensors) -> float:
    return float(torch.stack([t.double().norm() for t in tensors]).norm())


def _inner(a: Tensors, b: Tensors) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
