import copy

import pytest
import torch
from measure_helpers import relu_data, relu_network
from torch import nn

from sharpkit.errors import ArgumentError, ModelError
from sharpkit.measures import geodesic_sharpness, worst_case_sharpness
from sharpkit.measures.attention_geometry import AttentionPairs, attention_pairs

SIZE, HEADS = 6, 2


class Attention(nn.Module):
    def __init__(self, bias=True, kdim=None):
        super().__init__()
        self.attention = nn.MultiheadAttention(SIZE, HEADS, bias=bias, kdim=kdim, batch_first=True)
        self.head = nn.Linear(SIZE, 3)

    def forward(self, x):
        keys = x if self.attention.kdim == SIZE else x[..., : self.attention.kdim]
        return self.head(self.attention(x, keys, x, need_weights=False)[0].mean(1))


def network(seed=0, **options):
    torch.manual_seed(seed)
    model = Attention(**options).double()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 4, SIZE, generator=generator).double()
    return x, torch.randint(0, 3, (20,), generator=generator)


def transformed(model, seed=3):
    """The same function: every head's (G, H) as (G A⁻¹, H Aᵀ) with its own random A."""
    other = copy.deepcopy(model)
    weights = {k: p.data for k, p in other.named_parameters()}
    torch.manual_seed(seed)
    for layout in attention_pairs(other):
        pairs = AttentionPairs(layout, weights)
        a = torch.randn(HEADS, SIZE // HEADS, SIZE // HEADS).double()
        moved = pairs.merge(pairs.g @ torch.linalg.inv(a), pairs.h @ a.mT)
        for name, mask in pairs.masks().items():
            weights[name][mask] = moved[name][mask]
    return other


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 5}])
def test_no_invertible_matrix_between_the_factors_of_a_head_changes_it(options):
    model = network(**options)
    other, (x, y) = transformed(model), data()
    torch.testing.assert_close(other(x), model(x))
    assert not torch.allclose(
        next(other.attention.parameters()), next(model.attention.parameters())
    )
    expected = geodesic_sharpness(model, (x, y), rho=0.3, steps=5)
    assert expected > 0
    assert geodesic_sharpness(other, (x, y), rho=0.3, steps=5) == pytest.approx(expected, rel=1e-6)
    plain = [worst_case_sharpness(m, (x, y), rho=0.3, adaptive=True) for m in (model, other)]
    assert plain[0] != pytest.approx(plain[1], rel=1e-2)  # which adaptive sharpness does not do


def test_without_attention_it_is_adaptive_sharpness():
    model, given = relu_network(bias=True), relu_data()
    expected = worst_case_sharpness(model, given, rho=0.5, adaptive=True, ascent="pgd", steps=7)
    assert geodesic_sharpness(model, given, rho=0.5, steps=7) == pytest.approx(expected, rel=1e-9)


def a_pair():
    """Pairs of one attention, and two tangent vectors at them."""
    model = network()
    weights = {k: p.data for k, p in model.named_parameters()}
    pairs = AttentionPairs(next(iter(attention_pairs(model))), weights)
    torch.manual_seed(5)
    vectors = [(torch.randn_like(pairs.g), torch.randn_like(pairs.h)) for _ in range(2)]
    return pairs, vectors


def inner(pairs, a, b):
    (ag, ah), (bg, bh) = a, b
    return float(
        sum(
            torch.trace(pairs.gram_h[i] @ ag[i].T @ bg[i])
            + torch.trace(pairs.gram_g[i] @ ah[i].T @ bh[i])
            for i in range(HEADS)
        )
    )


def test_horizontal_directions_are_orthogonal_to_every_orbit_and_the_projection_is_one():
    pairs, (xi, _) = a_pair()
    found = pairs.horizontal(*xi)
    b = torch.randn(HEADS, SIZE // HEADS, SIZE // HEADS).double()
    vertical = -pairs.g @ b, pairs.h @ b.mT
    assert inner(pairs, found, vertical) == pytest.approx(0.0, abs=1e-9)
    again = pairs.horizontal(*found)
    torch.testing.assert_close(again, found)
    difference = xi[0] - found[0], xi[1] - found[1]  # along the orbit
    assert inner(pairs, difference, found) == pytest.approx(0.0, abs=1e-9)
    assert pairs.squared_norm(*xi) == pytest.approx(inner(pairs, xi, xi))


def test_the_riemannian_gradient_represents_the_euclidean_one():
    pairs, (gradient, xi) = a_pair()
    euclidean = float((gradient[0] * xi[0]).sum() + (gradient[1] * xi[1]).sum())
    assert inner(pairs, pairs.raised(*gradient), xi) == pytest.approx(euclidean)


def test_the_acceleration_makes_the_energy_stationary():
    """The geodesic equation from autograd: M(w) γ̈ + Ṁ γ̇ = ½ ∂⟨γ̇, γ̇⟩_w / ∂w at fixed γ̇."""
    pairs, (xi, _) = a_pair()
    acceleration = pairs.acceleration(*xi)

    def momentum(g, h, vg, vh):
        return vg @ (h.mT @ h), vh @ (g.mT @ g)

    def energy(g, h):
        return 0.5 * (
            ((h.mT @ h) * (xi[0].mT @ xi[0])).sum() + ((g.mT @ g) * (xi[1].mT @ xi[1])).sum()
        )

    g, h = pairs.g.clone().requires_grad_(), pairs.h.clone().requires_grad_()
    force = torch.autograd.grad(energy(g, h), (g, h))
    # d/dt of the momentum along the path with velocity ξ and this acceleration
    _, change = torch.func.jvp(momentum, (pairs.g, pairs.h, *xi), (*xi, *acceleration))
    torch.testing.assert_close(change, force)


def test_what_it_does_not_know_is_refused():
    x, y = data()
    with pytest.raises(ArgumentError, match="rho"):
        geodesic_sharpness(network(), (x, y), rho=0.0)
    with pytest.raises(ArgumentError, match="steps"):
        geodesic_sharpness(network(), (x, y), steps=0)
    model = network()
    model.attention.in_proj_weight.data[0] = model.attention.in_proj_weight.data[1]
    model.attention.in_proj_bias.data[0] = model.attention.in_proj_bias.data[1]
    with pytest.raises(ModelError, match="full rank"):
        geodesic_sharpness(model, (x, y))
    model = network()
    model.attention = nn.MultiheadAttention(SIZE, HEADS, add_bias_kv=True, batch_first=True)
    with pytest.raises(ModelError, match="add_bias_kv"):
        geodesic_sharpness(model.double(), (x, y))
