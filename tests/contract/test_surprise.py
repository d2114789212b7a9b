"""−log p of labels in slices: values, derivatives of all kinds, and memory."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from memory_peak import peak
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

from sharpkit.contract import surprise as module
from sharpkit.contract.surprise import surprise

SHAPES = [(6, 5), (2, 7, 5), (1, 9, 3), (4, 1, 2)]


@pytest.fixture
def in_slices(monkeypatch):
    """Of a few numbers each."""
    monkeypatch.setitem(module._LARGE, "cpu", 150)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64)


def labels(*shape: int, classes: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


def plain(outputs: Tensor, y: Tensor) -> Tensor:
    return -outputs.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)


def weighted(function, y: Tensor, c: Tensor, z: Tensor) -> Tensor:
    return (c * function(z, y)).sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_values_slopes_and_second_derivatives(shape, in_slices):
    z, y = draw(*shape), labels(*shape[:-1], classes=shape[-1])
    assert len(list(module.slices(z))) > 1 or max(shape[:-1]) == 1
    torch.testing.assert_close(surprise(z, y), plain(z, y))
    c = draw(*y.shape, seed=3)
    first, second = (
        [kind(partial(weighted, f, y, c))(z) for f in (surprise, plain)] for kind in (grad, hessian)
    )
    torch.testing.assert_close(*first)
    torch.testing.assert_close(*second)


def test_double_backward_also_by_the_factor_and_a_third_derivative(in_slices):
    z, y = draw(2, 7, 5).requires_grad_(), labels(2, 7, classes=5)
    c = draw(2, 7, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: surprise(z, y), (z,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda z: surprise(z, y), (z,), check_fwd_over_rev=True)
    u = draw(2, 7, 5, seed=5)

    def third(function) -> tuple[Tensor, ...]:
        (g,) = torch.autograd.grad((c * function(z, y)).sum(), z, create_graph=True)
        (h,) = torch.autograd.grad((g * u).sum(), z, create_graph=True)
        return torch.autograd.grad(h.square().sum(), (z, c))

    torch.testing.assert_close(third(surprise), third(plain))


def test_transforms_of_torch_func(in_slices):
    z, y = draw(3, 6, 5), labels(3, 6, classes=5)
    u, many = draw(3, 6, 5, seed=6), draw(4, 3, 6, seed=7)

    def all_of(f) -> list[Tensor]:
        def slope(z: Tensor, y: Tensor) -> Tensor:
            return grad(lambda z: f(z, y).mean())(z)

        def along(z: Tensor, y: Tensor, u: Tensor) -> Tensor:
            return jvp(lambda z: slope(z, y), (z,), (u,))[1]

        return [
            vmap(slope)(z, y),
            vmap(along)(z, y, u),
            along(z, y, u),
            jvp(lambda z: f(z, y), (z,), (u,))[1],
            vmap(vjp(lambda z: f(z, y), z)[1])(many)[0],
            jacrev(lambda z: f(z, y))(z),
        ]

    for found, expected in zip(all_of(surprise), all_of(plain), strict=True):
        torch.testing.assert_close(found, expected)


def test_certain_networks_and_classes_that_are_ruled_out(in_slices):
    """Slopes of 1e-35 in float32, and none where no other class is possible."""
    z = draw(8, 5).float()
    z[:, 0] += torch.linspace(0, 80, 8)
    z[3, 1:] = -torch.inf
    y = torch.zeros(8, dtype=torch.long)
    (found,) = torch.autograd.grad(surprise(leaf := z.requires_grad_(), y).sum(), leaf)
    (written,) = torch.autograd.grad(module._written_out(leaf, y).sum(), leaf)
    assert 0 < found[-1, 1:].max() < 1e-30
    assert not found[3].any()
    others = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(found[others], written[others], rtol=1e-4, atol=0)


def test_beside_the_logits_there_is_one_tensor_of_their_size():
    n, vocabulary = 48, 200_000
    z, y = torch.randn(n, vocabulary, requires_grad=True), torch.arange(n)
    loss = surprise(z, y).mean()
    (found,) = torch.autograd.grad(loss, z, create_graph=True)
    u = torch.ones_like(z)
    size = z.nbytes
    assert peak(lambda: surprise(z, y)) < 0.9 * size
    assert peak(lambda: torch.autograd.grad(loss, z, retain_graph=True)) < 2 * size
    assert peak(lambda: torch.autograd.grad(found, z, u, retain_graph=True)) < 2 * size
