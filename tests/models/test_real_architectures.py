"""Every measurement of real networks against plain loops in float64; each leaves them as found.

Tolerances are relative, for vectors in the Euclidean norm. In float64 1e-6 leaves room for the
conditioning of deep networks, ten orders above rounding. In float32 the truth is the float64 loop
at the same numbers: m-sharpness is a difference of losses some hundredths of their size, and the
gradient of a network that is not smooth jumps by a percent or more where rounding moves one of its
few activations after the last pooling across a kink (plain loops in float32 do the same).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

import plain_loops
import pytest
import torch
from case import Case, N
from own_networks import OWN
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from transformer_networks import CHECKPOINTED, TRANSFORMERS
from vision_networks import AUXILIARY, TIMM, TORCHVISION

import sharpkit as sk

# Hugging Face recomputes in training mode only: of the measurements, it concerns m-SAM
CASES = [*TORCHVISION, *TIMM, *TRANSFORMERS, *CHECKPOINTED["llama"], *OWN]
TRAINED = [AUXILIARY, *(c for name in CHECKPOINTED if name != "llama" for c in CHECKPOINTED[name])]

MS = [1, 4, N]
DTYPES = [torch.float64, torch.float32]
SMOOTH_32, KINKS_32 = 2e-3, 5e-2

PRODUCTS = {
    "hessian": (sk.HessianOperator, {}, plain_loops.hessian_product),
    "gauss_newton": (sk.GaussNewtonOperator, {}, plain_loops.gauss_newton_product),
    "empirical_fisher": (
        sk.FisherOperator,
        {"kind": "empirical"},
        plain_loops.empirical_fisher_product,
    ),
}
BY_NAME = {case.name: case for case in [*CASES, *TRAINED]}


def over(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "case", [pytest.param(c, marks=c.marks, id=c.name) for c in cases]
    )


both_precisions = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])


@both_precisions
@over(CASES)
def test_m_sharpness_is_that_of_the_plain_loop(case: Case, dtype: torch.dtype):
    model, inputs, labels = case.make(dtype)
    with as_found(case, model, inputs):
        found = sk.m_sharpness(
            model, (inputs, labels), m=MS, rho=case.rho, seed=None, loss=case.loss
        )
    truth = torch.tensor([expected_sharpness(case.name, m) for m in MS])
    error = (torch.as_tensor(found.value) / truth - 1).abs().max()
    assert error < (case.tolerance if dtype == torch.float64 else SMOOTH_32), (found.value, truth)


@both_precisions
@pytest.mark.parametrize("m", MS)
@over([*CASES, *TRAINED])
def test_m_sam_gradient_is_that_of_the_plain_loop(case: Case, m: int, dtype: torch.dtype):
    model, inputs, labels = case.make(dtype)
    with as_found(case, model, inputs):
        sk.m_sam_gradient(model, inputs, labels, m=m, rho=case.rho, loss=case.loss)
        found = taken_gradient(model)
    assert_close(found, expected_gradient(case.name, m), tolerance(case, dtype))


@both_precisions
@pytest.mark.parametrize("kind", PRODUCTS)
@over(CASES)
def test_products_are_those_of_the_plain_loop(case: Case, kind: str, dtype: torch.dtype):
    operator, options, _ = PRODUCTS[kind]
    model, inputs, labels = case.make(dtype)
    with as_found(case, model, inputs):
        matrix = operator(model, (inputs, labels), loss=case.loss, **options)
        vector = direction(matrix.shape[0])
        found = matrix.matvec(vector.to(dtype))
    assert_close(found, expected_product(case.name, kind), tolerance(case, dtype))


@over([case for case in CASES if case.smooth])
def test_the_plain_products_are_those_of_finite_differences(case: Case):
    problem = case.problem()
    vector = direction(sum(p.numel() * (1 + p.is_complex()) for p in problem.parameters))
    step = 1e-4 / vector.norm()
    for product, by_differences in (
        (plain_loops.hessian_product, plain_loops.hessian_product_by_differences),
        (plain_loops.gauss_newton_product, plain_loops.gauss_newton_product_by_differences),
    ):
        with sdpa_kernel(SDPBackend.MATH):
            assert_close(by_differences(problem, vector, step), product(problem, vector), 1e-6)


@cache
def expected_sharpness(name: str, m: int) -> float:
    return plain_loops.m_sharpness(BY_NAME[name].problem(), m, BY_NAME[name].rho)


@lru_cache(maxsize=1)
def expected_gradient(name: str, m: int) -> Tensor:
    return plain_loops.m_sam_gradient(BY_NAME[name].problem(), m, BY_NAME[name].rho)


@lru_cache(maxsize=1)
def expected_product(name: str, kind: str) -> Tensor:
    problem = BY_NAME[name].problem()
    size = sum(p.numel() * (1 + p.is_complex()) for p in problem.parameters)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        return PRODUCTS[kind][2](problem, direction(size))


def direction(size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def tolerance(case: Case, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return case.tolerance
    return case.float32 or (SMOOTH_32 if case.smooth else KINKS_32)


def assert_close(found: Tensor, truth: Tensor, limit: float) -> None:
    assert found.shape == truth.shape
    error = float((found.double() - truth).norm() / truth.norm())
    assert error < limit, f"relative error {error:.1e}, allowed {limit:.1e}"


def taken_gradient(model: nn.Module) -> Tensor:
    """The gradients of the trainable parameters as one vector, removed; frozen ones have none."""
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    trainable = [p for p in model.parameters() if p.requires_grad]
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable]
    model.zero_grad(set_to_none=True)
    return plain_loops.flat(found)


def batch_statistics(model: nn.Module) -> list[str]:
    """The buffers that training moves."""
    return [
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for buffer, _ in module.named_buffers()
    ]


@contextmanager
def as_found(case: Case, model: nn.Module, inputs: Any) -> Iterator[None]:
    """Assert that state, flags, gradients and outputs stay as they are."""
    moving = batch_statistics(model) if case.training else []
    before = snapshot(model, moving)
    outputs = None if case.fresh or moving else evaluated(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the slower loop, and of parameters without use
        yield
    after = snapshot(model, moving)
    for what, value in before.items():
        assert same(value, after[what]), f"{what} changed"
    assert outputs is None or torch.equal(outputs, evaluated(model, inputs)), "outputs changed"


def snapshot(model: nn.Module, moving: list[str]) -> dict[str, Any]:
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    return {
        "state": {name: t for name, t in state.items() if name not in moving},
        "identity": [id(t) for t in [*model.parameters(), *model.buffers()]],
        "training": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad is None for p in model.parameters()],
    }


@torch.no_grad()
def evaluated(model: nn.Module, inputs: Any) -> Tensor:
    outputs = plain_loops.call(model, inputs)
    return getattr(outputs, "logits", outputs)


def same(a: Any, b: Any) -> bool:
    leaves = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(leaves[0]) == len(leaves[1]) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(*leaves, strict=True)
    )
