"""Products through every kind of layer, against finite differences of plain gradients."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_layers import (
    BY_DIFFERENCES,
    LAYERS,
    LOSSES_BY_DIFFERENCES,
    REFUSED,
    Apply,
    around,
)

from sharpkit.curvature import FisherOperator, GaussNewtonOperator, HessianOperator
from sharpkit.curvature.plain_rules import _FORMULAS, plain_rules
from sharpkit.errors import ModelError

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "second-derivatives.md"


def by_differences(model, data, direction, step):
    """[∇L(w + step·v) − ∇L(w − step·v)] / 2 step, with torch alone."""
    inputs, labels = data
    parameters = list(model.parameters())
    torch.backends.mha.set_fastpath_enabled(False)
    pieces = direction.split([p.numel() for p in parameters])
    gradients = []
    for shift in (step, -2 * step):
        with torch.no_grad():
            for p, d in zip(parameters, pieces, strict=True):
                p.add_(d.view_as(p), alpha=shift)
        with sdpa_kernel(SDPBackend.MATH):
            found = torch.autograd.grad(
                F.cross_entropy(model(inputs), labels), parameters, materialize_grads=True
            )
        gradients.append(torch.cat([g.flatten() for g in found]))
    with torch.no_grad():
        for p, d in zip(parameters, pieces, strict=True):
            p.add_(d.view_as(p), alpha=step)
    torch.backends.mha.set_fastpath_enabled(True)
    return (gradients[0] - gradients[1]) / (2 * step)


@pytest.mark.parametrize("name", LAYERS)
def test_a_product_is_the_difference_of_gradients(name):
    model, (inputs, labels) = around(LAYERS[name])
    operator = HessianOperator(model, (inputs, labels))
    assert operator.mode in ("reverse", "plain reverse")
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(operator.shape[0], dtype=torch.float64, generator=generator)
    v *= operator.gradient != 0  # padding rows, and diagonals of which only the sign is used
    product = operator @ v
    for kind in (GaussNewtonOperator, FisherOperator):
        kind(model, (inputs, labels))  # its own comparison with differences is in its constructor
    expected = by_differences(model, (inputs, labels), v, 1e-6)
    assert (product - expected).norm() < 1e-6 * expected.norm()
    single = HessianOperator(model.float(), (inputs.float(), labels))
    assert (single @ v.float() - expected).norm() < 1e-3 * expected.norm()


def test_the_hessian_is_right_where_torch_is_wrong():
    """The double backward of weight_norm and the gradient of a batch norm of one example."""
    model, data = around(LAYERS["weight_norm"])
    dense = HessianOperator(model, data).to_dense()
    eye = torch.eye(len(dense), dtype=torch.float64)
    expected = torch.stack([by_differences(model, data, column, 1e-5) for column in eye])
    assert (dense - expected).norm() < 1e-7 * expected.norm()

    model, (inputs, labels) = around(LAYERS["BatchNorm2d"])
    model.layer = torch.nn.Sequential(
        model.layer, Apply(lambda x: x.flatten(2).transpose(1, 2).contiguous().sin())
    )
    whole = HessianOperator(model, (inputs, labels), chunk=4)
    alone = HessianOperator(model, (inputs, labels), chunk=1)
    v = torch.ones(whole.shape[0], dtype=torch.float64)
    assert torch.allclose(alone.gradient, whole.gradient, atol=1e-12)
    assert torch.allclose(alone @ v, whole @ v, atol=1e-12)


@pytest.mark.parametrize("name", [*REFUSED, *BY_DIFFERENCES])
@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_what_no_exact_mode_differentiates_twice_is_refused_by_name(name, kind):
    layer, said = {**REFUSED, **BY_DIFFERENCES}[name]
    model, data = around(layer)
    with pytest.raises(ModelError, match=f"cannot be differentiated twice: .*({said})"):
        kind(model, data, method="auto" if name in REFUSED else "exact")


@pytest.mark.parametrize("name", LOSSES_BY_DIFFERENCES)
def test_losses_without_second_derivatives_are_refused_by_name(name):
    model, data = around((lambda: torch.nn.Linear(6, 3), (6,)))
    for kind, method in ((HessianOperator, "exact"), (GaussNewtonOperator, "auto")):
        with pytest.raises(ModelError, match=f"cannot be differentiated twice: .*{name}"):
            kind(model, data, loss=LOSSES_BY_DIFFERENCES[name], method=method)


def test_the_page_lists_what_is_refused_and_what_has_a_formula():
    page = PAGE.read_text(encoding="utf-8")
    formulas = [function.__name__.removeprefix("_") for function in _FORMULAS]
    refused = (*REFUSED, *BY_DIFFERENCES, *LOSSES_BY_DIFFERENCES)
    for name in (*refused, *formulas, "scaled_dot_product_attention"):
        assert name in page, name


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bags_have_the_native_values(mode):
    torch.manual_seed(0)
    table = torch.randn(7, 3, dtype=torch.float64)
    rows = torch.tensor([1, 5, 2, 2, 0, 6, 5])
    weights = torch.rand(7, dtype=torch.float64) if mode == "sum" else None
    for options in (
        {"offsets": torch.tensor([0, 2, 2, 5])},  # one bag is empty
        {"offsets": torch.tensor([0, 3, 7]), "include_last_offset": True},
        {"offsets": torch.tensor([0, 2, 4]), "padding_idx": 2},  # one has padding only
    ):
        options = {**options, "mode": mode, "per_sample_weights": weights}
        native = F.embedding_bag(rows, table, **options)
        with plain_rules():
            plain = F.embedding_bag(rows, table, **options)
        assert torch.allclose(plain, native, atol=1e-15)


def test_the_check_names_the_module_whose_derivative_is_wrong():
    class Halved(torch.autograd.Function):
        """x² with a second derivative of 1 instead of 2."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx, slope):
            (x,) = ctx.saved_tensors
            return slope * (x + x.detach())

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.linspace(1, 2, 6))

        def forward(self, x):
            return x + Halved.apply(self.scale)

    model, data = around((Layer, (6,)))
    with pytest.raises(ModelError, match=r"most in 'layer.scale' of 'layer' \(Layer\)"):
        HessianOperator(model, data, method="exact")
    with pytest.warns(UserWarning, match=r"most in 'layer.scale' of 'layer' \(Layer\)"):
        assert HessianOperator(model, data).mode == "finite difference"
    with pytest.raises(ModelError, match=r"most in 'layer.scale' of 'layer' \(Layer\)"):
        HessianOperator(model.float(), (data[0].float(), data[1]), method="exact")


def test_padding_dead_units_and_large_relu_networks_are_not_mistaken_for_errors():
    torch.manual_seed(0)
    wide = torch.nn.Sequential(
        torch.nn.Linear(20, 4000), torch.nn.ReLU(), torch.nn.Linear(4000, 50), torch.nn.ReLU(),
        torch.nn.Linear(50, 3),
    )  # fmt: skip
    with torch.no_grad():
        wide[2].bias[:25] = -100  # dead
    labels = torch.arange(40) % 3
    for kind in (HessianOperator, GaussNewtonOperator, FisherOperator):
        assert kind(wide, (torch.randn(40, 20), labels)).mode == "reverse"
    table = torch.nn.Embedding(9, 5, padding_idx=0, max_norm=0.5)
    words = torch.nn.Sequential(table, torch.nn.Flatten(), torch.nn.Tanh(), torch.nn.Linear(15, 3))
    tokens = torch.randint(0, 9, (40, 3))
    assert HessianOperator(words, (tokens, labels)).mode == "reverse"
