"""The vectorised m-SAM gradient against a plain loop over groups."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import CASES
from sam_reference import close, m_sam_loop
from torch import Tensor, nn
from torch.nn import functional as F

from sharpkit.errors import ArgumentError, DataError, ModelError
from sharpkit.training import group_plan, m_sam_gradient, perturbed_layers


def grads(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("m", [1, 3, 5, 16, 24, 100])
@pytest.mark.parametrize("adaptive", [False, True])
def test_equals_the_plain_loop(case, m, adaptive):
    model, x, y = case.make()
    model.eval()
    value = m_sam_gradient(model, x, y, m=m, rho=0.1, adaptive=adaptive, engine="vectorized")
    assert close(grads(model), m_sam_loop(model, x, y, m, 0.1, adaptive), 1e-12)
    assert float(value) == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32_equals_the_loop_in_float64(case):
    model, x, y = case.make()
    model.eval()
    single = copy.deepcopy(model).float()
    m_sam_gradient(single, x.float() if x.is_floating_point() else x, y, m=3, rho=0.05)
    found = [p.grad.double() for p in single.parameters()]
    assert close(found, m_sam_loop(model, x, y, 3, 0.05), 2e-4)


def without_dropout(model: nn.Module) -> nn.Module:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("m", [2, 5, 16, 24])
def test_in_train_mode_a_group_is_normalised_by_its_own_statistics(case, m):
    model, x, y = case.make()
    without_dropout(model)
    expected = m_sam_loop(model, x, y, m, 0.1)
    m_sam_gradient(model, x, y, m=m, rho=0.1, engine="vectorized")
    assert close(grads(model), expected, 1e-11)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("m", [1, 5, 24])
@pytest.mark.parametrize("engine", ["vectorized", "loop"])
def test_running_statistics_move_once_by_the_mean_over_groups(momentum, m, engine):
    model, x, y = CASES[2].make()
    model.train()
    for layer in (model.norm1, model.norm2):
        layer.momentum = momentum
    expected = copy.deepcopy(model.state_dict())
    n, factor = len(x), momentum or 1.0
    for name in ("norm1", "norm2"):
        for kind in ("mean", "var"):
            expected[f"{name}.running_{kind}"] *= 1 - factor
        expected[f"{name}.num_batches_tracked"] += 1
    for i in range(0, n, m):
        one = copy.deepcopy(model)
        for layer in (one.norm1, one.norm2):
            layer.momentum = 1.0
        one(x[i : i + m])
        for name in ("norm1", "norm2"):
            for kind in ("mean", "var"):
                key = f"{name}.running_{kind}"
                expected[key] += factor * len(x[i : i + m]) / n * one.state_dict()[key]
    m_sam_gradient(model, x, y, m=m, rho=0.1, engine=engine)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-12)
    assert model.norm1.momentum == momentum and model.norm1.track_running_stats


def test_batchnorm_in_eval_mode_uses_and_keeps_its_stored_statistics():
    model, x, y = CASES[2].make()
    model.train()
    model.norm1.eval()
    model.norm2.eval()
    before = copy.deepcopy(model.state_dict())
    m_sam_gradient(model, x, y, m=1, rho=0.1, engine="vectorized")
    assert close(grads(model), m_sam_loop(model, x, y, 1, 0.1), 1e-12)
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())


class Masked(nn.Module):
    """Multiplies by a mask that is given, where another model has dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.ones(1)
        self.first, self.second = nn.Linear(6, 30), nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        index = x[:, -1].long()  # the last feature numbers the examples
        return self.second(torch.tanh(self.first(x)) * self.mask[index])


@pytest.mark.parametrize("m", [1, 4, 24])
def test_dropout_masks_are_shared_by_both_passes_but_not_by_groups(m):
    torch.manual_seed(3)
    masked = Masked().double()
    dropout = nn.Sequential(masked.first, nn.Tanh(), nn.Dropout(0.4), masked.second).train()
    x = torch.cat([torch.randn(24, 5), torch.arange(24.0).unsqueeze(1)], 1).double() / 1.0
    y = torch.randint(0, 3, (24,))
    m_sam_gradient(dropout, x, y, m=m, rho=0.3)  # plans the step, which draws nothing
    dropout.zero_grad()
    torch.manual_seed(5)
    m_sam_gradient(dropout, x, y, m=m, rho=0.3)
    after = torch.rand(1)
    torch.manual_seed(5)
    masked.mask = F.dropout(torch.ones(24, 30, dtype=torch.float64), 0.4)
    assert torch.equal(after, torch.rand(1))  # as many numbers as one pass draws
    assert close([p.grad for p in masked.parameters()], m_sam_loop(masked, x, y, m, 0.3), 1e-12)


class Oddities(nn.Module):
    """Convolutions of every kind, with weights used by layers and elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Conv2d(4, 4, 1)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2, stride=2, padding=1)
        self.same = nn.Conv2d(8, 8, (3, 1), padding="same", bias=False)
        self.dilated = nn.Conv2d(8, 6, 2, dilation=2, padding=(1, 0), padding_mode="circular")
        self.line = nn.Conv1d(6, 5, 3, padding="valid")
        self.up = nn.ConvTranspose1d(5, 4, 2)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)
        self.bias = self.head.bias
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.grouped(torch.tanh(self.point(x))))
        x = torch.tanh(self.dilated(self.same(x)))
        x = self.up(torch.tanh(self.line(x.flatten(2)))).mean(2)
        return self.head(self.norm(x)) + self.bias * self.same.weight.sum()


@pytest.mark.parametrize("m", [1, 4, 7])
def test_layers_of_every_kind_equal_the_plain_loop(m):
    torch.manual_seed(0)
    model, x, y = Oddities().double(), torch.randn(14, 4, 8, 8).double(), torch.arange(14) % 3
    m_sam_gradient(model, x, y, m=m, rho=0.2, engine="vectorized")
    assert close(grads(model), m_sam_loop(model, x, y, m, 0.2), 1e-12)
    assert model.unused.weight.grad is None


def test_the_second_pass_forms_no_gradient_per_group_for_layers(monkeypatch):
    calls = []
    original = perturbed_layers._call
    monkeypatch.setattr(
        perturbed_layers, "_call", lambda kind, *args: calls.append(kind) or original(kind, *args)
    )
    model, x, y = CASES[1].make()
    m_sam_gradient(model.eval(), x, y, m=1, rho=0.2)
    (plan,) = group_plan._PLANS[model].values()
    assert plan.groups > 1
    assert plan.factored == {"6.weight", "8.weight"}  # perturbed by factors
    assert perturbed_layers._GroupConvolution in calls
    assert perturbed_layers._GroupLinear not in calls
    calls.clear()
    model = Oddities().double()
    m_sam_gradient(model, torch.randn(14, 4, 8, 8).double(), torch.arange(14) % 3, m=2, rho=0.2)
    assert {perturbed_layers._GroupConvolution, perturbed_layers._GroupLinear} <= set(calls)


def test_the_answer_does_not_depend_on_the_chunk(monkeypatch):
    model, x, y = CASES[1].make()
    model.eval()
    found = []
    for groups in (1, 2, 5, 24):
        monkeypatch.setattr(group_plan, "_groups_at_a_time", lambda *a, g=groups: g)
        group_plan._PLANS.clear()
        model.zero_grad()
        m_sam_gradient(model, x, y, m=1, rho=0.1)
        found.append(grads(model))
    for other in found[1:]:
        assert close(other, found[0], 1e-13)


def test_tiny_gradients_keep_their_direction():
    model, x, y = CASES[0].make(torch.float32)
    loss = lambda z, t: 1e-36 * F.cross_entropy(z, t)  # noqa: E731
    for m in (1, 24):
        model.zero_grad()
        m_sam_gradient(model, x.float(), y, m=m, rho=0.1, loss=loss)
        tiny = [p.grad.double() * 1e36 for p in model.parameters()]
        model.zero_grad()
        m_sam_gradient(model, x.float(), y, m=m, rho=0.1)
        assert close(tiny, [p.grad.double() for p in model.parameters()], 1e-2)


def test_a_group_of_zero_gradient_is_not_perturbed():
    model, x, y = CASES[0].make()
    loss = lambda z, t: 0.0 * F.cross_entropy(z, t)  # noqa: E731
    for m in (1, 24):
        m_sam_gradient(model, x, y, m=m, rho=0.1, loss=loss)
        assert all(float(g.abs().max()) == 0.0 for g in grads(model))


def test_gradients_are_added_and_frozen_parameters_left_alone():
    model, x, y = CASES[0].make()
    model[0].weight.requires_grad_(False)
    m_sam_gradient(model, x, y, m=1, rho=0.1)
    once = [None if g is None else g.clone() for g in grads(model)]
    m_sam_gradient(model, x, y, m=1, rho=0.1)
    assert once[0] is None and model[0].weight.grad is None
    assert close(grads(model)[1:], [2 * g for g in once[1:]], 1e-13)


def test_inputs_may_be_a_dict():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, *, left: Tensor, right: Tensor) -> Tensor:
            return self.head(left * right)

    model, a, b, y = Two(), torch.randn(6, 4), torch.randn(6, 4), torch.arange(6) % 3
    m_sam_gradient(model, {"left": a, "right": b}, y, m=2, rho=0.1)
    assert close(grads(model), m_sam_loop(model.head, a * b, y, 2, 0.1), 1e-5)


class Loopy(nn.Module):
    """Asks for the value of a tensor, which vmap cannot answer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) if x.sum().item() > 0 else self.head(2 * x)


def test_what_cannot_be_vectorised_runs_as_a_loop_and_says_so():
    torch.manual_seed(0)
    model, x, y = Loopy().double(), torch.randn(6, 4).double(), torch.arange(6) % 3
    with pytest.raises(ModelError, match=r"groups cannot be vectorised, use engine='loop'"):
        m_sam_gradient(model, x, y, m=2, engine="vectorized")
    with pytest.warns(UserWarning, match="one after the other, which is slower"):
        m_sam_gradient(model, x, y, m=2, rho=0.1)
    assert close(grads(model), m_sam_loop(model, x, y, 2, 0.1), 1e-12)
    m_sam_gradient(model, x, y, m=2, rho=0.1)  # warns once (the suite turns none into errors)


@pytest.mark.parametrize("m", [1, 24])
def test_bfloat16_autocast_is_near_the_float32_gradient(m):
    model, x, y = CASES[1].make(torch.float32)
    model.eval()
    expected = m_sam_loop(copy.deepcopy(model).double(), x.double(), y, m, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        m_sam_gradient(model, x, y, m=m, rho=0.1)
    assert all(g.dtype == torch.float32 for g in grads(model))
    assert close([g.double() for g in grads(model)], expected, 0.1)


def test_a_scaler_multiplies_the_gradient():
    model, x, y = CASES[0].make(torch.float32)
    x = x.float()
    m_sam_gradient(model, x, y, m=1)
    expected = [8.0 * g for g in grads(model)]
    model.zero_grad()
    m_sam_gradient(model, x, y, m=1, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    assert close(grads(model), expected, 1e-6)


@pytest.mark.parametrize("m", [1, 24])
def test_a_diverged_loss_is_an_error_and_leaves_gradients_alone(m):
    model, x, y = CASES[0].make()
    x[5] = math.nan
    with pytest.raises(ModelError, match="diverged"):
        m_sam_gradient(model, x, y, m=m)
    assert all(g is None for g in grads(model))


def test_batchnorm_refuses_groups_without_statistics_and_names_the_remedy():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    x, y = torch.randn(7, 4), torch.arange(7) % 3
    for m in (1, 3):  # with 3, the last group has one example
        with pytest.raises(ModelError, match="eval mode"):
            m_sam_gradient(model, x, y, m=m)
    assert model[1].track_running_stats and model[1].momentum == 0.1
    assert not model[1]._forward_pre_hooks and not model[1]._forward_hooks


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rho": -0.1}, ArgumentError, "at least 0"),
        ({"rho": math.nan}, ArgumentError, "at least 0"),
        ({"rho": "big"}, ArgumentError, "number"),
        ({"m": 0}, ArgumentError, "whole number"),
        ({"m": True}, ArgumentError, "whole number"),
        ({"m": 2.0}, ArgumentError, "whole number"),
        ({"engine": "fast"}, ArgumentError, "engine"),
        ({"loss": "hinge"}, ArgumentError, "unknown loss"),
        ({"labels": torch.full((24,), 3)}, DataError, "expected labels in"),
        ({"labels": torch.zeros(23, dtype=torch.int64)}, DataError, "differ in length"),
        ({"inputs": torch.zeros(0, 40), "labels": torch.zeros(0)}, DataError, "no examples"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    model, x, y = CASES[0].make(torch.float32)
    arguments = {"inputs": x.float(), "labels": y, "m": 4, **change}
    inputs, labels = arguments.pop("inputs"), arguments.pop("labels")
    with pytest.raises(error, match=message):
        m_sam_gradient(model, inputs, labels, **arguments)


def test_a_loss_per_example_or_outputs_of_another_length_are_refused():
    model, x, y = CASES[0].make()
    with pytest.raises(ArgumentError, match='use reduction="mean"'):
        m_sam_gradient(model, x, y, m=4, loss=nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ModelError, match="must be a scalar"):
        m_sam_gradient(model, x, y, m=4, loss=lambda o, y: o.sum(1))
    flat = nn.Sequential(model, nn.Flatten(0))
    with pytest.raises(ModelError, match="one row of outputs per example"):
        m_sam_gradient(flat, x, y, m=4)


def test_a_model_without_trainable_parameters_is_refused():
    model, x, y = CASES[0].make()
    with pytest.raises(ArgumentError, match="requires gradients"):
        m_sam_gradient(model.requires_grad_(False), x, y, m=1)
