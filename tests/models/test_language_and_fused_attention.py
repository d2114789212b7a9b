"""GPT-2, vision transformers with fused attention, and a LoRA network: spectra, SAM, the tracker.

Beside m-sharpness, m-SAM and products of `test_real_architectures.py`; all of it in float64 against
plain loops, dense matrices by differences of gradients, and ARPACK.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import numpy as np
import plain_loops
import pytest
import torch
from case import Case, N
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformer_networks import TRANSFORMERS
from vision_networks import TIMM, TORCHVISION

import sharpkit as sk

BY_NAME = {case.name: case for case in [*TRANSFORMERS, *TIMM, *TORCHVISION]}
# what stands before the attention, and is small enough for a dense matrix
SELECTED = {
    "gpt2": "*ln_1.weight",
    "lora_gpt2": "*lora_A*",
    "hugging_face_vit": "*layernorm_before.weight",
    "timm_vit_checkpointed": "blocks.0.norm1.weight",
    "torchvision_vit": "*layer_0.ln_1.weight",
}
STEPS = 3
RATE, MOMENTUM, RHO, M = 0.05, 0.9, 0.05, 2

over_all = pytest.mark.parametrize("name", SELECTED)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the slower loop
        yield


@over_all
def test_attention_is_fused(name: str):
    """PyTorch has no second derivative of the kernel that the networks run."""
    problem = BY_NAME[name].problem()
    size = sum(p.numel() for p in problem.parameters)
    with pytest.raises(RuntimeError, match=r"flash_attention.*not implemented"):
        plain_loops.hessian_product(problem, torch.ones(size, dtype=torch.float64))


def some_parameters(case: Case, pattern: str) -> tuple[plain_loops.Problem, Tensor]:
    """The problem of these parameters alone, and its Hessian by differences of gradients."""
    problem = case.problem()
    named = dict(problem.model.named_parameters())
    found = sk.HessianOperator(
        problem.model, (problem.inputs, problem.labels), parameters=pattern, n=1
    )
    for name, p in named.items():
        p.requires_grad_(name in found.parameters)
    size = sum(p.numel() for p in problem.parameters)
    columns = [
        plain_loops.hessian_product_by_differences(problem, e, 1e-3)
        for e in torch.eye(size, dtype=torch.float64)
    ]
    dense = torch.stack(columns)
    return problem, (dense + dense.T) / 2


@over_all
def test_spectra_are_those_of_the_dense_hessian(name: str):
    case = BY_NAME[name]
    _, dense = some_parameters(case, SELECTED[name])
    values = torch.linalg.eigvalsh(dense).flip(0).numpy()
    model, inputs, labels = case.make(torch.float64)
    matrix = sk.HessianOperator(model, (inputs, labels), loss=case.loss, parameters=SELECTED[name])
    assert matrix.mode == "reverse"
    assert 20 < len(dense) < 100
    scale = np.abs(values).max()
    top = sk.top_eigenvalues(matrix, k=4)
    np.testing.assert_allclose(top.values, values[:4], rtol=0, atol=1e-6 * scale)
    low = sk.top_eigenvalues(matrix, k=1, which="SA")
    np.testing.assert_allclose(low.values, values[-1:], rtol=0, atol=1e-6 * scale)
    density = sk.spectral_density(
        matrix, steps=len(dense), probes=torch.eye(len(dense), dtype=torch.float64)
    )
    for power in (1, 2, 3):  # of the eigenvalues: their mean is exact with every unit vector
        moment = (density.weights * density.nodes**power).sum() / len(density.weights)
        assert moment == pytest.approx((values**power).mean(), rel=0, abs=1e-6 * scale**power)


def plain_training(case: Case, m: int | None) -> Tensor:
    """SAM's steps by hand: one perturbation for all examples, or one for each m of them."""
    problem = case.problem()
    problem.model.train()
    velocity = torch.zeros(())
    for _ in range(STEPS):
        slope = plain_loops.m_sam_gradient(problem, m or len(problem.labels), RHO)
        velocity = MOMENTUM * velocity + slope
        with plain_loops.moved(problem, -RATE * velocity):
            after = plain_loops.flat([p.detach().clone() for p in problem.parameters])
        for p, part in zip(
            problem.parameters, after.split([p.numel() for p in problem.parameters]), strict=True
        ):
            p.detach().copy_(part.view_as(p))
    return after


def sam(model: nn.Module) -> sk.SAM:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return sk.SAM(trainable, torch.optim.SGD, rho=RHO, lr=RATE, momentum=MOMENTUM)


def step(model: nn.Module, optimizer: sk.SAM, inputs, labels: Tensor) -> None:
    def closure() -> Tensor:
        total, weight = plain_loops.cross_entropy(plain_loops.call(model, inputs), labels)
        loss = total / weight
        loss.backward()
        return loss

    optimizer.step(closure)


def trained(model: nn.Module) -> Tensor:
    return plain_loops.flat([p.detach() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("m", [None, M])
@over_all
def test_sam_takes_the_steps_of_the_plain_loop(name: str, m: int | None):
    case = BY_NAME[name]
    model, inputs, labels = case.make(torch.float64)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = sam(model.train())
    for _ in range(STEPS):
        if m is None:
            step(model, optimizer, inputs, labels)
        else:
            optimizer.step_batch(model, inputs, labels, m=m)
    torch.testing.assert_close(trained(model), plain_training(case, m), rtol=1e-7, atol=1e-10)
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in frozen.items())


@over_all
def test_a_tracker_measures_what_plain_loops_do_and_changes_no_bit(name: str):
    case = BY_NAME[name]
    weights = []
    for measures in (
        None,
        ["loss", "lambda_max", "distance", sk.measures.MSharpness(m=N, rho=RHO)],
    ):
        model, inputs, labels = case.make(torch.float64)
        optimizer = sam(model.train())
        tracker = measures and sk.Tracker((inputs, labels), measures=measures, every=1)
        expected = []
        for at in range(STEPS):
            if tracker:
                tracker(model, optimizer, step=at)
                expected.append(plain_measurements(case, model))
            step(model, optimizer, inputs, labels)
        weights.append(trained(model))
    assert torch.equal(*weights)
    start = expected[0]["weights"]
    for row, plain in zip(tracker.rows, expected, strict=True):
        assert row["loss"] == pytest.approx(plain["loss"], rel=1e-9)
        assert row["lambda_max_residual"] <= 0.02 * plain["lambda_max"]
        assert abs(row["lambda_max"] - plain["lambda_max"]) <= 0.02 * plain["lambda_max"]
        assert row["distance"] == pytest.approx(
            float((plain["weights"] - start).norm()), rel=1e-9, abs=1e-12
        )
        (sharpness,) = (v for k, v in row.items() if k.startswith("m_sharpness") and "err" not in k)
        assert sharpness == pytest.approx(plain["m_sharpness"], rel=1e-6)


def plain_measurements(case: Case, model: nn.Module) -> dict:
    """In eval mode, of the present weights."""
    problem = case.problem()
    for target, source in zip(problem.model.parameters(), model.parameters(), strict=True):
        target.detach().copy_(source.detach())
    size = sum(p.numel() for p in problem.parameters)

    def product(vector: np.ndarray) -> np.ndarray:
        with sdpa_kernel(SDPBackend.MATH):
            return plain_loops.hessian_product(problem, torch.from_numpy(vector.ravel())).numpy()

    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    return {
        "loss": float(problem.loss().detach()),
        "lambda_max": float(eigsh(operator, 1, which="LA", v0=np.ones(size), tol=1e-4)[0][0]),
        "m_sharpness": plain_loops.m_sharpness(problem, N, RHO),
        "weights": copy.deepcopy(plain_loops.flat([p.detach() for p in problem.parameters])),
    }
