"""Models that people run and that once gave wrong numbers or none, each beside a plain loop.

The loop copies the model, assigns weights in place and takes float64 gradients by plain autograd.
"""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sharpkit import HessianOperator, fit, m_sam_gradient, m_sharpness
from sharpkit.errors import DataError, ModelError

RHO = 0.3


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh())
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class Recomputing(torch.autograd.Function):
    """Runs its module again in backward, as networks that save memory by hand do."""

    @staticmethod
    def forward(ctx, module, x, *parameters):
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out = ctx.module(x)
        found = torch.autograd.grad(out, [x, *ctx.module.parameters()], grad)
        return None, *found


class ByHand(Checkpointed):
    def forward(self, x):
        return self.head(Recomputing.apply(self.body, x, *self.body.parameters()))


class Lookup(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table = nn.Embedding(9, 6, **options)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        return self.head(self.table(tokens).tanh().mean(1))


class Fourier(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3, dtype=torch.cdouble))
        self.b = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return (torch.fft.rfft(x) @ self.w).abs() + self.b


class SumOfTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(3, 5))

    def forward(self, x):
        return F.linear(x, self.a + self.b)


class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.t = nn.Linear(5, 3), nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        return self.layer(x) * self.t


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.wide, self.head = nn.ReLU(inplace=True), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        z = self.relu(self.first(x))
        u = self.second(z)
        u += z
        return self.head(self.relu(self.wide(self.relu(u).mean((2, 3)))))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        return self.head(self.layer(packed)[1][0][-1])


class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = x.to(memory_format=torch.channels_last)
        return self.head(self.layer(x).relu().mean((2, 3)))


class Physics(nn.Module):
    def __init__(self, functional):
        super().__init__()
        self.net, self.functional = (
            nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)),
            functional,
        )

    def forward(self, x):
        if self.functional:
            return self.net(x) + torch.func.vmap(torch.func.jacrev(self.net))(x).sum(-1)
        x = x.detach().clone().requires_grad_()
        u = self.net(x)
        return u + torch.autograd.grad(u.sum(), x, create_graph=True)[0][:, :3]


class Merging(nn.Module):
    """An adapter that merges into the base weight in eval mode."""

    def __init__(self):
        super().__init__()
        self.base, self.merged = nn.Linear(5, 3), False
        self.lora_a, self.lora_b = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(3, 2))

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            change = self.lora_b @ self.lora_a
            self.base.weight.data += -change if mode else change
            self.merged = not mode
        return self

    def forward(self, x):
        y = self.base(x)
        return y if self.merged else y + x @ self.lora_a.T @ self.lora_b.T


class Caching(nn.Module):
    """Keeps a bias that it computes from a weight, in eval mode only."""

    def __init__(self):
        super().__init__()
        self.b, self.layer, self.kept = nn.Parameter(torch.randn(4)), nn.Linear(5, 3), {}

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def forward(self, x):
        bias = self.b[[0, 2, 3]]
        if not self.training:
            bias = self.kept.setdefault("bias", bias)
        return self.layer(x) + bias.tanh()


class Listed(nn.Module):
    """Reaches its weight through a list of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.weights = [self.layer.weight]

    def forward(self, x):
        return F.linear(x, self.weights[0], self.layer.bias)


def vectors():
    return torch.randn(12, 5).double()


def images():
    return torch.randn(12, 2, 6, 6).double()


def sequences():
    return torch.randn(12, 6, 4).double()


def tokens():
    found = torch.randint(0, 9, (12, 7))
    found[:, -2:] = 0
    return found


KINDS = {
    "checkpointing": (Checkpointed, vectors),
    "recomputed by hand": (ByHand, vectors),
    "complex weights": (Fourier, lambda: vectors()[:, :4]),
    "one gradient for two": (SumOfTwo, vectors),
    "padding row": (lambda: Lookup(padding_idx=0), tokens),
    "largest norm of rows": (lambda: Lookup(max_norm=1.0), tokens),
    "sparse gradients": (lambda: Lookup(sparse=True), tokens),
    "merging adapter": (Merging, vectors),
    "cache in eval mode": (Caching, vectors),
    "weight in a list": (Listed, vectors),
    "in place after a layer": (InPlace, images),
    "0-dimensional": (Temperature, vectors),
    "GRU": (lambda: Recurrent(nn.GRU), sequences),
    "LSTM": (lambda: Recurrent(nn.LSTM), sequences),
    "memory format": (ChannelsLast, images),
    "packed": (Packed, lambda: (sequences(), torch.tensor([6, 5, 4, 3, 2, 1] * 2))),
    "autograd inside": (lambda: Physics(False), vectors),
    "torch.func inside": (lambda: Physics(True), vectors),
    "data parallel": (lambda: nn.DataParallel(nn.Linear(5, 3)), vectors),
}


def make(kind):
    torch.manual_seed(0)
    build, inputs = KINDS[kind]
    return build().double(), inputs(), torch.randint(0, 3, (12,))


def loop(model, x, y, m):
    """m-sharpness and m-SAM gradient, group by group."""
    model = copy.deepcopy(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]

    def pass_over(part):
        inputs = tuple(t[part] for t in x) if isinstance(x, tuple) else (x[part],)
        loss = F.cross_entropy(model(*inputs), y[part])
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        dense = [
            torch.zeros_like(p) if g is None else g.to_dense()
            for p, g in zip(parameters, found, strict=True)
        ]
        return float(loss.detach()), dense

    increase, total = 0.0, [torch.zeros_like(p) for p in parameters]
    for a in range(0, len(y), m):
        part = slice(a, a + m)
        before, gradient = pass_over(part)
        length = math.sqrt(sum(float(g.abs().square().sum()) for g in gradient))
        for p, g in zip(parameters, gradient, strict=True):
            p.data = p.data + RHO * g / length
        after, gradient = pass_over(part)
        share = len(y[part]) / len(y)
        increase += share * (after - before)
        for t, g, p, w in zip(total, gradient, parameters, start, strict=True):
            t += share * g
            p.data = w.clone()
    return increase, total


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_m_sharpness_is_that_of_the_plain_loop(kind, engine):
    model, x, y = make(kind)
    found = m_sharpness(model, (x, y), m=[1, 4, 12], rho=RHO, seed=None, engine=engine)
    expected = [loop(model, x, y, m)[0] for m in (1, 4, 12)]
    assert found.value == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("m", [1, 4, 12])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_the_m_sam_gradient_is_that_of_the_plain_loop(kind, m):
    model, x, y = make(kind)
    m_sam_gradient(model, x, y, m=m, rho=RHO)
    _, expected = loop(model, x, y, m)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p, g in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
def test_compiled_models_are_measured_as_what_they_compile():
    plain, x, y = make("0-dimensional")
    compiled = torch.compile(copy.deepcopy(plain), backend="eager")
    compiled(x)
    for _ in range(2):
        one, other = (
            m_sharpness(net, (x, y), m=[1, 12], rho=RHO, seed=None) for net in (plain, compiled)
        )
        assert (one.value == other.value).all()
    for net in (plain, compiled):
        m_sam_gradient(net, x, y, m=4, rho=RHO)
    assert torch.equal(plain.t.grad, compiled.t.grad)
    v = torch.ones(19).double()
    products = [HessianOperator(net, (x, y)).matvec(v) for net in (plain, compiled)]
    torch.testing.assert_close(*products)


@pytest.mark.filterwarnings("ignore")
def test_a_step_notices_that_the_forward_pass_uses_weights_otherwise():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(50, 40), nn.Linear(50, 40), nn.Linear(40, 3)
            self.joined = False

        def forward(self, x):
            if self.joined:
                weight = torch.cat([self.a.weight[:2], self.b.weight[2:]])
                return self.head(F.linear(x, weight).tanh())
            return self.head(self.a(x).tanh() + self.b(x).tanh())

    torch.manual_seed(0)
    model, x, y = Changing().double(), torch.randn(12, 50).double(), torch.arange(12) % 3
    m_sam_gradient(model, x, y, m=4, rho=RHO)
    model.joined = True
    model.zero_grad()
    m_sam_gradient(model, x, y, m=4, rho=RHO)
    for p, g in zip(model.parameters(), loop(model, x, y, 4)[1], strict=True):
        torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else p.grad, g)


def test_gradients_of_two_parameters_are_not_one_tensor():
    model, x, y = make("one gradient for two")
    m_sam_gradient(model, x, y, m=4, rho=0.0)
    assert model.a.grad.data_ptr() != model.b.grad.data_ptr()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    norm = torch.cat([model.a.grad, model.b.grad]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_measuring_leaves_an_adapter_as_it_was():
    model, x, y = make("merging adapter")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    m_sharpness(model, (x, y), m=1, rho=RHO)
    assert model.training and not model.merged
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_frozen_parameters_are_left_out_by_every_function():
    model, x, y = make("0-dimensional")
    model.t.requires_grad_(False)
    found = m_sharpness(model, (x, y), m=12, rho=RHO, seed=None)
    assert found.value == pytest.approx(loop(model, x, y, 12)[0], rel=1e-9)
    assert (found.parameters, found.left_out) == (18, ("t",))
    assert HessianOperator(model, (x, y)).shape == (18, 18)
    everything = m_sharpness(model, (x, y), m=12, rho=RHO, seed=None, parameters="*")
    assert everything.value > found.value
    model.requires_grad_(False)
    assert m_sharpness(model, (x, y), m=12, rho=RHO, seed=None).value == everything.value


@pytest.mark.parametrize("chunk", [40, 7, 1])
def test_a_loss_with_class_weights_does_not_depend_on_the_chunk(chunk):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(40, 5).double(), torch.randint(0, 3, (40,)).sort().values
    loss = nn.CrossEntropyLoss(weight=torch.tensor([5.0, 1.0, 0.2]).double())
    parameters = tuple(p.detach() for p in model.parameters())
    names = [name for name, _ in model.named_parameters()]

    def value(*values):
        return loss(torch.func.functional_call(model, dict(zip(names, values, strict=True)), x), y)

    blocks = torch.autograd.functional.hessian(value, parameters)
    rows = [
        torch.cat([b.reshape(p.numel(), -1) for b in row], 1)
        for p, row in zip(parameters, blocks, strict=True)
    ]
    hessian = HessianOperator(model.eval(), (x, y), loss=loss, chunk=chunk)
    torch.testing.assert_close(hessian.to_dense(), torch.cat(rows), rtol=1e-9, atol=1e-11)


def test_shapes_that_would_broadcast_are_refused_with_both_of_them():
    model, data = nn.Linear(5, 1), (torch.randn(8, 5), torch.randn(8))
    for loss in ("mse", nn.MSELoss(), nn.L1Loss(), lambda o, y: (o - y).square().mean()):
        with pytest.raises((DataError, ModelError), match=r"\(8, 1\).*\(8,\)"):
            m_sharpness(model, data, m=1, rho=RHO, loss=loss)
        with pytest.raises((DataError, ModelError), match=r"\(8, 1\).*\(8,\)"):
            HessianOperator(model.eval(), data, loss=loss)


def test_a_regulariser_in_the_loss_is_perturbed_too():
    model, x, y = make("0-dimensional")

    def loss(outputs, labels):
        return F.cross_entropy(outputs, labels) + 0.1 * sum(
            p.square().sum() for p in model.parameters()
        )

    found = m_sharpness(model, (x, y), m=12, rho=RHO, seed=None, loss=loss)
    parameters = list(model.parameters())
    before = loss(model(x), y)
    gradient = torch.autograd.grad(before, parameters)
    length = torch.cat([g.reshape(-1) for g in gradient]).norm()
    with torch.no_grad():
        for p, g in zip(parameters, gradient, strict=True):
            p += RHO * g / length
        after = loss(model(x), y)
    assert found.value == pytest.approx(float(after - before), rel=1e-7)


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.side = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        return {"logits": self.head(x), "aux": self.side(x)} if self.training else self.head(x)


def test_auxiliary_outputs_are_trained_or_refused():
    torch.manual_seed(0)
    model, x, y = Auxiliary().double(), vectors(), torch.arange(12) % 3
    with pytest.raises(ModelError, match="gets the whole output"):
        m_sam_gradient(model, x, y, m=4)
    with pytest.raises(ModelError, match="gets the whole output"):
        fit(model, (x, y), epochs=1, batch_size=4, progress=False)
    model.train()

    def both(outputs, labels):
        return F.cross_entropy(outputs["logits"], labels) + 0.4 * F.cross_entropy(
            outputs["aux"], labels
        )

    m_sam_gradient(model, x, y, m=12, rho=0.0, loss=both)
    expected = torch.autograd.grad(both(model(x), y), list(model.parameters()))
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_buffers_that_a_forward_pass_counts_in_do_not_depend_on_earlier_steps():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.layer(x) * (1 + self.calls)

    torch.manual_seed(0)
    model, x, y = Counting().double(), vectors(), torch.arange(12) % 3
    found = []
    for _ in range(2):
        model.zero_grad()
        m_sam_gradient(model, x, y, m=12, rho=RHO)
        found.append(model.layer.weight.grad.clone())
    assert torch.equal(*found) and model.calls == 0
    values = [m_sharpness(model, (x, y), m=4, rho=RHO, chunk=k).value for k in (1, 4, 12)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-9) and model.calls == 0


def test_data_without_a_label_that_counts_are_refused():
    with pytest.raises(DataError, match="all are ignored"):
        m_sharpness(nn.Linear(5, 3), (torch.randn(4, 5), torch.full((4,), -100)), m=1, rho=RHO)


def test_lazy_modules_are_refused_until_they_have_weights():
    with pytest.raises(ModelError, match="call the model once"):
        m_sharpness(nn.LazyLinear(3), (torch.randn(4, 5), torch.arange(4) % 3), m=1, rho=RHO)


@pytest.mark.filterwarnings("ignore")
def test_batches_of_different_lengths_are_measured_as_they_are():
    torch.manual_seed(0)
    model = Lookup().double()
    lengths = [3, 5, 4]
    batches = [(torch.randint(0, 9, (4, n)), torch.randint(0, 3, (4,))) for n in lengths]
    found = m_sharpness(model, batches, m=4, rho=RHO, seed=None)
    expected = sum(loop(model, x, y, 4)[0] for x, y in batches) / 3
    assert found.value == pytest.approx(expected, rel=1e-9)
    H = HessianOperator(model.eval(), batches)
    dense = [HessianOperator(model, batch).to_dense() for batch in batches]
    torch.testing.assert_close(H.to_dense(), sum(dense) / 3)


def test_an_operation_without_a_batching_rule_is_named_in_the_warning():
    model, x, y = make("packed")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        m_sharpness(model, (x, y), m=1, rho=RHO)
    (text,) = {str(w.message) for w in caught if "one after the other" in str(w.message)}
    assert "slower" in text and "engine='loop'" in text
