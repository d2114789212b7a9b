"""Models as pure functions, and the exact cross-entropy."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.holding import frozen
from sharpkit.contract.losses import cross_entropy, mean_squared_error
from sharpkit.contract.parameters import floating_parameters, select_parameters
from sharpkit.errors import ArgumentError, ModelError


@given(
    st.lists(st.lists(st.floats(-50, 50), min_size=4, max_size=4), min_size=1, max_size=5),
    st.data(),
)
@settings(deadline=None)
def test_cross_entropy_equals_the_usual_one(logits, data):
    z = torch.tensor(logits, dtype=torch.float64)
    y = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=len(z), max_size=len(z))))
    expected = nn.functional.cross_entropy(z, y)
    torch.testing.assert_close(cross_entropy(z, y), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("margin", [1.0, 20.0, 60.0, 95.0])
def test_cross_entropy_and_its_gradient_keep_their_digits_when_saturated(margin):
    z = torch.tensor([[margin, 0.0, -1.0]], requires_grad=True)
    loss = cross_entropy(z, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss, z)
    with mpmath.workdps(60):
        others = mpmath.exp(-margin) + mpmath.exp(-margin - 1)
        exact_loss = float(mpmath.log(1 + others))
        exact = [float(v / (1 + others)) for v in (-others, mpmath.exp(-margin))]
    assert loss.item() == pytest.approx(exact_loss, rel=3e-6)
    assert gradient[0, 0].item() == pytest.approx(exact[0], rel=3e-6)
    assert gradient[0, 1].item() == pytest.approx(exact[1], rel=3e-6)


def test_cross_entropy_has_the_right_second_derivatives():
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 3, 1])
    ours = torch.autograd.functional.hessian(lambda z: cross_entropy(z, y), z)
    usual = torch.autograd.functional.hessian(lambda z: nn.functional.cross_entropy(z, y), z)
    torch.testing.assert_close(ours, usual, rtol=1e-10, atol=1e-12)


def test_mean_squared_error_has_the_identity_as_its_hessian():
    y = torch.zeros(1, 3, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(
        lambda z: mean_squared_error(z, y), torch.randn(1, 3, dtype=torch.float64)
    )
    torch.testing.assert_close(hessian.reshape(3, 3), torch.eye(3, dtype=torch.float64))


def test_frozen_restores_modes_and_random_state_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    model[1].eval()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="stop"), frozen(model):
        assert not any(module.training for module in model.modules())
        torch.randn(3)
        raise ValueError("stop")
    assert [module.training for module in model.modules()] == [True, True, False]
    assert torch.equal(state, torch.get_rng_state())


def test_selects_parameters_by_name_pattern_and_module():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    model[1].weight = nn.Parameter(model[1].weight)
    assert list(select_parameters(model, "0.weight")) == ["0.weight"]
    assert list(select_parameters(model, ["*bias", "2.*"])) == [
        "0.bias",
        "1.bias",
        "2.weight",
        "2.bias",
    ]
    assert list(select_parameters(model, [model[0], model[2]])) == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    ]
    with pytest.raises(ArgumentError, match=r"3\.weight.*0\.weight"):
        select_parameters(model, "3.weight")
    with pytest.raises(ArgumentError, match="no parameter of the model"):
        select_parameters(model, nn.Linear(2, 2))
    for wrong in (3, [3], model[0].weight):
        with pytest.raises(ArgumentError, match="expected names, patterns or modules, got"):
            select_parameters(model, wrong)


def test_integer_parameters_are_not_among_the_floating_ones():
    model = nn.Linear(2, 2)
    model.codes = nn.Parameter(torch.arange(3), requires_grad=False)
    assert list(select_parameters(model, "*")) == ["weight", "bias", "codes"]
    assert list(floating_parameters(model)) == ["weight", "bias"]
    assert list(floating_parameters(model, ["codes", "bias"])) == ["bias"]


def test_a_shared_parameter_answers_to_each_of_its_names():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert list(select_parameters(model, "1.weight")) == ["0.weight"]
    f = FunctionalModel(model)
    zeros = {"0.weight": torch.zeros(3, 3)}
    expected = model[1].bias.detach().expand(2, 3)
    torch.testing.assert_close(f(zeros, torch.randn(2, 3)), expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("twice", [False, True])
def test_a_module_may_be_registered_twice(tied, twice):
    first = nn.Linear(3, 3)
    model = nn.Sequential(first, nn.BatchNorm1d(3), nn.Linear(3, 3), *[first] * twice).eval()
    if tied:
        model[2].weight = first.weight
    before = dict(model.named_parameters(remove_duplicate=False))
    values = {name: 2 * p.detach() for name, p in model.named_parameters()}
    x = torch.randn(2, 3)
    outputs = FunctionalModel(model)(values, x)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is p for name, p in before.items())
    with torch.no_grad():
        for p in model.parameters():
            p *= 2
        torch.testing.assert_close(outputs, model(x))


def test_counting_buffers_are_left_alone():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.layer(x)

    model = Counting()
    FunctionalModel(model)({}, torch.randn(1, 2))
    assert model.calls == 0


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_names_what_is_not_finite(kind):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    (model[0].weight.data if kind == "parameter" else model[1].running_var)[1] = math.nan
    name = "0.weight" if kind == "parameter" else "1.running_var"
    with pytest.raises(ModelError, match=f"{kind} '{name}'"):
        select_parameters(model)


def test_models_without_parameters_or_with_strange_outputs_are_refused():
    with pytest.raises(ModelError, match="no parameters"):
        select_parameters(nn.ReLU())

    class Strange(nn.Linear):
        def forward(self, x):
            return [super().forward(x)]

    with pytest.raises(ModelError, match="returned a list"):
        FunctionalModel(Strange(2, 2))({}, torch.randn(1, 2))
