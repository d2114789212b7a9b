"""m-sharpness against an independent float64 loop, closed forms, and its own promises."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from cases import CASES, Case
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sharpkit import m_sharpness
from sharpkit.errors import ArgumentError, DataError, ModelError

MS, RHOS = [1, 3, 4, 8, 24], [0.05, 0.3]


def reference(model, x, y, m, rho, names=None):
    """Equation 2 with plain autograd and assignment of weights, in the order of the data."""
    model = copy.deepcopy(model).double().eval()
    x = x.double() if x.is_floating_point() else x
    parameters = [p for n, p in model.named_parameters() if names is None or n in names]
    start_values = [p.detach().clone() for p in parameters]
    total = 0.0
    for start in range(0, len(x), m):
        xs, ys = x[start : start + m], y[start : start + m]
        loss = nn.functional.cross_entropy(model(xs), ys)
        grads = torch.autograd.grad(loss, parameters)
        length = math.sqrt(sum(float((g**2).sum()) for g in grads))
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p += rho * g / length
            total += len(xs) * (float(nn.functional.cross_entropy(model(xs), ys)) - float(loss))
            for p, w in zip(parameters, start_values, strict=True):
                p.copy_(w)
    return total / len(x)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("engine", ["vectorized", "loop"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-3)], ids=str
)
def test_equals_the_float64_loop(case: Case, engine, dtype, tolerance):
    model, x, y = case.make()
    expected = [[reference(model, x, y, m, rho) for rho in RHOS] for m in MS]
    x = x.to(dtype) if x.is_floating_point() else x
    result = m_sharpness(model.to(dtype), (x, y), m=MS, rho=RHOS, seed=None, engine=engine)
    np.testing.assert_allclose(result.value, expected, rtol=tolerance)
    assert result.engine == engine


@pytest.mark.parametrize("chunk", [32, 72])  # two groups of 16 run alone, four side by side
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_groups_of_sixteen_equal_the_loop_alone_and_side_by_side(case: Case, chunk):
    model, x, y = case.make()
    x, y = torch.cat([x, x.flip(0), x]), torch.cat([y, y, y])
    result = m_sharpness(model, (x, y), m=16, rho=0.1, seed=None, chunk=chunk)
    np.testing.assert_allclose(result.value, reference(model, x, y, 16, 0.1), rtol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("n", [24, 23])
def test_does_not_change_with_the_chunk_size(case: Case, n):
    model, x, y = case.make()
    results = [
        m_sharpness(model, (x, y), m=[2, 6, 16], rho=0.1, n=n, chunk=chunk)
        for chunk in (1, 2, 3, 5, 8, 64, "auto")
    ]
    for result in results[1:]:
        for key, values in results[0].group_values.items():
            np.testing.assert_allclose(result.group_values[key], values, rtol=1e-9, atol=1e-13)


OPTIONS = [
    {},
    {"norm": math.inf},
    {"norm": 1.0},
    {"norm": 3.0},
    {"adaptive": True},
    {"adaptive": True, "norm": math.inf},
    {"ascent": "pgd", "steps": 5},
    {"ascent": "pgd", "steps": 4, "norm": math.inf},
    {"ascent": "pgd", "steps": 4, "adaptive": True},
    {"ascent": "apgd", "steps": 6, "restarts": 2},
    {"average": True, "steps": 3},
    {"average": True, "steps": 2, "adaptive": True},
    {"parameters": ["*weight"]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[6]], ids=lambda c: c.name)
def test_both_engines_agree_on_every_option(case: Case, options):
    model, x, y = case.make()
    settings_ = {"m": [1, 4, 10], "rho": RHOS, "seed": 3, **options}
    fast = m_sharpness(model, (x, y), engine="vectorized", chunk=8, **settings_)
    slow = m_sharpness(model, (x, y), engine="loop", **settings_)
    np.testing.assert_allclose(fast.value, slow.value, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(fast.std_error, slow.std_error, rtol=1e-6, atol=1e-12)
    assert list(fast.group_sizes[10]) == [10, 10, 4]


def test_a_single_value_equals_its_place_in_the_grid():
    model, x, y = CASES[1].make()
    grid = m_sharpness(model, (x, y), m=[1, 4, 16], rho=RHOS)
    assert grid.value.shape == grid.std_error.shape == (3, 2)
    single = m_sharpness(model, (x, y), m=4, rho=RHOS[1])
    assert isinstance(single.value, float)
    assert single.value == pytest.approx(grid.value[1, 1], rel=1e-9)
    assert m_sharpness(model, (x, y), m=4, rho=RHOS).value.shape == (2,)
    assert m_sharpness(model, (x, y), m=[4], rho=0.1).value.shape == (1,)
    frame = grid.frame()
    assert list(frame["m"]) == [1, 1, 4, 4, 16, 16]
    assert frame.loc[3, "value"] == grid.value[1, 1]


def linear_loss(outputs, labels):
    return (outputs[:, 0] * labels).mean()


@given(
    x=st.lists(st.floats(-10, 10, width=32), min_size=6, max_size=6),
    rho=st.floats(1e-3, 10),
    scale=st.sampled_from([1.0, 1e-12, 1e-25, 1e-30, 1e12]),
)
@settings(max_examples=60, deadline=None)
def test_closed_form_of_a_linear_loss(x, rho, scale):
    """With loss y (w·x) a group's increase is exactly rho times the norm of its mean gradient."""
    inputs = torch.tensor(x).reshape(3, 2)
    labels = torch.full((3,), scale, dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    result = m_sharpness(
        model, (inputs.double(), labels), m=[1, 3], rho=rho, loss=linear_loss, seed=None
    )
    gradients = inputs.double().numpy() * scale
    by_one = rho * np.linalg.norm(gradients, axis=1)
    np.testing.assert_allclose(result.group_values[1, rho], by_one, rtol=1e-9, atol=1e-300)
    by_three = rho * np.linalg.norm(gradients.mean(0))
    # the group's mean may cancel; then only its rounding is left
    np.testing.assert_allclose(
        result.group_values[3, rho][0], by_three, rtol=1e-6, atol=1e-14 * rho * scale
    )


@pytest.mark.parametrize("size", [1e-18, 1e-25, 1e-30, 1e-38, 1e-42, 1e25])
@pytest.mark.parametrize("engine", ["vectorized", "loop"])
@pytest.mark.parametrize("features", [2, 64])
def test_any_representable_gradient_gives_a_step_of_length_rho(size, engine, features):
    """Tiny inputs and tiny losses: the step stays rho, so the output moves by rho‖x‖."""
    model = nn.Sequential(nn.Linear(features, 32, bias=False), nn.Linear(32, 1, bias=False))
    for layer in model:
        nn.init.constant_(layer.weight, 0.1)
    x, labels = torch.full((4, features), 1.0), torch.full((4,), size)
    step = m_sharpness(model, (x, labels), m=1, rho=0.5, loss=linear_loss, engine=engine, seed=None)
    unit = m_sharpness(
        model, (x, torch.ones(4)), m=1, rho=0.5, loss=linear_loss, engine=engine, seed=None
    )
    # 1e-42 is denormal in float32: the loss itself has two digits left
    tolerance = 1e-2 if size < 1e-37 else 1e-5
    assert step.value / size == pytest.approx(unit.value, rel=tolerance)
    assert step.zero_gradient_groups == {1: 0}


@pytest.mark.parametrize("engine", ["vectorized", "loop"])
def test_tiny_activations_do_not_underflow_the_norm(engine):
    model = nn.Linear(64, 64, bias=False)
    nn.init.zeros_(model.weight)
    x = torch.full((4, 64), 1e-24)
    result = m_sharpness(
        model, (x, torch.ones(4)), m=[1, 2], rho=0.5, loss=linear_loss, engine=engine
    )
    np.testing.assert_allclose(result.value, 0.5 * 8 * 1e-24, rtol=1e-5)


@pytest.mark.parametrize("engine", ["vectorized", "loop"])
def test_exactly_zero_gradients_give_no_step_and_are_counted(engine):
    model = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 1.0], [0.0, 0.0]])
    result = m_sharpness(
        model, (x, torch.ones(4)), m=[1, 2], rho=0.1, loss=linear_loss, seed=None, engine=engine
    )
    assert result.zero_gradient_groups == {1: 2, 2: 0}
    assert result.group_values[1, 0.1][1] == 0.0
    assert np.isfinite(result.value).all()


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("engine", ["vectorized", "loop"])
def test_weights_that_are_not_used_are_flat_directions(engine):
    data = torch.randn(8, 4), torch.randint(0, 3, (8,))
    options = {"m": [1, 8], "rho": 0.1, "engine": engine}
    with pytest.raises(ModelError, match="does not depend on any selected parameter"):
        m_sharpness(Unused(), data, parameters="unused.*", **options)
    model = Unused()
    with pytest.warns(UserWarning, match=r"does not depend on unused\.weight, unused\.bias"):
        both = m_sharpness(model, data, **options)
    used = m_sharpness(model, data, parameters="used.*", **options)
    np.testing.assert_allclose(both.value, used.value, rtol=1e-5)


class Discarded(nn.Module):
    """Tables and layers whose outputs nothing takes, beside one that counts."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(300, 4), nn.Embedding(400, 9)])
        self.layers = nn.ModuleList([nn.Linear(4, 50), nn.Linear(9, 40)])
        self.used, self.head = nn.Embedding(300, 6), nn.Linear(6, 3)

    def forward(self, x):
        for table, layer in zip(self.tables, self.layers, strict=True):
            layer(table(x[:, :2]))
        return self.head(torch.tanh(self.used(x)).sum(1))


@pytest.mark.parametrize("engine", ["vectorized", "loop"])
def test_what_is_looked_up_and_discarded_is_a_flat_direction(engine):
    torch.manual_seed(0)
    model, x, y = Discarded().double(), torch.randint(0, 9, (12, 5)), torch.randint(0, 3, (12,))
    with pytest.warns(UserWarning, match=r"does not depend on tables\.0\.weight"):
        result = m_sharpness(model, (x, y), m=[1, 2], rho=0.1, seed=None, engine=engine)
    names = {"used.weight", "head.weight", "head.bias"}
    expected = [reference(model, x, y, m, 0.1, names) for m in (1, 2)]
    np.testing.assert_allclose(result.value, expected, rtol=1e-6)


def saturated_network():
    """A trained network whose single-example gradient norms span 1e-30 to 1."""
    torch.manual_seed(0)
    x = torch.randn(64, 12)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    model = nn.Sequential(
        nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():  # stretch the margins until most examples are saturated
        margins = model(x)[torch.arange(64), y] - model(x).masked_fill(
            nn.functional.one_hot(y, 3).bool(), -math.inf
        ).amax(1)
        model[-1].weight *= 75 / margins.max()
        model[-1].bias *= 75 / margins.max()
        x[0] = x[1] = x[2] = 0.0  # an undecided example with each label: gradients of order 1
        y[:3] = torch.arange(3)
    return model, x, y


def stable_reference(model, x, y, rho):
    """m = 1 in float64 with the loss written so that saturated examples keep their digits."""
    model = copy.deepcopy(model).double()
    parameters = list(model.parameters())
    values, norms = [], []
    for xi, yi in zip(x.double(), y, strict=True):

        def loss(xi=xi, yi=yi):
            z = model(xi)
            others = torch.cat([z[:yi], z[yi + 1 :]]) - z[yi]
            return torch.log1p(others.exp().sum())

        base = loss()
        grads = torch.autograd.grad(base, parameters)
        length = math.sqrt(sum(float((g**2).sum()) for g in grads))
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p += rho * g / length
            values.append(float(loss() - base))
            for p, g in zip(parameters, grads, strict=True):
                p -= rho * g / length
        norms.append(length)
    return np.array(values), np.array(norms)


@pytest.mark.parametrize("engine", ["vectorized", "loop"])
@pytest.mark.parametrize("rho", [0.05, 0.5, 2.0])
def test_saturated_examples_count_as_in_float64(engine, rho):
    model, x, y = saturated_network()
    expected, norms = stable_reference(model, x, y, rho)
    assert norms.min() < 1e-29
    assert norms.max() > 1e-2
    result = m_sharpness(model, (x, y), m=1, rho=rho, engine=engine, seed=None)
    np.testing.assert_allclose(result.group_values[1, rho], expected, rtol=1e-3, atol=1e-35)
    assert result.value == pytest.approx(expected.mean(), rel=1e-4)
    assert result.zero_gradient_groups == {1: 0}


def test_pgd_is_never_below_one_step_and_never_negative():
    model, x, y = CASES[0].make()
    one = m_sharpness(model, (x, y), m=[1, 6], rho=[0.1, 3.0])
    pgd = m_sharpness(model, (x, y), m=[1, 6], rho=[0.1, 3.0], ascent="pgd", steps=6)
    for key, values in one.group_values.items():
        assert (pgd.group_values[key] >= values - 1e-12).all()
        assert (pgd.group_values[key] >= 0).all()


@pytest.mark.parametrize("zero", [True, False])
def test_adaptive_sharpness_survives_weights_that_are_zero(zero):
    model, x, y = CASES[0].make()
    if zero:
        model[0].weight.data[0, 0] = 0.0
    result = m_sharpness(model, (x, y), m=1, rho=0.1, adaptive=True, ascent="pgd", steps=3)
    assert np.isfinite(result.value)


def test_adaptive_sharpness_ignores_a_rescaling_of_relu_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    data = torch.randn(10, 6).double(), torch.randint(0, 3, (10,))
    before = {a: m_sharpness(model, data, m=2, rho=0.1, adaptive=a).value for a in (True, False)}
    with torch.no_grad():
        model[0].weight *= 7.0
        model[0].bias *= 7.0
        model[2].weight /= 7.0
    after = {a: m_sharpness(model, data, m=2, rho=0.1, adaptive=a).value for a in (True, False)}
    assert after[True] == pytest.approx(before[True], rel=1e-9)
    assert after[False] != pytest.approx(before[False], rel=1e-2)


def test_early_stop_saves_examples_and_does_not_depend_on_the_chunk_size():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = torch.randn(400, 5).double(), torch.randint(0, 3, (400,))
    results = [
        m_sharpness(model, data, m=[1, 4], rho=0.1, tolerance=0.1, chunk=c) for c in (3, 32, 400)
    ]
    assert len({r.n for r in results}) == 1
    assert results[0].n < 400
    assert (results[0].std_error <= 0.1 * results[0].value).all()
    full = m_sharpness(model, data, m=[1, 4], rho=0.1)
    assert np.abs(results[0].value - full.value).max() < 0.3 * full.value.max()


def test_leaves_the_model_as_found():
    model, x, y = CASES[1].make()
    model.train()
    model[0].eval()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    m_sharpness(model, (x, y), m=[1, 8], rho=0.1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert not model[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_leaves_the_model_as_found_after_an_error():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(40, 3)

        calls = 0

        def forward(self, x):
            Breaks.calls += 1
            if Breaks.calls > 5:
                raise ValueError("broken on purpose")
            return self.layer(x)

    model = Breaks().train()
    weight = model.layer.weight.detach().clone()
    with pytest.raises(ValueError, match="broken on purpose"):
        m_sharpness(model, (torch.randn(8, 40), torch.zeros(8).long()), m=1, rho=0.1, chunk=1)
    assert model.training
    assert torch.equal(model.layer.weight, weight)


class Indexed(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], int(self.y[i])


def test_accepts_data_in_every_form_with_the_same_answer():
    model, x, y = CASES[0].make()
    forms = [
        (x, y),
        [x, y],
        TensorDataset(x, y),
        Indexed(x, y),
        DataLoader(TensorDataset(x, y), batch_size=7),
        DataLoader(Indexed(x, y), batch_size=5, shuffle=True),
    ]
    values = [m_sharpness(model, form, m=[1, 4], rho=0.1, n=20).value for form in forms]
    for value in values[1:]:
        np.testing.assert_allclose(value, values[0], rtol=1e-12)


def test_a_shuffling_loader_has_no_order_of_its_own():
    model, x, y = CASES[0].make()
    loader = DataLoader(TensorDataset(x, y), shuffle=True)
    with pytest.raises(DataError, match="shuffles"):
        m_sharpness(model, loader, m=1, rho=0.1, seed=None)


def test_inputs_may_be_a_dict_and_outputs_may_have_logits():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *, pixels, mask):
            return Output(self.inner(pixels * mask))

    model, x, y = CASES[0].make()
    mask = torch.ones_like(x)
    plain = m_sharpness(model, (x, y), m=[1, 4], rho=0.1)
    wrapped = m_sharpness(Wrapped(model), ({"pixels": x, "mask": mask}, y), m=[1, 4], rho=0.1)
    np.testing.assert_allclose(wrapped.value, plain.value, rtol=1e-12)


def test_seeds_change_the_groups_and_nothing_else():
    model, x, y = CASES[0].make()
    first, again, other = (m_sharpness(model, (x, y), m=[1, 4], rho=0.1, seed=s) for s in (0, 0, 1))
    assert np.array_equal(first.value, again.value)
    assert first.value[0] == pytest.approx(other.value[0], rel=1e-12)  # m = 1: the same groups
    assert first.value[1] != other.value[1]


class DataDependent(nn.Module):
    """An early exit that looks at values: no batching rule can exist."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        y = self.layer(x)
        return y * 2 if y.sum().item() > 1e9 else y


class Unbatched(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


class CustomFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return nn.functional.linear(x, Unbatched.apply(self.layer.weight), self.layer.bias)


@pytest.mark.parametrize(
    ("model", "name"), [(DataDependent(), "item"), (CustomFunction(), "autograd.Function")]
)
def test_falls_back_to_the_loop_with_one_warning_that_names_the_operation(model, name):
    data = torch.randn(12, 4), torch.randint(0, 3, (12,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = m_sharpness(model, data, m=[1, 4], rho=0.1)
    assert [name in str(w.message) for w in caught] == [True]
    assert result.engine == "loop"
    with pytest.raises(ModelError, match=name):
        m_sharpness(model, data, m=[1, 4], rho=0.1, engine="vectorized")


BAD_ARGUMENTS = [
    ({"m": 0}, "m must be"),
    ({"m": 2.5}, "m must be"),
    ({"m": 25}, "larger than n = 24"),
    ({"m": []}, "m is empty"),
    ({"m": [4, 4]}, "twice"),
    ({"rho": 0.0}, "rho must be"),
    ({"rho": -1.0}, "rho must be"),
    ({"rho": math.nan}, "rho must be"),
    ({"rho": [0.1, math.inf]}, "rho must be"),
    ({"n": 25}, "expected 1 to 24"),
    ({"n": 0}, "expected 1 to 24"),
    ({"loss": "crossentropy"}, "unknown loss"),
    ({"ascent": "newton"}, "ascent must be"),
    ({"norm": 0.5}, "norm must be"),
    ({"ascent": "pgd", "norm": 3.0}, "norm 2 or infinity"),
    ({"ascent": "pgd", "average": True}, "average"),
    ({"steps": 0}, "steps"),
    ({"chunk": 0}, "chunk"),
    ({"engine": "fast"}, "engine"),
    ({"tolerance": 0.0}, "tolerance"),
    ({"parameters": "nothing.*"}, "no parameter matches"),
    ({"memory_budget": 10}, "memory_budget"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS, ids=str)
def test_refuses_arguments_out_of_range(change, message):
    model, x, y = CASES[0].make()
    with pytest.raises(ArgumentError, match=message):
        m_sharpness(model, (x, y), **{"m": 1, "rho": 0.1, **change})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_refuses_weights_that_are_not_finite(bad):
    model, x, y = CASES[0].make()
    model[2].weight.data[3, 3] = bad
    with pytest.raises(ModelError, match=r"2\.weight.*1 NaN or infinite"):
        m_sharpness(model, (x, y), m=1, rho=0.1)


@pytest.mark.parametrize("engine", ["vectorized", "loop"])
def test_refuses_a_loss_that_is_not_finite(engine):
    model, x, y = CASES[0].make()
    with pytest.raises(ModelError, match="unperturbed"):
        m_sharpness(
            model, (x, y), m=1, rho=0.1, engine=engine, loss=lambda o, y: o.mean() * math.inf
        )
    for options in ({}, {"average": True}):
        with pytest.raises(ModelError, match="perturbed weights"):
            m_sharpness(
                model,
                (x, y),
                m=1,
                rho=1e4,
                engine=engine,
                loss=lambda o, y: o.square().exp().mean(),
                **options,
            )


class SteepAway(torch.autograd.Function):
    """The identity, with a derivative that is NaN away from 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return torch.where(ctx.saved_tensors[0].abs() < 1e-6, grad, math.nan)


@pytest.mark.parametrize("engine", ["vectorized", "loop"])
def test_takes_no_gradient_after_the_last_step(engine):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 2))

        def forward(self, x):
            return SteepAway.apply(x @ self.weight)

    data = torch.eye(3), torch.tensor([0, 1, 0])
    options = {"m": 1, "rho": 0.1, "ascent": "pgd", "engine": engine}
    one = m_sharpness(Model(), data, **options, steps=1)
    assert one.value == pytest.approx(m_sharpness(Model(), data, m=1, rho=0.1).value)
    with pytest.raises(ModelError, match=r"gradient.*NaN"):
        m_sharpness(Model(), data, **options, steps=2)


class NanGradient(nn.Module):
    """Finite outputs, but the derivative of a norm at 0 is NaN."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x):
        h = self.first(x)
        return self.last(h / (h.square().sum(1, keepdim=True).sqrt() + 1e-6))


@pytest.mark.parametrize("engine", ["vectorized", "loop"])
@pytest.mark.parametrize("options", [{}, {"norm": math.inf}, {"norm": 1.0}, {"ascent": "pgd"}])
@pytest.mark.parametrize("m", [1, 8])
def test_a_nan_gradient_is_no_flat_direction(engine, options, m):
    x = torch.randn(8, 3)
    x[:4] = 0
    data = x, torch.tensor([0, 1] * 4)
    with pytest.raises(ModelError, match=r"gradient.*NaN"):
        m_sharpness(NanGradient(), data, m=m, rho=0.1, engine=engine, **options)


def test_refuses_models_that_mix_examples():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    model += nn.Sequential(nn.Flatten(), nn.Linear(144, 2))
    data = torch.randn(8, 1, 8, 8), torch.tensor([0, 1] * 4)
    with pytest.raises(ModelError, match="depend on the others in its batch"):
        m_sharpness(model, data, m=4, rho=0.1)
    single = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ModelError, match="cannot evaluate a single example"):
        m_sharpness(single, (torch.randn(8, 4), torch.zeros(8).long()), m=1, rho=0.1)


def test_refuses_data_that_do_not_fit():
    model, x, y = CASES[0].make()
    with pytest.raises(DataError, match="labels run from 0 to 7"):
        m_sharpness(model, (x, torch.where(y == 2, 7, y)), m=1, rho=0.1)
    with pytest.raises(DataError, match="labels run from -1"):
        m_sharpness(model, (x, y - 1), m=1, rho=0.1)
    with pytest.raises(DataError, match="integer labels"):
        m_sharpness(model, (x, y.double()), m=1, rho=0.1)
    with pytest.raises(DataError, match="differ in length"):
        m_sharpness(model, (x, y[:-1]), m=1, rho=0.1)
    with pytest.raises(DataError, match="no examples"):
        m_sharpness(model, (x[:0], y[:0]), m=1, rho=0.1)
    with pytest.raises(DataError, match="NaN"):
        m_sharpness(model, (x * math.nan, y), m=1, rho=0.1)


def test_refuses_a_loss_that_is_not_a_mean_over_examples():
    model, x, y = CASES[0].make()
    with pytest.raises(ModelError, match="mean over examples"):
        m_sharpness(
            model,
            (x, y),
            m=1,
            rho=0.1,
            loss=lambda o, y: nn.functional.cross_entropy(o, y, reduction="sum"),
        )
    with pytest.raises(ModelError, match="must be a scalar"):
        m_sharpness(
            model,
            (x, y),
            m=1,
            rho=0.1,
            loss=lambda o, y: nn.functional.cross_entropy(o, y, reduction="none"),
        )


class NeverRun(nn.Linear):
    """What was measured would have run this."""

    def forward(self, x):
        raise AssertionError("a forward pass was made")


def test_weights_that_do_not_fit_are_refused_before_a_pass_is_made(monkeypatch):
    model, data = NeverRun(3, 2), (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    monkeypatch.setattr("sharpkit.contract.holding._LARGE", 0)
    monkeypatch.setattr("sharpkit.contract.holding.available_memory", lambda device: 31)
    with pytest.raises(ArgumentError, match=r"a copy of the model's weights.* 0.0 GB on cpu"):
        m_sharpness(model, data, m=1, rho=0.1)
    monkeypatch.setattr("sharpkit.contract.holding.available_memory", lambda device: 32)
    monkeypatch.setattr("sharpkit.curvature.memory.available_memory", lambda device: 63)
    with pytest.raises(ArgumentError, match=r"m-sharpness in 8 parameters .*needs 0.0 MB on cpu"):
        m_sharpness(model, data, m=1, rho=0.1)


def test_a_chunk_that_does_not_fit_is_refused_before_groups_are_measured(monkeypatch):
    model, data = nn.Linear(3, 2), (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    monkeypatch.setattr("sharpkit.curvature.memory.available_memory", lambda device: 100)
    with pytest.raises(ArgumentError, match=r"a chunk of 1024 examples needs .*smaller memory_bud"):
        m_sharpness(model, data, m=1, rho=0.1)
    with pytest.raises(ArgumentError, match=r"one example needs .*pass a larger one if the memory"):
        m_sharpness(model, data, m=1, rho=0.1, memory_budget=10)
