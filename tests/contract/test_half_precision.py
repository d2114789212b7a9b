"""Networks stored in half precision are measured as the float32 network with the same numbers."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import sharpkit as sk
from sharpkit.contract import half_precision
from sharpkit.contract.holding import frozen
from sharpkit.errors import ArgumentError, ModelError
from sharpkit.measures import make_measure, measure_names
from sharpkit.measures.measure import evaluate_measure

KINDS = ["bfloat16", "float16", "mixed"]
DATA = torch.randn(24, 5, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(5, 8), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
    model = nn.Sequential(*layers)
    model(DATA[0])
    return model.eval()


def stored(kind: str) -> nn.Module:
    """With all weights in half precision, or with the norms left in float32."""
    if kind != "mixed":
        return network().to(getattr(torch, kind))
    model = network().bfloat16()
    model[1].float(), model[2].float()
    return model


def pair(kind: str) -> tuple[nn.Module, nn.Module]:
    return stored(kind), stored(kind).float()


def by_kind(test):
    return pytest.mark.parametrize("kind", KINDS)(test)


@by_kind
def test_m_sharpness(kind):
    half, full = (sk.m_sharpness(m, DATA, m=[1, 4], rho=[0.01, 0.1]).value for m in pair(kind))
    np.testing.assert_array_equal(half, full)


@by_kind
@pytest.mark.parametrize(
    "operator", [sk.HessianOperator, sk.GaussNewtonOperator, sk.FisherOperator]
)
@pytest.mark.parametrize("budget", [None, 0])
def test_operators(kind, operator, budget):
    matrices = [operator(m, DATA, memory_budget=budget) for m in pair(kind)]
    vector = torch.ones(matrices[0].shape[0])
    half, full = (matrix.matvec(vector) for matrix in matrices)
    assert half.dtype == torch.float32
    assert torch.equal(half, full)


@pytest.mark.parametrize("name", measure_names())
def test_measures(name):
    measure = make_measure(name)
    options = {"initial": network}
    if getattr(measure, "needs_metrics", False):
        pytest.skip("computed from recorded metrics, not from weights")
    found = []
    for model in pair("mixed"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of three classes, of few examples
                values = evaluate_measure(measure, model, DATA, seed=0, **options)
        except sk.errors.SharpkitError as error:  # such as of a measure for images
            found.append(str(error))
        else:
            found.append({key: (e.value, e.std_error) for key, e in values.items()})
    np.testing.assert_equal(*found)


@by_kind
def test_landscape_and_barrier(kind):
    half, full = (sk.landscape(m, DATA, points=3, progress=False).loss for m in pair(kind))
    np.testing.assert_array_equal(half, full)
    other = network()
    ends = [sk.barrier(m, other, DATA, points=3, progress=False).value for m in pair(kind)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("optimizer", [SGD, torch.optim.AdamW])
def test_tracker(optimizer):
    """With the state of the optimizer in half precision, as it is for such weights."""
    model = stored("bfloat16")
    steps = optimizer(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.25)
    steps.step()
    full = copy.deepcopy(model).float()
    same_steps = optimizer(full.parameters(), lr=0.1)
    same_steps.load_state_dict(steps.state_dict())
    rows = []
    for m, o in ((model, steps), (full, same_steps)):
        names = ["loss", "stability", "trace", "critical_sharpness", "distance"]
        rows.append(sk.Tracker(DATA, measures=names, every=1)(m, o, step=0))
    assert len(rows[0]) > 8
    np.testing.assert_equal(*({k: v for k, v in r.items() if k != "seconds"} for r in rows))


@by_kind
def test_the_model_stays_as_it_was(kind):
    model = stored(kind)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    tensors = [*model.parameters(), *model.buffers()]
    before = [(id(t), t.dtype, t.data_ptr(), t.clone(), t.grad) for t in tensors]
    with pytest.raises(RuntimeError, match="inside"), frozen(model):
        assert {t.dtype for t in model.parameters()} == {torch.float32}
        assert model[4].weight.grad is None
        with torch.no_grad():
            model[0].weight.zero_()
            model[2].running_mean.zero_()
        raise RuntimeError("inside")
    for tensor, (i, dtype, place, value, gradient) in zip(
        [*model.parameters(), *model.buffers()], before, strict=True
    ):
        assert (id(tensor), tensor.dtype, tensor.data_ptr()) == (i, dtype, place)
        assert torch.equal(tensor, value)
        assert tensor.grad is gradient


def test_a_backward_pass_may_follow_a_measurement():
    model, expected = stored("bfloat16"), stored("bfloat16")
    losses = [m(DATA[0].bfloat16()).float().square().mean() for m in (model, expected)]
    sk.m_sharpness(model, DATA, m=4, rho=0.1)
    for loss in losses:
        loss.backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(6, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens):
            return self.head(self.table(tokens).tanh())

    torch.manual_seed(0)
    model = Tied().bfloat16()
    tokens = torch.randint(6, (8, 3)), torch.randint(6, (8, 3))
    values = [
        sk.m_sharpness(m, tokens, m=2, rho=0.1).value for m in (model, copy.deepcopy(model).float())
    ]
    assert values[0] == values[1]
    assert model.head.weight is model.table.weight


def test_too_little_memory_is_told(monkeypatch):
    monkeypatch.setattr(half_precision, "available_memory", lambda device: 100)
    with pytest.raises(ArgumentError, match=r"bfloat16 are measured in float32 .* 0.0 GB is free"):
        sk.m_sharpness(stored("bfloat16"), DATA, m=4, rho=0.1)
    sk.m_sharpness(network(), DATA, m=4, rho=0.1)  # which needs none


def test_a_module_whose_gradients_are_watched_is_refused():
    """DistributedDataParallel hooks what accumulates gradients; a change of dtype drops that."""
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)  # without other processes
    nn.Module.__init__(wrapped)
    wrapped.module = stored("bfloat16")
    with pytest.raises(ArgumentError, match=r"measure a copy, copy.deepcopy\(model.module\)"):
        sk.m_sharpness(wrapped, DATA, m=4, rho=0.1)
    wrapped.module = network()
    assert sk.m_sharpness(wrapped, DATA, m=4, rho=0.1).value > 0


def test_eight_bits_are_refused():
    model = network()
    model.register_buffer("scale", torch.ones(1).to(torch.float8_e4m3fn))
    with pytest.raises(ArgumentError, match=r"'scale' is torch.float8_e4m3fn.*before it was quant"):
        sk.m_sharpness(model, DATA, m=4, rho=0.1)


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x).float()


def test_half_precision_inside_a_model_is_told():
    with pytest.warns(UserWarning, match="Autocast computes in bfloat16 inside its forward pass"):
        sk.m_sharpness(Autocast(), DATA, m=4, rho=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.m_sharpness(stored("bfloat16"), DATA, m=4, rho=0.1)


def test_training_in_half_precision_is_refused():
    for train in (
        lambda m: sk.m_sam_gradient(m, *DATA, m=4, rho=0.1),
        lambda m: sk.fit(m, DATA, epochs=1, batch_size=8, progress=False),
    ):
        with pytest.raises(ArgumentError, match=r"float32 or float64, got bfloat16.*autocast"):
            train(stored("bfloat16"))


def test_adapters_in_float32_beside_half_precision_are_trained():
    model = stored("mixed").requires_grad_(False)
    model[1].requires_grad_(True)  # a norm in float32 before a layer in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        sk.m_sam_gradient(model, *DATA, m=4, rho=0.1)
    assert model[1].weight.grad.dtype == torch.float32


def test_a_sam_step_that_rounding_swallows_is_refused():
    """ε is some 1e-4 for each weight; bfloat16 has no numbers nearer to 1 than 2^-8."""
    weight = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = sk.SAM([weight], SGD, rho=0.003, lr=0.1)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ModelError, match=r"bfloat16 changes the perturbation of SAM by 100%"):
        optimizer.first_step()
    assert torch.equal(weight.data, torch.ones(1000, dtype=torch.bfloat16))
    optimizer.param_groups[0]["rho"] = 4.0  # 0.126 each, 16 of those steps
    optimizer.first_step()
    assert float(weight.data[0]) == 1.125
    optimizer.restore()
