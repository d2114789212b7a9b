"""Random architectures are measured as a plain loop in float64 measures them.

SHARPKIT_ARCHITECTURES=300 tries the first 300 seeds instead of 60. A failure shows the seed and
what its architecture is made of; `make_architecture(seed)` builds it again.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from architecture_generator import Architecture, make_architecture
from cores import slow_beyond
from layer_blocks import BLOCKS, EMBEDDINGS
from plain_references import Reference, has_double_backward, real
from random_losses import LOSSES
from stateful_blocks import CachedBias
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import sharpkit as sk
from sharpkit.errors import SharpkitError

SEEDS = range(int(os.environ.get("SHARPKIT_ARCHITECTURES", "60")))
RHO, ODD = 0.05, 3

# both sides are float64, and a perturbed loss or gradient adds a few roundings
EXACT = 1e-8
# differences are settled to 1e-8 in the rule, and at a kink nearby to 1e-6
DIFFERENCES = 3e-6

seeds = pytest.mark.parametrize("seed", slow_beyond(24, SEEDS))
pytestmark = pytest.mark.filterwarnings("ignore")  # what is left out, and which engine is used


@seeds
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_m_sharpness_is_that_of_the_plain_loop(seed: int, engine: str):
    a = shown(seed)
    plain = reference(a)
    ms = [1, ODD, plain.n]
    with untouched(a), warned_of_what_is_cached(a):
        found = sk.m_sharpness(
            a.model, (a.inputs, a.labels), m=ms, rho=RHO, loss=a.loss.given, seed=None,
            engine=engine, chunk=chunk(seed), progress=False,
        )  # fmt: skip
    expected = torch.tensor([plain.m_sharpness(m, RHO) for m in ms], dtype=torch.float64)
    size = abs(float(plain.loss(0, plain.n)[0]))  # a difference of two losses rounds as they do
    close(torch.as_tensor(found.value), expected, EXACT, 1e-12 * size)


@seeds
@pytest.mark.parametrize("m", [1, ODD, 8])
def test_the_m_sam_gradient_is_that_of_the_plain_loop(seed: int, m: int):
    a = shown(seed)
    plain = reference(a)
    trained = [p for p in a.model.parameters() if p.requires_grad]
    for engine in ("auto", "loop") if m == ODD else ("auto",):
        with untouched(a):
            if not trained:
                with pytest.raises(SharpkitError, match="requires grad"):
                    m_sam(a, m, engine)
                continue
            trained[0].grad = torch.ones_like(trained[0])
            m_sam(a, m, engine)
            trained[0].grad = trained[0].grad - torch.ones_like(trained[0])
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
            a.model.zero_grad(set_to_none=True)
        flat = torch.cat([real(g.to_dense()).flatten() for g in found])
        close(flat, plain.m_sam_gradient(min(m, plain.n), RHO), EXACT)


def m_sam(a: Architecture, m: int, engine: str) -> Tensor:
    return sk.m_sam_gradient(
        a.model, a.inputs, a.labels, m=m, rho=RHO, loss=a.loss.given, engine=engine
    )


@seeds
def test_hessian_products_are_those_of_plain_derivatives(seed: int):
    a = shown(seed)
    plain = reference(a)
    v = vector(plain)
    with a_refusal_is_right_only_if(torch_refuses(a)):
        found = product(sk.HessianOperator, a, v)
        if has_double_backward(plain.model) and not torch_refuses(a):
            close(found, plain.hessian_product(v), EXACT, 1e-12)
        else:
            close(found, plain.hessian_differences(v), DIFFERENCES, 1e-10)


@seeds
def test_gauss_newton_products_are_those_of_plain_derivatives(seed: int):
    a = shown(seed)
    plain = reference(a)
    v = vector(plain)
    with a_refusal_is_right_only_if(torch_refuses(a)):
        found = product(sk.GaussNewtonOperator, a, v)
        close(found, plain.gauss_newton_product(v), DIFFERENCES, 1e-10)


@seeds
def test_fisher_products_are_those_of_single_gradients(seed: int):
    a = shown(seed)
    plain = reference(a)
    v = vector(plain)
    with a_refusal_is_right_only_if(torch_refuses(a)):
        found = product(sk.FisherOperator, a, v, kind="empirical")
        exact = EXACT if has_double_backward(plain.model) and not torch_refuses(a) else DIFFERENCES
        close(found, plain.fisher_product(v), exact, 1e-12)


def product(operator: Callable[..., Any], a: Architecture, v: Tensor, **kwargs: Any) -> Tensor:
    with untouched(a):
        matrix = operator(
            a.model, (a.inputs, a.labels), loss=a.loss.given, chunk=chunk(a.seed), progress=False,
            **kwargs,
        )  # fmt: skip
        found: Tensor = matrix.matvec(v)
    return found


def chunk(seed: int) -> Any:
    """Half of the seeds are evaluated a few examples at a time, of different weights."""
    return ODD if seed % 2 else "auto"


def torch_refuses(a: Architecture) -> bool:
    """Torch can push no vector through it: no second derivative by backward, no forward mode.

    A backward marked once_differentiable is one such case, torch's EmbeddingBag is the other.
    """
    return not {"once_differentiable_function", "embedding_bag"}.isdisjoint(a.blocks)


@seeds
def test_the_reference_computes_what_the_model_computes(seed: int):
    a = shown(seed)
    plain = reference(a)
    other = copy.deepcopy(a.model)
    outputs = called(other, a.inputs)
    same(outputs, plain.outputs(0, plain.n))
    total, weight = a.loss.sums(outputs, a.labels)
    if any(p.requires_grad for p in other.parameters()):
        (total / weight).backward()
        trained = [p for p in other.parameters() if p.requires_grad]
        found = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in trained]
        close(torch.cat([real(g).flatten() for g in found]), plain.gradient(0, plain.n), EXACT)
    given = given_loss(a)(outputs, a.labels)
    given = given[0].sum() / given[1].sum() if isinstance(given, tuple) else given
    torch.testing.assert_close(given, total / weight, rtol=1e-12, atol=1e-12)


def given_loss(a: Architecture) -> Callable[..., Any]:
    return a.loss.given if callable(a.loss.given) else lambda o, y: sum_over_weight(a, o, y)


def sum_over_weight(a: Architecture, outputs: Any, labels: Tensor) -> Tensor:
    total, weight = a.loss.sums(outputs, labels)
    return total / weight


@seeds
def test_gradients_of_examples_have_the_gradient_as_their_mean(seed: int):
    plain = reference(shown(seed))
    whole = plain.loss(0, plain.n)[1]
    shares = [plain.loss(i, i + 1)[1] / whole for i in range(plain.n)]
    mean = sum(s * plain.gradient(i, i + 1) for i, s in enumerate(shares))
    close(mean, plain.gradient(0, plain.n), EXACT)


def twice_differentiable(seed: int) -> bool:
    a = make_architecture(seed)
    return has_double_backward(a.model) and not torch_refuses(a)


@pytest.mark.parametrize("seed", [s for s in SEEDS if s % 4 == 1 and twice_differentiable(s)])
def test_second_derivatives_agree_with_differences_where_both_exist(seed: int):
    a = shown(seed)
    plain = reference(a)
    v = vector(plain)
    close(plain.hessian_product(v), plain.hessian_differences(v), DIFFERENCES, 1e-10)


def test_the_reference_agrees_with_closed_forms():
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    x = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 1.0]], dtype=torch.float64)
    linear = Reference(model, x, torch.zeros(3), lambda o, y: (o.sum(), float(len(o))))
    assert linear.m_sharpness(1, 0.1) == pytest.approx(0.1 * (5 + 10 + 1) / 3, rel=1e-12)
    close(linear.m_sam_gradient(1, 0.1), x.mean(0), 1e-12)
    v = torch.tensor([1.0, -2.0], dtype=torch.float64)
    close(linear.fisher_product(v), x.T @ (x @ v) / 3, 1e-12)
    square = Reference(model, x, torch.zeros(3), lambda o, y: (o.square().sum(), float(len(o))))
    for found in (
        square.hessian_product(v), square.hessian_differences(v), square.gauss_newton_product(v)
    ):  # fmt: skip
        close(found, 2 * x.T @ (x @ v) / 3, 1e-8)


def test_groups_count_by_their_weight_and_not_by_their_size():
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    x = torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.float64)
    weights = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    plain = Reference(model, x, weights, lambda o, w: ((o[:, 0] * w).sum(), float(w.sum())))
    assert plain.m_sharpness(1, 0.1) == pytest.approx(0.1 * (3 * 1 + 1 * 2) / 4, rel=1e-12)


def test_every_kind_comes_up_at_least_three_times():
    made = [make_architecture(seed) for seed in range(60)]
    blocks = Counter(name for a in made for name in a.blocks)
    losses = Counter(a.loss.name for a in made)
    assert {name: blocks[name] for name in (*BLOCKS, *EMBEDDINGS) if blocks[name] < 3} == {}
    assert {name: losses[name] for name in LOSSES if losses[name] < 3} == {}
    assert any("frozen: all" in a.description for a in made)
    assert any("tied tokens" in a.description for a in made)


def test_the_same_seed_makes_the_same_architecture():
    first, second = make_architecture(7), make_architecture(7)
    assert first.description == second.description
    same(first.model.state_dict(), second.model.state_dict())
    same((first.inputs, first.labels), (second.inputs, second.labels))


def shown(seed: int) -> Architecture:
    """The architecture of a seed, described in the report of a failure."""
    a = make_architecture(seed)
    print(a.description)
    return a


def reference(a: Architecture) -> Reference:
    return Reference(a.model, a.inputs, a.labels, a.loss.sums)


def vector(plain: Reference) -> Tensor:
    size = sum(real(p).numel() for p in plain.parameters)
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def called(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def close(found: Tensor, expected: Tensor, relative: float, absolute: float = 0.0) -> None:
    """Raise unless a vector is as expected, relative to the norm of all of it."""
    assert found.shape == expected.shape
    error, size = float((found - expected).norm()), float(expected.norm())
    assert error <= relative * size + absolute, f"off by {error:g} of {size:g}"


def same(found: Any, expected: Any) -> None:
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@contextmanager
def warned_of_what_is_cached(a: Architecture) -> Iterator[None]:
    """A bias that was cached before has no derivative: that must be said."""
    cached = [m.biases for m in a.model.modules() if isinstance(m, CachedBias) and m.cache]
    measured = any(b.requires_grad for b in cached) or (cached and "frozen: all" in a.description)
    with pytest.warns(UserWarning, match="not depend on") if measured else nullcontext():
        yield


@contextmanager
def a_refusal_is_right_only_if(refusable: bool) -> Iterator[None]:
    try:
        yield
    except SharpkitError:
        if not refusable:
            raise


@contextmanager
def untouched(a: Architecture) -> Iterator[None]:
    """Inside, the model may be measured; afterwards it must be as it was found."""
    before, outputs = state(a.model), called(copy.deepcopy(a.model), a.inputs)
    yield
    after = state(a.model)
    changed = [k for k in {*before, *after} if not equal(before.get(k), after.get(k))]
    assert not changed, f"changed by measuring: {', '.join(sorted(changed))}"
    same(called(copy.deepcopy(a.model), a.inputs), outputs)


def state(model: nn.Module) -> dict[str, Any]:
    """What modules hold: values, identities, flags, gradients, and tensors in attributes."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"{name} training"] = module.training
        found[f"{name} attributes"] = sorted(vars(module))
        for key, t in tensors_in(vars(module)):
            found[f"{name} {key}"] = (id(t), t.requires_grad, t.grad, t.detach().clone())
    return found


def tensors_in(attributes: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for path, leaf in pytree.tree_flatten_with_path(attributes)[0]:
        if isinstance(leaf, Tensor):
            yield pytree.keystr(path), leaf


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
