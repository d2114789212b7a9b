import math

import pytest
import torch
from measure_helpers import permuted, relu_data, relu_network, rescaled
from torch import nn

from sharpkit.measures import average_sharpness, worst_case_sharpness


def test_the_worst_case_of_a_linear_loss_is_the_dual_norm():
    """With two classes and equal logits the loss gradient of the difference is ±x/2."""
    model = nn.Linear(3, 2, bias=False).double()
    nn.init.zeros_(model.weight)
    x = torch.tensor([[1.0, 2.0, -2.0]]).double()
    data = x, torch.tensor([0])
    rho = 1e-4
    # the gradient is (−x/2, x/2): its 2-norm is 3/√2, its 1-norm 5
    assert worst_case_sharpness(model, data, rho=rho) == pytest.approx(
        rho * 3 / math.sqrt(2), rel=1e-3
    )
    assert worst_case_sharpness(model, data, rho=rho, norm=math.inf) == pytest.approx(
        rho * 5, rel=1e-3
    )


@pytest.mark.parametrize("norm", [2.0, math.inf])
def test_adaptive_sharpness_survives_rescaling_and_plain_sharpness_does_not(norm):
    model, data = relu_network(bias=True), relu_data()
    options = {"norm": norm, "rho": 0.02, "ascent": "one_step"}
    adaptive = worst_case_sharpness(model, data, adaptive=True, **options)
    after = worst_case_sharpness(rescaled(model), data, adaptive=True, **options)
    assert after == pytest.approx(adaptive, rel=1e-6)
    plain = worst_case_sharpness(model, data, **options)
    assert worst_case_sharpness(rescaled(model), data, **options) > 1.3 * plain


def test_the_order_of_units_does_not_matter():
    model, data = relu_network(), relu_data()
    assert worst_case_sharpness(permuted(model), data) == pytest.approx(
        worst_case_sharpness(model, data), rel=1e-6
    )


def test_more_ascent_finds_no_less():
    model, data = relu_network(), relu_data()
    one = worst_case_sharpness(model, data, rho=0.3, ascent="one_step")
    assert worst_case_sharpness(model, data, rho=0.3, steps=20) >= one * 0.999


def test_the_average_case_is_the_trace_of_the_hessian():
    """½ rho² tr H / P, with tr H in closed form at equal logits: ‖x‖² (1 − 1/k) for k classes."""
    model = nn.Linear(3, 2, bias=False).double()
    nn.init.zeros_(model.weight)
    x = torch.tensor([[1.0, 2.0, -2.0], [0.0, 1.0, 0.0]]).double()
    # opposite labels for opposite copies cancel the gradient
    data = torch.cat([x, x]), torch.tensor([0, 0, 1, 1])
    rho = 0.05
    trace = float(x.square().sum(1).mean()) * 0.5
    expected = 0.5 * rho**2 * trace / 6
    value = average_sharpness(model, data, rho=rho, draws=3000).value
    assert value == pytest.approx(expected, rel=0.05)


def test_the_average_is_below_the_worst_case():
    model, data = relu_network(), relu_data()
    assert average_sharpness(model, data, rho=0.1).value < worst_case_sharpness(
        model, data, rho=0.1
    )


def test_the_logit_normalised_sharpness_ignores_scale_and_shift_of_the_outputs():
    model, data = relu_network(bias=True), relu_data()
    other = relu_network(bias=True)
    for p in other[4].parameters():
        p.data *= 5.0
    other[4].bias.data += 2.0
    options = {"rho": 0.01, "norm": float("inf"), "adaptive": True, "ascent": "apgd"}
    for restarts in (1, 3):
        found = [
            worst_case_sharpness(m, data, logit_normalized=True, restarts=restarts, **options)
            for m in (model, other)
        ]
        assert found[0] > 0
    plain = [worst_case_sharpness(m, data, **options) for m in (model, other)]
    assert plain[1] > 2 * plain[0]


def test_the_logit_normalised_sharpness_is_that_of_the_network_with_such_outputs():
    class Normalised(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            z = self.inner(x)
            z = z - z.mean(1, keepdim=True)
            return z / z.norm(dim=1, keepdim=True)

    model, data = relu_network(bias=True), relu_data()
    options = {"rho": 0.02, "norm": float("inf"), "adaptive": True, "ascent": "apgd", "steps": 20}
    expected = worst_case_sharpness(Normalised(model), data, **options)
    found = worst_case_sharpness(model, data, logit_normalized=True, **options)
    assert found == pytest.approx(expected)


def test_more_starts_of_the_ascent_never_lower_the_sharpness():
    model, data = relu_network(bias=True), relu_data()
    values = [
        worst_case_sharpness(model, data, rho=0.5, ascent="apgd", restarts=k) for k in (1, 2, 4)
    ]
    assert values == sorted(values)
