"""Products by finite differences: against exact ones in float64, and against closed forms."""

import copy
import math
import warnings

import pytest
import torch
from curvature_cases import BUILDERS, dense_hessian, make, relative
from test_products import counted
from torch import nn
from torch.nn import functional as F
from torch_layers import BY_DIFFERENCES, LAYERS, LOSSES_BY_DIFFERENCES, Apply, around

from sharpkit.curvature import (
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    frobenius_norm,
    top_eigenvalues,
    trace,
)
from sharpkit.curvature.differences import STEPS, extrapolated, first_step
from sharpkit.errors import ArgumentError, DataError, ModelError

KINDS = [HessianOperator, GaussNewtonOperator, FisherOperator]
BY = {"method": "finite_difference", "progress": False}


def vectors(operator, count, seed=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(operator.shape[0], count, generator=g, dtype=torch.float64).to(
        operator.dtype
    )


def relu_network(n, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5)
    )
    return model.to(dtype), (torch.randn(n, 20).to(dtype), torch.arange(n) % 5)


# --- right ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_products_are_those_of_the_dense_hessian(name):
    model, data = make(name)
    operator = HessianOperator(model, data, chunk=5, **BY)
    v = vectors(operator, 3)
    found, expected = operator @ v, dense_hessian(name, "cross_entropy") @ v
    errors = (found - expected).norm(dim=0)
    assert (errors < 1e-8 * expected.norm(dim=0)).all()
    assert (errors <= torch.tensor(operator.errors)).all()
    assert operator.mode == "finite difference"
    assert operator.kept_bytes == operator.kept_chunks == 0


@pytest.mark.parametrize("kind", [GaussNewtonOperator, FisherOperator])
@pytest.mark.parametrize("name", ["cnn", "shared_weights"])
def test_gauss_newton_and_fisher_need_no_derivative_of_a_derivative_of_the_model(kind, name):
    model, data = make(name)
    operator = kind(model, data, chunk=5, **BY)
    v = vectors(operator, 3)
    found, expected = operator @ v, kind(model, data) @ v
    errors = (found - expected).norm(dim=0)
    assert (errors < 1e-8 * expected.norm(dim=0)).all()
    assert (errors <= torch.tensor(operator.errors)).all()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_a_quadratic_is_exact_but_for_rounding(kind, dtype, most):
    torch.manual_seed(0)
    model = nn.Linear(7, 1, bias=False).to(dtype)
    x, y = torch.randn(50, 7).to(dtype), torch.randn(50, 1).to(dtype)
    dense = (x.T.double() @ x.double()) / 50
    operator = kind(model, (x, y), loss="mse", **BY)
    eye = torch.eye(7, dtype=dtype)
    errors = (operator @ eye - dense).norm(dim=0)
    assert errors.max() < most * dense.norm()
    assert (errors <= 2 * torch.tensor(operator.errors)).all()
    assert max(operator.errors) < 10 * most * dense.norm()


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e20])
def test_the_length_of_a_vector_does_not_matter(scale):
    model, data = make("mlp", dtype=torch.float32)
    operator = HessianOperator(model, data, **BY)
    v = vectors(operator, 1)
    one, scaled = operator @ v, operator @ (scale * v)
    assert torch.allclose(scaled, scale * one, rtol=1e-3, atol=scale * 1e-4)


def test_weights_of_zero_and_vectors_with_one_entry():
    model = nn.Linear(3, 2, dtype=torch.float64)
    for p in model.parameters():
        nn.init.zeros_(p)
    data = torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 2
    found = HessianOperator(model, data, **BY).to_dense()
    assert relative(found, HessianOperator(model, data).to_dense()) < 1e-8


def test_complex_weights_selections_chunks_and_compile():
    class Fourier(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.randn(3).double())
            self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.cdouble))

        def forward(self, x):
            return (torch.fft.rfft(x) @ self.weight).abs() + self.bias

    torch.manual_seed(0)
    model, data = Fourier(), (torch.randn(20, 5).double(), torch.arange(20) % 3)
    exact = HessianOperator(model, data).to_dense()
    assert relative(HessianOperator(model, data, chunk=7, **BY).to_dense(), exact) < 1e-8
    with pytest.warns(UserWarning, match="compile=True has no effect: .* differences"):
        block = HessianOperator(model, data, parameters="weight", compile=True, **BY)
    assert relative(block.to_dense(), exact[3:, 3:]) < 1e-8


def test_a_copy_of_the_model_where_it_cannot_be_held():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 3)
            self.own = [self.inner.weight]

        def forward(self, x):
            return torch.tanh(F.linear(x, self.own[0], self.inner.bias))

    torch.manual_seed(0)
    model, data = Listed().double(), (torch.randn(20, 5).double(), torch.arange(20) % 3)
    for kind in KINDS:
        exact = kind(model, data).to_dense()
        assert relative(kind(model, data, **BY).to_dense(), exact) < 1e-8


class Words(nn.Module):
    """Embedded tokens, averaged; the padding row is not zero."""

    def __init__(self, tied=False, **options):
        super().__init__()
        self.table = nn.Embedding(20, 8, **options)
        self.head = nn.Linear(8, 3)
        self.tied = tied
        with torch.no_grad():
            self.table.weight[0] = 1.0

    def forward(self, tokens):
        x = torch.tanh(self.table(tokens)).mean(1)
        return (x @ self.table.weight.T)[:, :3] if self.tied else self.head(x)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_rows_do_not_move_and_batches_may_differ_in_length(kind):
    torch.manual_seed(0)
    model = Words(padding_idx=0).double()
    data = [(torch.randint(0, 20, (7, k)), torch.arange(7) % 3) for k in (3, 5, 9)]
    operator, exact = kind(model, data, **BY), kind(model, data)
    v = vectors(operator, 3)
    assert relative(operator @ v, exact @ v) < 1e-8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 1.0}, "rows of 'table.weight' are scaled to max_norm"),
        ({"padding_idx": 0, "tied": True}, "not symmetric|padding in one place"),
    ],
)
def test_weights_that_differences_cannot_move_are_refused(options, message):
    torch.manual_seed(0)
    data = torch.randint(0, 20, (12, 5)), torch.arange(12) % 3
    with pytest.raises(ModelError, match=message):
        HessianOperator(Words(**options).double(), data, **BY)


# --- how good ---------------------------------------------------------------------------------


def test_the_estimate_is_more_than_the_error_of_noise_jumps_kinks_and_curves():
    h, g = 1e-2, torch.Generator().manual_seed(0)
    offsets = torch.linspace(-1.97, 1.97, 70, dtype=torch.float64) * h
    cases = {
        "jump": lambda t: 2.0 * (t > offsets).double(),
        "kink": lambda t: 2.0 * (t - offsets).clamp(min=0) * 1.0,
        "curve": lambda t: torch.sin(20 * offsets / h + 9 * t),
        "noise": lambda t: torch.randn(70, generator=g, dtype=torch.float64),
    }
    slopes = {"kink": 2.0 * (offsets < 0), "curve": 9 * torch.cos(20 * offsets / h)}
    for name, f in cases.items():
        values = [[f(place * h)] for place in STEPS]
        (found,), (fourth,), (change,) = extrapolated(values, [f(0.0)], h)
        error, estimate = found - slopes.get(name, 0.0), torch.hypot(fourth, change)
        if name == "noise":  # of many numbers together
            error, estimate = error.norm(), estimate.norm()
        assert (error.abs() <= 1.001 * estimate).all(), name


def test_the_first_step_moves_weights_by_their_size():
    w = [torch.full((4, 25), 2.0), torch.zeros(10)]
    ones = [torch.ones(4, 25), torch.zeros(10)]
    third = torch.finfo(torch.float32).eps ** (1 / 3)
    assert first_step(w, ones) == pytest.approx(2 * third, rel=1e-6)
    assert first_step(w, [t * 8 for t in ones]) == pytest.approx(third / 4, rel=1e-6)
    biases = [torch.zeros(4, 25), torch.ones(10)]  # a tenth of the largest scale
    assert first_step(w, biases) == pytest.approx(0.2 * third, rel=1e-6)
    spike = [torch.zeros(4, 25), torch.zeros(10)]
    spike[0][0, 0] = 1.0
    assert first_step(w, spike) == pytest.approx(20 * third, rel=1e-6)


class Bend(nn.Module):
    """w² / 2 at w = 1; one of 40 examples adds a ReLU that switches at w = 1 + distance."""

    def __init__(self, distance):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.distance = distance

    def forward(self, x):
        return self.w.square() / 2 + x * torch.relu(self.w - 1 - self.distance)


def mean_of_outputs(outputs, labels):
    return outputs.mean()


def test_steps_shrink_until_a_kink_is_outside_or_the_product_is_refused():
    data = torch.zeros(40, 1, dtype=torch.float64), torch.arange(40) % 4
    data[0][20] = 100.0
    v = torch.ones(1, dtype=torch.float64)
    how = {"loss": mean_of_outputs, **BY}
    for distance in (1.0, 1e-7):
        operator = HessianOperator(Bend(distance), data, tolerance=1e-4, **how)
        assert abs(float(operator @ v) - 1.0) <= operator.errors[0] < 1e-4
    with pytest.raises(ModelError, match=r"estimated as .* and the tolerance is 0.0001 .*kinks"):
        HessianOperator(Bend(1e-13), data, tolerance=1e-4, **how)
    # the exact product does not see the kink
    exact = HessianOperator(Bend(1e-13), data, loss=mean_of_outputs, method="exact")
    assert float(exact @ v) == 1.0


def test_many_kinks_in_float32_are_refused_with_both_numbers_and_the_way_out():
    model, data = relu_network(300, torch.float32)
    with pytest.raises(ModelError, match=r"estimated as 0\.\d+ .* tolerance is 0.01.*double\(\)"):
        HessianOperator(model, data, **BY)
    loose = HessianOperator(model, data, tolerance=0.6, **BY)
    v = vectors(loose, 4)
    exact = HessianOperator(model, data) @ v
    errors = (loose @ v - exact).norm(dim=0)
    assert (errors <= torch.tensor(loose.errors)).all()
    assert (errors > 0.01 * exact.norm(dim=0)).any()  # the average over kinks is another matrix
    GaussNewtonOperator(model, data, **BY)  # kinks of the outputs hardly matter
    model, data = relu_network(300, torch.float64)
    assert relative(HessianOperator(model, data, **BY) @ v.double(), exact.double()) < 1e-4


def test_results_state_the_error_of_their_products():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    data = 3 * torch.randn(40, 4), torch.arange(40) % 3
    operator = HessianOperator(model, data, **BY)
    data = data[0].double(), data[1]
    exact = HessianOperator(model.double(), data)
    expected, found = top_eigenvalues(exact, 2), top_eigenvalues(operator, 2)
    assert found.converged
    assert (abs(found.values - expected.values) <= found.residual_norms).all()
    assert (found.residual_norms >= operator.product_error).all()
    assert 0 < operator.product_error < 0.01 * expected.values[0]
    everything = trace(operator, products=operator.shape[0])
    truth = float(exact.to_dense().trace())
    assert everything.method == "exact"
    assert abs(everything.value - truth) <= everything.std_error < 0.05 * truth
    norm = frobenius_norm(operator, products=operator.shape[0])
    assert abs(norm.value - float(exact.to_dense().norm())) <= norm.std_error
    assert exact.product_error == 0.0
    assert exact.errors == ()


# --- behaviour --------------------------------------------------------------------------------


def test_the_model_keeps_its_bits_and_products_do_not_depend_on_others():
    model, data = make("batchnorm", dtype=torch.float32)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = copy.deepcopy(model.state_dict())
    operator = HessianOperator(model, data, tolerance=0.9, **BY)
    v = vectors(operator, 3)
    together = operator @ v
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    again = HessianOperator(model, data, tolerance=0.9, **BY)
    for i in (2, 0, 1):
        assert torch.equal(again @ v[:, i], together[:, i])


def test_a_product_costs_four_gradients_and_waits_as_often_for_any_depth(monkeypatch):
    monkeypatch.setattr("sharpkit.curvature.chunks.checksum", lambda examples: 0)
    waits = []
    for depth in (1, 6):
        layers = [m for _ in range(depth) for m in (nn.Linear(8, 8), nn.Tanh())]
        torch.manual_seed(0)
        model = nn.Sequential(*layers, nn.Linear(8, 3)).double()
        data = torch.randn(12, 8).double(), torch.arange(12) % 3
        operator = HessianOperator(model, data, chunk=12, **BY)
        v = vectors(operator, 1)
        calls = []
        with model[0].register_forward_hook(lambda *_, calls=calls: calls.append(1)):
            operator @ v
        assert len(calls) == 5  # one forward pass looks whether the model is the same
        waits.append(counted(lambda operator=operator, v=v: operator @ v).waits)
    assert waits[0] == waits[1]


def test_changed_data_and_changed_models_are_noticed():
    model, (x, y) = make("mlp")
    operator = HessianOperator(model, (x, y), **BY)
    v = vectors(operator, 1)
    x[0] += 1
    with pytest.raises(DataError, match="have changed"):
        operator @ v
    x[0] -= 1
    model, (x, y) = make("mlp")
    operator = HessianOperator(model, (x, y), **BY)
    model[1].forward = torch.sin
    with pytest.raises(ModelError, match="computes something else"):
        operator @ v


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BY_DIFFERENCES)
def test_differences_step_in_with_one_warning_that_names_the_cause(name, kind):
    layer, said = BY_DIFFERENCES[name]
    model, data = around(layer)
    with pytest.warns(UserWarning, match=f"using finite differences.*{said}") as caught:
        operator = kind(model, data)
        operator @ vectors(operator, 2)
    assert len([w for w in caught if "finite differences" in str(w.message)]) == 1
    if name == "once_differentiable":
        found = operator.to_dense()
        model.layer = Apply(torch.sin)
        assert relative(found, kind(model, data).to_dense()) < 1e-7


@pytest.mark.parametrize("name", LOSSES_BY_DIFFERENCES)
def test_losses_without_second_derivatives_take_differences(name):
    model, data = around((lambda: nn.Linear(6, 3), (6,)))
    with pytest.warns(UserWarning, match="using finite differences"):
        operator = HessianOperator(model, data, loss=LOSSES_BY_DIFFERENCES[name])
    assert torch.isfinite(operator @ vectors(operator, 1)).all()


def test_bad_arguments_and_vectors_are_refused():
    model, data = make("mlp")
    with pytest.raises(ArgumentError, match=r"method must be one of .*'finite_difference'"):
        HessianOperator(model, data, method="differences")
    for tolerance in (0.0, -1.0, 1.0, math.nan):
        with pytest.raises(ArgumentError, match="tolerance must be between 0 and 1"):
            HessianOperator(model, data, tolerance=tolerance)
    operator = HessianOperator(model, data, **BY)
    with pytest.raises(ArgumentError, match="NaN or infinite"):
        operator @ torch.full((operator.shape[0],), math.nan)


# --- coverage ---------------------------------------------------------------------------------

OTHERS = ("LSTM", "GRU", "LayerNorm", "MultiheadAttention", "EmbeddingBag sum", "GroupNorm")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_estimates_cover_the_error_on_twelve_networks(kind, dtype):
    covered, relatives, total = [], {}, 0
    for name in (*BUILDERS, *OTHERS):
        model, (x, y) = make(name) if name in BUILDERS else around(LAYERS[name])
        model = model.to(dtype)
        x = x.to(dtype) if x.is_floating_point() else x
        operator = kind(model, (x, y), tolerance=0.9, **BY)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exact = kind(
                copy.deepcopy(model).double(), (x.double() if x.is_floating_point() else x, y)
            )
        v = vectors(operator, 20)
        v[:, 19] = operator.gradient
        for column in v.T:
            total += 1
            try:
                found = operator @ column
            except ModelError:
                continue
            expected = exact @ column.double()
            error = float((found.double() - expected).norm())
            covered.append(error <= operator.errors[0])
            relatives.setdefault(name, []).append(operator.errors[0] / float(expected.norm()))
    share = sum(covered) / len(covered)
    assert share >= 0.9, share
    assert len(covered) >= 0.9 * total
    # and they are small where nothing bends
    for name in ("mlp", "shared_weights", "LSTM", "LayerNorm"):
        middle = sorted(relatives[name])[len(relatives[name]) // 2]
        assert middle < (1e-6 if dtype == torch.float64 else 1e-2), name
