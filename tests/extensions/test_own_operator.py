"""A curvature operator from outside the package, used by every algorithm that takes one."""

import pytest
import torch
from torch import nn

import sharpkit as sk
from sharpkit.errors import ArgumentError


class GradientCovariance:
    """(1/n) Σ g_i g_iᵀ of the per-example gradients g_i: shape, dtype, device and products."""

    def __init__(self, model, inputs, labels):
        weights = dict(model.named_parameters())

        def loss(weights, x, y):
            return nn.functional.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)

        each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, inputs, labels)
        self.rows = torch.cat([g.flatten(1) for g in each.values()], 1).detach()
        self.shape = (self.rows.shape[1], self.rows.shape[1])
        self.dtype, self.device = self.rows.dtype, self.rows.device

    def matmat(self, vectors):
        return self.rows.T @ (self.rows @ vectors) / len(self.rows)


def test_spectrum_eigenvalues_and_traces_are_those_of_the_matrix():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    own = GradientCovariance(model, torch.randn(50, 3).double(), torch.arange(50) % 2)
    dense = own.matmat(torch.eye(own.shape[0], dtype=torch.float64))
    true = torch.linalg.eigvalsh(dense).flip(0)
    top = sk.top_eigenvalues(own, k=3, progress=False)
    assert top.values == pytest.approx(true[:3].numpy())
    density = sk.spectral_density(own, steps=own.shape[0], probes=2, progress=False)
    assert density.largest(1)[0] == pytest.approx(float(true[0]))
    assert sk.trace(own, products=90).value == pytest.approx(float(true.sum()))
    assert sk.frobenius_norm(own, products=90).value == pytest.approx(float(dense.norm()))


@pytest.mark.parametrize("wrong", [lambda v: v[:2], lambda v: v.double()])
def test_products_of_another_shape_or_dtype_are_refused(wrong):
    own = GradientCovariance(nn.Linear(3, 2), torch.randn(5, 3), torch.arange(5) % 2)
    own.matmat = wrong
    with pytest.raises(ArgumentError, match=r"matmat of GradientCovariance gave .* expected the"):
        sk.trace(own, products=6)
