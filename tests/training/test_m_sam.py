"""The vectorised m-SAM gradient against a plain loop over groups."""

from __future__ import annotations

import copy
import importlib
import math

import pytest
import torch
from cases import CASES
from sam_reference import close, m_sam_loop
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sharpkit.contract.losses import resolve_loss
from sharpkit.errors import ArgumentError, DataError, ModelError
from sharpkit.groupwise import pooling
from sharpkit.training import (
    build_architecture,
    group_passes,
    group_step,
    m_sam_gradient,
    step_plan,
)

m_sam = importlib.import_module("sharpkit.training.m_sam")


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
    formed, original = [], group_passes._At

    class Recorded(original):
        @staticmethod
        def backward(ctx, *grads):
            formed.extend(tuple(g.shape) for g in grads if g is not None)
            return original.backward(ctx, *grads)

    monkeypatch.setattr(group_passes, "_At", Recorded)
    model, x, y = CASES[1].make()
    m_sam_gradient(model.eval(), x, y, m=1, rho=0.2)
    (plan,) = step_plan._PLANS[model].values()
    assert plan.one_batch and plan.groups >= 24
    assert set(plan.factored) == {"6.weight", "8.weight"}  # perturbed by factors
    # BatchNorm's weight and bias, of two groups that are compared with a loop, and of all
    assert formed == [(2, 6), (2, 6), (24, 6), (24, 6)]


def test_the_answer_does_not_depend_on_the_chunk(monkeypatch):
    model, x, y = CASES[1].make()
    model.eval()
    found = []
    for groups in (1, 2, 5, 24):
        monkeypatch.setattr(step_plan, "_groups_at_a_time", lambda *a, g=groups: g)
        step_plan._PLANS.clear()
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
    model, x, y = Loopy().double(), torch.randn(8, 4).double(), torch.arange(8) % 3
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
    assert plan_of(model).one_batch
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


# --- groups as one batch --------------------------------------------------------------------------


def plan_of(model: nn.Module) -> step_plan.StepPlan:
    return list(step_plan._PLANS[model].values())[-1]


class Text(nn.Module):
    """Words, a recurrent layer, and a class token that every example has."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.read = nn.Embedding(7, 5), nn.LSTM(5, 6, batch_first=True)
        self.first = nn.Parameter(torch.randn(1, 1, 5))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.first.expand(len(x), -1, -1), self.words(x)], 1)
        return self.head(self.norm(self.read(x)[0]).mean(1))


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("adaptive", [False, True])
def test_recurrent_layers_and_tokens_run_as_one_batch(m, adaptive):
    torch.manual_seed(0)
    model, x, y = Text().double(), torch.randint(0, 7, (12, 4)), torch.arange(12) % 3
    m_sam_gradient(model, x, y, m=m, rho=0.2, adaptive=adaptive)
    assert close(grads(model), m_sam_loop(model, x, y, m, 0.2, adaptive), 1e-12)
    assert plan_of(model).one_batch and plan_of(model).groups > 1


@pytest.mark.parametrize(("n", "alone"), [(35, 3), (64, 0), (70, 1)])
def test_a_few_larger_groups_run_one_after_the_other(n, alone, monkeypatch):
    torch.manual_seed(0)
    model, x, y = CASES[0].make()
    x, y = x.repeat(3, 1)[:n], y.repeat(3)[:n]
    m_sam_gradient(model, x[:32], y[:32], m=16, rho=0.2)  # compares both ways first
    model.zero_grad()
    original, taken = group_passes.Alone._group, []

    def group(self, examples, leaves):
        taken.append(len(examples))
        return original(self, examples, leaves)

    m_sam_gradient(model, x[:64], y[:64], m=16, rho=0.2)
    model.zero_grad()
    monkeypatch.setattr(group_passes.Alone, "_group", group)
    m_sam_gradient(model, x, y, m=16, rho=0.2)
    assert len(taken) == alone
    assert close(grads(model), m_sam_loop(model, x, y, 16, 0.2), 1e-12)


class Places(Text):
    """Attention over words and their places, with a slope that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.slope = nn.Embedding(9, 5), nn.PReLU()
        self.mix = nn.TransformerEncoderLayer(5, 1, 7, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        placed = self.words(x) + self.places(torch.arange(x.shape[1])) + self.first[0, 0]
        return super().forward(x) + self.mix(self.slope(placed)).mean(1)[:, :3]


@pytest.mark.parametrize("m", [1, 3, 4])
@pytest.mark.parametrize("adaptive", [False, True])
def test_attention_and_places_run_as_one_batch(m, adaptive):
    """As many places as examples in a chunk."""
    torch.manual_seed(0)
    model, x, y = Places().double(), torch.randint(0, 7, (8 * m, 8)), torch.arange(8 * m) % 3
    m_sam_gradient(model, x, y, m=m, rho=0.2, adaptive=adaptive)
    assert close(grads(model), m_sam_loop(model, x, y, m, 0.2, adaptive), 1e-11)
    assert plan_of(model).one_batch and plan_of(model).groups > 1


class Scaled(nn.Module):
    """A weight is multiplied by another one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(40, 3), nn.Parameter(torch.ones(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.weight * self.scale, self.layer.bias)


def test_groups_under_vmap_are_compared_with_a_loop_once(monkeypatch):
    """The first step finds out whether they may be trusted, and later ones believe it."""
    torch.manual_seed(0)
    model, x, y = Scaled().double(), torch.randn(24, 40).double(), torch.arange(24) % 3
    original, taken = group_passes.Alone._group, []

    def group(self, examples, leaves):
        taken.append(len(examples))
        return original(self, examples, leaves)

    monkeypatch.setattr(group_passes.Alone, "_group", group)
    counts = []
    for _ in range(3):
        model.zero_grad()
        m_sam_gradient(model, x, y, m=3, rho=0.2)
        counts.append(len(taken))
        assert close(grads(model), m_sam_loop(model, x, y, 3, 0.2), 1e-12)
    assert not plan_of(model).one_batch and counts == [4, 4, 4]


class Reviews(nn.Module):
    """Of the words of a sequence a few are common; one of them is padding."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.words = nn.Embedding(400, 6, **options)
        self.read, self.head = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(self.words(x))[0].mean(1))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"sparse": True}])
@pytest.mark.parametrize(("m", "dtype"), [(1, torch.int64), (2, torch.int32)])
def test_perturbations_of_tables_stay_in_factors(m, dtype, options):
    torch.manual_seed(0)
    model, x, y = Reviews(**options).double(), torch.randint(0, 9, (13, 7)), torch.arange(13) % 3
    x = x.to(dtype)
    plain = Reviews(**{**options, "sparse": False}).double()
    plain.load_state_dict(model.state_dict())
    m_sam_gradient(model, x, y, m=m, rho=0.2)
    assert "words.weight" in plan_of(model).factored and plan_of(model).one_batch
    assert close(grads(model), m_sam_loop(plain, x, y, m, 0.2), 1e-12)


def test_perturbations_of_convolutions_may_stay_in_factors():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 32, 3, padding=1), nn.Tanh(), nn.Conv2d(32, 32, 3, stride=2), nn.Flatten(),
        nn.Linear(128, 3),
    ).double()  # fmt: skip
    x, y = torch.randn(6, 2, 5, 5).double(), torch.arange(6) % 3
    for m in (1, 2):
        model.zero_grad()
        m_sam_gradient(model, x, y, m=m, rho=0.2)
        assert "2.weight" in plan_of(model).factored and plan_of(model).one_batch
        assert close(grads(model), m_sam_loop(model, x, y, m, 0.2), 1e-12)


@pytest.mark.parametrize("affine", [True, False])
def test_batchnorm_keeps_groups_apart_whether_or_not_it_has_weights(affine):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5, affine=affine), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    if affine:
        model[1].weight.requires_grad_(False)
    x, y = torch.randn(12, 4).double() * torch.arange(1, 13).view(-1, 1), torch.arange(12) % 3
    expected = m_sam_loop(nn.Sequential(*model), x, y, 3, 0.2) if not affine else None
    m_sam_gradient(model, x, y, m=3, rho=0.2)
    assert plan_of(model).one_batch
    if affine:
        found = grads(model)
        model.zero_grad()
        m_sam_gradient(model, x, y, m=3, rho=0.2, engine="loop")
        expected = [torch.zeros(()) if g is None else g for g in grads(model)]
        assert close(found, expected, 1e-12)
    else:
        assert close(grads(model), expected, 1e-12)


class Mixing(nn.Module):
    """Looks at the mean over the batch, ever so little."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share, self.first, self.head = share, nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head(x - self.share * x.mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [1.0, 1e-3])
def test_examples_that_see_the_batch_see_their_group_alone(share, dtype):
    torch.manual_seed(0)
    model, x, y = Mixing(share).to(dtype), torch.randn(12, 4).to(dtype), torch.arange(12) % 3
    m_sam_gradient(model, x, y, m=3, rho=0.2)
    assert not plan_of(model).one_batch
    reference, exact = copy.deepcopy(model).double(), 1e-12 if dtype == torch.float64 else 1e-5
    expected = m_sam_loop(reference, x.double(), y, 3, 0.2)
    assert close([g.double() for g in grads(model)], expected, exact)


class OneDraw(nn.Module):
    """Scales a whole batch by one random number, as stochastic depth of a batch does."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * (0.5 + torch.rand((1, 1), dtype=x.dtype))


def test_a_number_drawn_for_a_batch_is_drawn_for_every_group():
    torch.manual_seed(0)
    model, x, y = OneDraw().double(), torch.randn(6, 4).double(), torch.arange(6) % 3
    m_sam_gradient(model, x, y, m=2, rho=0.2)
    assert not plan_of(model).one_batch
    model.zero_grad()
    torch.manual_seed(1)
    m_sam_gradient(model, x, y, m=2, rho=0.2)
    torch.manual_seed(1)
    scales = 0.5 + torch.rand(3, dtype=x.dtype)
    plain = nn.Linear(4, 3).double()
    plain.load_state_dict(model.head.state_dict())
    total = [torch.zeros_like(p) for p in plain.parameters()]
    for i, scale in enumerate(scales):
        part = slice(2 * i, 2 * i + 2)
        found = m_sam_loop(
            plain, x[part], y[part], 2, 0.2, loss=lambda z, t, s=scale: F.cross_entropy(s * z, t)
        )
        total = [a + g / 3 for a, g in zip(total, found, strict=True)]
    assert close(grads(model), total, 1e-12)


def test_a_loss_that_sees_the_weights_sees_those_of_its_group():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(6, 4).double(), torch.arange(6) % 3

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels) + 1e-3 * model.weight.square().sum()

    m_sam_gradient(model, x, y, m=2, rho=0.2, loss=loss)
    assert not plan_of(model).one_batch
    found, total = grads(model), [torch.zeros_like(p) for p in model.parameters()]
    for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
        w = [p.detach().clone().requires_grad_() for p in model.parameters()]
        at = w
        for _ in range(2):
            value = F.cross_entropy(F.linear(x[part], *at), y[part]) + 1e-3 * at[0].square().sum()
            g = torch.autograd.grad(value, at)
            norm = torch.cat([t.flatten() for t in g]).norm()
            at = [(p + 0.2 * t / norm).detach().requires_grad_() for p, t in zip(w, g, strict=True)]
        total = [a + t / 3 for a, t in zip(total, g, strict=True)]
    assert close(found, total, 1e-12)


def test_a_weight_used_otherwise_than_before_gives_no_wrong_number():
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.late = nn.Linear(4, 3), False

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + (x @ self.head.weight.T if self.late else 0.0)

    torch.manual_seed(0)
    model, x, y = Later().double(), torch.randn(8, 4).double(), torch.arange(8) % 3
    for model.late in (False, True):
        model.zero_grad()
        m_sam_gradient(model, x, y, m=2, rho=0.2)
        assert close(grads(model), m_sam_loop(model, x, y, 2, 0.2), 1e-12)
        assert plan_of(model).one_batch is not model.late


@pytest.mark.parametrize("m", [1, 24])
@pytest.mark.parametrize("gain", [1e-22, 1e22])
def test_gradients_whose_squares_leave_float32_keep_their_direction(m, gain):
    """The gain is behind the loss's slope, which is scaled: a layer takes it away again."""

    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(40, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) * gain

    torch.manual_seed(0)
    model, (_, x, y) = Gain(), CASES[0].make()
    with torch.no_grad():
        for p in model.parameters():
            p.div_(gain)
    m_sam_gradient(model, x.float(), y, m=m, rho=0.1 / gain)
    expected = m_sam_loop(copy.deepcopy(model).double(), x.float().double(), y, m, 0.1 / gain)
    found = [g.double() for g in grads(model)]
    assert close([g / gain for g in found], [g / gain for g in expected], 1e-4)
    assert plan_of(model).careful


@pytest.mark.parametrize("m", [1, 4])
def test_large_losses_are_differentiated_as_one_batch(m):
    model, x, y = CASES[0].make()
    with torch.no_grad():
        model[4].weight.mul_(500.0)  # cross-entropies from 1e-30 to several hundreds
    single = copy.deepcopy(model).float()
    m_sam_gradient(single, x.float(), y, m=m, rho=1e-3)
    assert plan_of(single).one_batch
    expected = m_sam_loop(model, x.float().double(), y, m, 1e-3)
    assert close([g.double() for g in grads(single)], expected, 2e-3)


@pytest.mark.parametrize("m", [1, 4, 16, 24])
def test_the_same_seed_gives_the_same_bits(m):
    found = []
    for _ in range(2):
        model, x, y = CASES[1].make(torch.float32)
        torch.manual_seed(7)
        m_sam_gradient(model.train(), x.float(), y, m=m, rho=0.1)
        found.append(grads(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_lie_in_memory_as_their_parameters_do():
    model, x, y = CASES[1].make(torch.float32)
    for net in (model.eval(), copy.deepcopy(model).to(memory_format=torch.channels_last)):
        m_sam_gradient(net, x.float(), y, m=24)
        assert plan_of(net).layout is torch.channels_last
        assert all(p.grad.stride() == p.stride() for p in net.parameters())


class Calls(TorchDispatchMode):
    """Counts what a device is given to do, and what has to be known on the host."""

    VIEWS = (
        "alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split",
        "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
        "_unsafe_view", "empty", "new_empty", "empty_like", "empty_strided",
    )  # fmt: skip
    WAITS = ("_local_scalar_dense", "equal", "allclose", "masked_select", "nonzero", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.work = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        self.work += name not in self.VIEWS
        masked = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.waits += name in self.WAITS or masked
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("engine", ["auto", "vectorized", "loop"])
@pytest.mark.parametrize("m", [1, 12, 24])
def test_the_host_waits_as_often_for_many_groups_as_for_few(engine, m, monkeypatch):
    monkeypatch.setattr(step_plan, "_groups_at_a_time", lambda *a: 1 if m == 24 else 2)
    waits = []
    for repeats in (4, 8):
        model, x, y = CASES[1].make(torch.float32)
        x, y = x.float().repeat(repeats, 1, 1, 1), y.repeat(repeats)
        m_sam_gradient(model, x, y, m=m, engine=engine)
        with Calls() as calls:
            m_sam_gradient(model, x, y, m=m, engine=engine)
        waits.append(calls.waits)
    assert waits[0] == waits[1]


def plain_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(1568, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def resnet20() -> nn.Module:
    return build_architecture("resnet20", (3, 32, 32), 10, seed=0)


@pytest.mark.parametrize(
    ("make", "shape", "most"),
    [(plain_cnn, (1, 28, 28), 4), (resnet20, (3, 32, 32), 8)],
    ids=["CNN", "ResNet-20"],
)
def test_a_step_gives_a_gpu_few_calls(make, shape, most, monkeypatch):
    """All groups of a batch in one chunk, in calls of a plain gradient; a GPU waits for calls."""
    monkeypatch.setattr(pooling, "is_plain", lambda *a, **k: False)  # which only a CPU does
    monkeypatch.setattr(step_plan, "_groups_at_a_time", lambda *a: 32)
    torch.manual_seed(0)
    model, x, y = make().eval(), torch.randn(32, *shape), torch.arange(32) % 10
    m_sam_gradient(model, x, y, m=1)
    assert plan_of(model).one_batch
    model.zero_grad()
    run, counted = group_step.run, Calls()

    def counting(*args):
        with counted:
            return run(*args)

    monkeypatch.setattr(m_sam, "run", counting)
    m_sam_gradient(model, x, y, m=1)
    with Calls() as plain:
        loss = resolve_loss("cross_entropy")  # exact, which takes more calls than torch's
        torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    assert counted.work <= most * plain.work
