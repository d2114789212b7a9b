"""−log p of labels in slices: values, derivatives of all kinds, and memory."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from memory_peak import peak
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

from sharpkit.contract import surprise as module
from sharpkit.contract.losses import resolve_loss
from sharpkit.contract.surprise import group_slopes, is_small, mean_surprise, surprise

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


@pytest.mark.parametrize("shape", [(6, 5), (6, 2), (6, 7, 5)])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_means_of_groups_and_their_slopes_in_closed_form(shape, groups):
    z, y = draw(*shape).requires_grad_(), labels(*shape[:-1], classes=shape[-1])
    means = plain(z, y).reshape(groups, -1).mean(1)
    factor = draw(groups, seed=8)
    (expected,) = torch.autograd.grad((means * factor).sum(), z)
    found, slopes, exponent = group_slopes(z.detach(), y, groups, factor)
    torch.testing.assert_close(found, means)
    torch.testing.assert_close(mean_surprise(z.detach(), y, groups), means)
    torch.testing.assert_close(slopes, expected)
    assert exponent is None
    _, unscaled, _ = group_slopes(z.detach(), y, groups, 1.0)
    found, slopes, exponent = group_slopes(z.detach(), y, groups, None)
    each = torch.exp2(exponent).repeat_interleave(6 // groups).view(-1, *[1] * (z.ndim - 1))
    torch.testing.assert_close(slopes, unscaled * each)
    top = slopes.abs().reshape(groups, -1).amax(1)
    assert bool(((top >= 1) & (top < 2)).all())


@pytest.mark.parametrize("gap", [20.0, 60.0, 86.0])
def test_slopes_in_closed_form_of_certain_networks_keep_their_precision(gap):
    """To the rounding of the logits: of exponents of 86, 86 times that of float32."""
    z = draw(4, 5)
    z[:, 0] += gap
    y = torch.zeros(4, dtype=torch.long)
    p = z.softmax(-1)
    p[:, 0] = -p[:, 1:].sum(1)
    found, slopes, exponent = group_slopes(z.float(), y, 4, None)
    wide = slopes.double() * torch.exp2(-exponent).unsqueeze(1)
    torch.testing.assert_close(wide, p, rtol=2 * gap * 6e-8 + 1e-6, atol=0)
    torch.testing.assert_close(found.double(), -torch.log1p(p[:, 0]), rtol=1e-4, atol=0)


def test_slopes_in_closed_form_where_no_other_class_is_possible():
    z = torch.tensor([[2.0, -torch.inf, -torch.inf], [0.0, -torch.inf, 0.0]])
    means, slopes, exponent = group_slopes(z, torch.tensor([0, 0]), 2, None)
    torch.testing.assert_close(means, torch.tensor([1.0, 2.0]).log())
    assert exponent[0] == torch.inf and not slopes[0].any()
    torch.testing.assert_close(slopes[1], torch.tensor([-1.0, 0.0, 1.0]))


def test_closed_forms_are_for_few_logits_outside_of_transforms(in_slices):
    few, many = draw(3, 5), draw(6, 5)
    assert is_small(few) and not is_small(many) and not is_small(few.half())
    seen = []
    vmap(lambda z: (seen.append(is_small(z)), z.sum())[1])(few.unsqueeze(1))
    assert seen == [False]
    y = labels(6, classes=5)
    torch.testing.assert_close(mean_surprise(many, y, 2), plain(many, y).view(2, 3).mean(1))
    loss = resolve_loss("cross_entropy")
    assert loss.formula.of_groups is None  # labels may be ignored
    assert loss.where_all_count([y]).formula.of_groups is not None
