"""Operators against dense matrices that are computed without them."""

import gc
import weakref
from contextlib import nullcontext
from typing import ClassVar

import numpy as np
import pytest
import torch
from curvature_cases import PROBLEMS, N, dense_hessian, jacobian, make, relative
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sharpkit.contract.precision import precision
from sharpkit.curvature import FisherOperator, GaussNewtonOperator, HessianOperator
from sharpkit.curvature.fast_rules import fast_rules


@pytest.mark.parametrize(("name", "loss"), PROBLEMS)
def test_hessian_is_the_dense_hessian(name, loss):
    model, data = make(name, loss)
    expected = dense_hessian(name, loss)
    operator = HessianOperator(model, data, loss=loss, chunk=5)
    assert operator.shape == expected.shape
    assert operator.shape[0] <= 2000
    v = torch.randn(len(expected), 3, dtype=torch.float64)
    assert relative(operator.matmat(v), expected @ v) < 1e-10


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_to_dense_is_the_dense_hessian(name):
    operator = HessianOperator(*make(name))
    assert relative(operator.to_dense(), dense_hessian(name, "cross_entropy")) < 1e-10


@pytest.mark.parametrize(("name", "loss"), PROBLEMS)
def test_gauss_newton_and_fisher_are_built_from_the_jacobian(name, loss):
    model, data = make(name, loss)
    j, outputs, labels = jacobian(name, loss)
    if loss == "cross_entropy":
        p = outputs.softmax(1)
        inner = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        slope = p - F.one_hot(labels, 3)
    else:
        inner = torch.eye(3, dtype=torch.float64).expand(N, 3, 3)
        slope = outputs - labels
    expected = torch.einsum("nap,nab,nbq->pq", j, inner, j) / N
    gradients = torch.einsum("na,nap->np", slope, j)
    v = torch.randn(len(expected), 2, dtype=torch.float64)
    for operator in (
        GaussNewtonOperator(model, data, loss=loss, chunk=6),
        FisherOperator(model, data, loss=loss, chunk=4, memory_budget=0),
    ):
        assert relative(operator.matmat(v), expected @ v) < 1e-10
        assert relative(operator.gradient, gradients.mean(0)) < 1e-10
    empirical = FisherOperator(model, data, kind="empirical", loss=loss, chunk=5)
    assert relative(empirical.matmat(v), gradients.T @ (gradients @ v) / N) < 1e-10


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator, FisherOperator])
@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_chunks_and_budget_change_rounding_only(kind, name):
    model, data = make(name)
    whole = kind(model, data)
    v = torch.randn(whole.shape[0], dtype=torch.float64)
    expected = whole @ v
    per_chunk = kind(model, data, chunk=3).kept_bytes // 6
    for chunk, budget, kept in ((1, None, 17), (3, 0, 0), (3, 2 * per_chunk + 1, 2), (16, None, 2)):
        operator = kind(model, data, chunk=chunk, memory_budget=budget)
        assert operator.kept_chunks == kept
        assert operator.kept_bytes <= (budget if budget is not None else 1e9)
        assert relative(operator @ v, expected) < 1e-12
        operator.close()
        assert (operator.kept_chunks, operator.kept_bytes) == (0, 0)
        assert relative(operator @ v, expected) < 1e-12


def test_loss_and_gradient_come_with_the_operator():
    model, (x, y) = make("mlp")
    operator = HessianOperator(model, (x, y), chunk=4)
    value = F.cross_entropy(model(x), y)
    assert operator.loss == pytest.approx(value.item(), rel=1e-12)
    gradient = torch.autograd.grad(value, list(model.parameters()))
    assert relative(operator.gradient, torch.cat([g.flatten() for g in gradient])) < 1e-12
    named = operator.split(operator.gradient)
    assert {k: v.shape for k, v in named.items()} == dict(operator.parameters)
    assert torch.equal(operator.flatten(named), operator.gradient)


def test_a_selection_of_parameters_is_a_block_of_the_matrix():
    model, data = make("cnn")
    everything = HessianOperator(model, data)
    ranges, start = {}, 0
    for name, shape in everything.parameters.items():
        ranges[name] = range(start, start := start + shape.numel())
    picked = [i for name in ("3.weight", "6.weight") for i in ranges[name]]
    expected = dense_hessian("cnn", "cross_entropy")[picked][:, picked]
    for kind in ("*[36].weight", ["3.weight", "6.weight"]):
        block = HessianOperator(model, data, parameters=kind)
        assert list(block.parameters) == ["3.weight", "6.weight"]
        assert relative(block.to_dense(), expected) < 1e-10
    module = HessianOperator(model, data, parameters=model[6])
    assert list(module.parameters) == ["6.weight", "6.bias"]


@pytest.mark.parametrize("name", ["mlp", "residual", "transformer"])
def test_float32_agrees_with_float64(name):
    model, data = make(name, dtype=torch.float32)
    operator = HessianOperator(model, data)
    v = torch.randn(operator.shape[0])
    product = operator @ v
    assert product.dtype == torch.float32
    expected = dense_hessian(name, "cross_entropy") @ v.double()
    assert relative(product.double(), expected) < 1e-4


def test_scipy_sees_the_same_matrix():
    from scipy.sparse.linalg import eigsh

    model, data = make("mlp")
    expected = torch.linalg.eigvalsh(dense_hessian("mlp", "cross_entropy"))[-3:]
    linear = HessianOperator(model, data).to_scipy()
    assert np.allclose(eigsh(linear, 3)[0], expected, rtol=1e-8)
    assert linear.matmat(np.eye(len(linear.matvec(np.ones(linear.shape[0]))), 2)).shape[1] == 2
    float32 = make("mlp", dtype=torch.float32)
    assert HessianOperator(*float32).to_scipy().dtype == np.float32


def test_the_model_is_left_as_found_and_later_training_does_not_matter():
    model, data = make("batchnorm")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    operator = HessianOperator(model, data, chunk=5, memory_budget=0)
    v = torch.randn(operator.shape[0], dtype=torch.float64, generator=torch.Generator())
    expected = operator @ v
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.train()
    with torch.no_grad():
        for p in (*model.parameters(), *model.buffers()):
            p.add_(1)
    assert torch.equal(operator @ v, expected)
    assert model.training


def test_dict_inputs_and_outputs_with_logits():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *, tokens, mask):
            return Output(self.inner(tokens * mask))

    model, (x, y) = make("mlp")
    operator = HessianOperator(Wrapped(model), ({"tokens": x, "mask": torch.ones_like(x)}, y))
    v = torch.randn(operator.shape[0], dtype=torch.float64)
    assert relative(operator @ v, dense_hessian("mlp", "cross_entropy") @ v) < 1e-10


def test_a_custom_loss_and_outputs_of_any_rank():
    torch.manual_seed(0)
    model = nn.Linear(3, 4, bias=False).double()
    x = torch.randn(6, 5, 3, dtype=torch.float64)

    def loss(outputs, labels):
        return (outputs - labels).square().mean((1, 2)).mean()

    data = x, torch.zeros(6, 5, 4, dtype=torch.float64)
    expected = torch.kron(
        torch.eye(4, dtype=torch.float64), 2 * torch.einsum("nta,ntb->ab", x, x) / (6 * 5 * 4)
    )
    for kind in (HessianOperator, GaussNewtonOperator):
        assert relative(kind(model, data, loss=loss, chunk=4).to_dense(), expected) < 1e-12
    gradients = torch.func.vmap(
        lambda a: torch.func.grad(lambda w: (a @ w.T).square().mean())(model.weight.detach())
    )(x).flatten(1)
    empirical = FisherOperator(model, data, loss=loss, kind="empirical", chunk=4)
    assert relative(empirical.to_dense(), gradients.T @ gradients / 6) < 1e-12


def plain_hessian(total, parameters):
    """Row by row, by double backward with torch alone; complex parameters as pairs of reals."""
    first = torch.autograd.grad(total(), parameters, create_graph=True)
    rows = [
        torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
        for g in first
        for entry in real(g).flatten()
    ]
    return torch.stack([torch.cat([real(g).reshape(-1) for g in row]) for row in rows])


def real(tensor):
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def perturb(model):
    """Later training."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5)


def five_to_three():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, (torch.randn(40, 5).double(), (torch.arange(40) % 5).clamp(max=2))


CLASS_WEIGHTS = torch.tensor([5.0, 1.0, 0.2], dtype=torch.float64)
WEIGHTED = {
    "class weights": nn.CrossEntropyLoss(weight=CLASS_WEIGHTS),
    "ignored labels": nn.CrossEntropyLoss(ignore_index=2),
    "sums and weights": lambda f, y: (
        CLASS_WEIGHTS[y] * F.cross_entropy(f, y, reduction="none"),
        CLASS_WEIGHTS[y],
    ),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_losses_with_weights_of_their_own_do_not_depend_on_the_chunk(name):
    model, (x, y) = five_to_three()
    x, y = x[y.argsort()], y.sort()[0]  # chunks of one class each
    loss = WEIGHTED[name]
    weights = (y != 2).double() if name == "ignored labels" else CLASS_WEIGHTS[y]
    share = weights / weights.sum()
    parameters = list(model.parameters())

    def each():
        return F.cross_entropy(model(x), y, reduction="none")

    expected = plain_hessian(lambda: each() @ share, parameters)
    gradients = torch.stack([
        torch.cat([g.flatten() for g in torch.autograd.grad(e, parameters, retain_graph=True)])
        for e in each()
    ])  # fmt: skip
    p = model(x).softmax(1).detach()
    inner = share[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None])
    jacobian = torch.stack([
        torch.cat([g.flatten() for g in torch.autograd.grad(o, parameters, retain_graph=True)])
        for o in model(x).flatten()
    ]).view(40, 3, -1)  # fmt: skip
    newton = torch.einsum("nap,nab,nbq->pq", jacobian, inner, jacobian)
    empirical = 40 * torch.einsum("np,n,nq->pq", gradients, share**2, gradients)
    for chunk, budget in ((40, None), (7, None), (1, 0)):
        how = {"loss": loss, "chunk": chunk, "memory_budget": budget}
        hessian = HessianOperator(model, (x, y), **how)
        assert hessian.loss == pytest.approx(float(each() @ share), rel=1e-12)
        assert relative(hessian.gradient, share @ gradients) < 1e-12
        assert relative(hessian.to_dense(), expected) < 1e-12
        assert relative(GaussNewtonOperator(model, (x, y), **how).to_dense(), newton) < 1e-12
        fisher = FisherOperator(model, (x, y), kind="empirical", **how)
        assert relative(fisher.to_dense(), empirical) < 1e-12
    if name == "ignored labels":
        assert relative(FisherOperator(model, (x, y), **how).to_dense(), newton) < 1e-12


@pytest.mark.parametrize("chunk", ["auto", 2, 1])
def test_batches_of_sequences_of_different_lengths(chunk):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    sizes = ((3, 4), (5, 7), (2, 4))
    batches = [(torch.randint(0, 9, s), torch.randint(0, 5, s)) for s in sizes]
    for _, labels in batches:
        labels[torch.rand(labels.shape) < 0.3] = -100
    labels = torch.cat([labels.flatten() for _, labels in batches])

    def total():
        return F.cross_entropy(torch.cat([model(x).flatten(0, 1) for x, _ in batches]), labels)

    operator = HessianOperator(model, batches, chunk=chunk)
    assert relative(operator.to_dense(), plain_hessian(total, list(model.parameters()))) < 1e-12
    fisher = FisherOperator(model, batches, chunk=chunk).to_dense()
    assert relative(fisher, GaussNewtonOperator(model, batches).to_dense()) < 1e-12


def test_cross_entropy_of_torch_has_its_true_fisher_with_classes_on_its_own_axis():
    torch.manual_seed(0)
    model = nn.Conv1d(2, 3, 1).double()  # classes on axis 1
    data = torch.randn(6, 2, 4).double(), torch.randint(0, 3, (6, 4))
    for loss in (nn.CrossEntropyLoss(), F.cross_entropy, nn.CrossEntropyLoss(ignore_index=1)):
        fisher = FisherOperator(model, data, loss=loss, chunk=4).to_dense()
        assert relative(fisher, GaussNewtonOperator(model, data, loss=loss).to_dense()) < 1e-12


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("budget", [None, 0])
def test_activation_checkpointing_changes_nothing_also_after_training(reentrant, budget):
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            hidden = checkpoint(self.inner[:2], x, use_reentrant=reentrant)
            return self.inner[2](hidden)

    model, data = five_to_three()
    expected = HessianOperator(model, data).to_dense()
    operator = HessianOperator(Checkpointed(model), data, chunk=9, memory_budget=budget)
    perturb(model)
    assert relative(operator.to_dense(), expected) < 1e-12


class _Recomputed(torch.autograd.Function):
    """Runs a module again in the backward pass, at whatever weights it holds then."""

    @staticmethod
    def forward(ctx, module, x, *parameters):
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            again = ctx.module(x)
            sources = [x, *ctx.module.parameters()]
            return None, *torch.autograd.grad(again, sources, slope, create_graph=True)


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator, FisherOperator])
def test_a_backward_pass_that_runs_the_model_again_finds_the_operators_weights(kind):
    class Recomputing(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            hidden = self.inner[1](self.inner[0](x))
            return torch.tanh(_Recomputed.apply(self.inner[2], hidden, *self.inner[2].parameters()))

    model, data = five_to_three()
    expected = kind(nn.Sequential(model, nn.Tanh()), data).to_dense()
    operator = kind(Recomputing(model), data, chunk=9)
    perturb(model)
    assert relative(operator.to_dense(), expected) < 1e-12
    assert all(p.grad is None for p in model.parameters())


def test_compiled_and_distributed_models_are_those_inside():
    model, data = five_to_three()
    expected = HessianOperator(model, data)
    v = torch.ones(expected.shape[0], dtype=torch.float64)
    partly = nn.Sequential(torch.compile(model[:2], backend="eager"), model[2])
    partly(data[0])
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model), partly):
        assert relative(HessianOperator(wrapped, data) @ v, expected @ v) < 1e-14
    names = HessianOperator(nn.DataParallel(model), data).parameters
    assert list(names) == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("copied", [False, True])
def test_a_complex_weight_is_two_real_ones(copied):
    class Fourier(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.randn(3).double())
            self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.cdouble))
            self.own = [self.weight]

        def forward(self, x):
            weight = self.own[0] if copied else self.weight
            return (torch.fft.rfft(x) @ weight).abs() + self.bias

    _, (x, y) = five_to_three()
    model = Fourier()
    operator = HessianOperator(model, (x, y), chunk=9)
    assert dict(operator.parameters) == {"bias": (3,), "weight": (3, 3, 2)}
    expected = plain_hessian(lambda: F.cross_entropy(model(x), y), list(model.parameters()))
    assert relative(operator.to_dense(), expected) < 1e-12
    assert relative(
        FisherOperator(model, (x, y)).to_dense(), GaussNewtonOperator(model, (x, y)).to_dense()
    ) < 1e-12  # fmt: skip


@pytest.mark.parametrize("budget", [None, 0])
def test_weights_reached_by_references_of_its_own_are_those_of_a_copy(budget):
    class Listed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.own = [inner[0].weight, inner[0].bias]

        def forward(self, x):
            return self.inner[2](torch.tanh(F.linear(x, *self.own)))

    model, data = five_to_three()
    expected = HessianOperator(model, data).to_dense()
    traced = torch.jit.trace(model, data[0])
    for other in (Listed(model), traced):
        operator = HessianOperator(other, data, chunk=9, memory_budget=budget)
        perturb(model)
        assert relative(operator.to_dense(), expected) < 1e-12
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.5)


class Jacobians(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + torch.vmap(torch.func.jacrev(self.inner))(x).sum(-1)


class Slopes(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.inner(x).sin().sum(), x, create_graph=True)
        return self.inner(slope)


@pytest.mark.parametrize("build", [Jacobians, Slopes])
def test_models_that_differentiate_in_their_forward_pass(build):
    model, (x, y) = five_to_three()
    model = build(model)
    operator = HessianOperator(model, (x, y), chunk=9)
    expected = plain_hessian(lambda: F.cross_entropy(model(x), y), list(model.parameters()))
    assert relative(operator.to_dense(), expected) < 1e-12
    newton = GaussNewtonOperator(model, (x, y), chunk=9).to_dense()
    assert relative(newton, FisherOperator(model, (x, y)).to_dense()) < 1e-12


def test_a_regulariser_that_reads_the_weights_is_part_of_the_hessian():
    model, (x, y) = five_to_three()

    def loss(outputs, labels):
        return F.cross_entropy(outputs, labels) + 0.1 * model[0].weight.square().sum()

    operator = HessianOperator(model, (x, y), loss=loss, chunk=9)
    expected = plain_hessian(lambda: loss(model(x), y), list(model.parameters()))
    perturb(model)
    assert relative(operator.to_dense(), expected) < 1e-12


def test_outputs_of_any_structure():
    class Heads(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.side = inner, nn.Linear(4, 2).double()

        def forward(self, x):
            hidden = torch.tanh(self.inner[0](x))
            aside = self.side(hidden)
            return {"main": self.inner[2](hidden), "aside": (aside, aside.argmax(1))}

    def loss(outputs, labels):
        return F.cross_entropy(outputs["main"], labels) + 0.5 * (
            outputs["aside"][0].square().sum() / len(labels)
        )

    model, (x, y) = five_to_three()
    model = Heads(model)
    hessian = HessianOperator(model, (x, y), loss=loss, chunk=9)
    expected = plain_hessian(lambda: loss(model(x), y), list(model.parameters()))
    assert relative(hessian.to_dense(), expected) < 1e-12
    last = ("inner.2.*", "side.*")  # the outputs are linear in these
    newton = GaussNewtonOperator(model, (x, y), loss=loss, parameters=last, chunk=9)
    block = HessianOperator(model, (x, y), loss=loss, parameters=last)
    assert relative(newton.to_dense(), block.to_dense()) < 1e-12
    single = [HessianOperator(model, (x[i : i + 1], y[i : i + 1]), loss=loss) for i in range(40)]
    gradients = torch.stack([operator.gradient for operator in single])
    fisher = FisherOperator(model, (x, y), loss=loss, kind="empirical", chunk=9)
    assert relative(fisher.to_dense(), gradients.T @ gradients / 40) < 1e-12


def test_an_operator_says_what_it_did():
    model, data = five_to_three()
    model[0].requires_grad_(False)
    with precision("tf32"):
        operator = HessianOperator(model, data)
    assert (operator.precision, operator.mode) == ("tf32", "reverse")
    assert operator.left_out == ("0.weight", "0.bias")
    assert list(operator.parameters) == ["2.weight", "2.bias"]
    assert HessianOperator(model, data).precision == "full"


def test_a_linear_loss_has_no_curvature():
    model = nn.Linear(3, 1)
    data = torch.randn(5, 3), torch.zeros(5)
    for kind in (HessianOperator, GaussNewtonOperator):
        operator = kind(model, data, loss=lambda outputs, labels: outputs.mean())
        assert torch.equal(operator.to_dense(), torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("function", "shape", "weight", "options"),
    [
        (F.conv2d, (2, 4, 5, 5), (6, 4, 3, 3), {"padding": 1}),
        (F.conv2d, (2, 4, 6, 5), (6, 2, 3, 3), {"stride": (2, 1), "groups": 2}),
        (F.conv2d, (2, 4, 6, 6), (4, 1, 2, 2), {"groups": 4, "dilation": 2, "bias": None}),
        (F.conv1d, (3, 2, 7), (3, 2, 3), {"stride": 2, "padding": (1,)}),
        (F.conv3d, (1, 2, 3, 3, 3), (2, 2, 2, 2, 2), {}),
    ],
)
def test_convolution_rules_have_the_native_derivatives(function, shape, weight, options):
    torch.manual_seed(0)
    options = dict(options)
    tensors = [torch.randn(shape), torch.randn(weight)]
    if "bias" not in options:
        tensors.append(torch.randn(weight[0]))
    tensors = [t.double().requires_grad_() for t in tensors]
    options.pop("bias", None)

    def call(*args):
        with fast_rules():
            return function(*args, **options)

    # another layout adds up in another order: some 40 terms of size 1
    assert torch.allclose(call(*tensors), function(*tensors, **options), rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize(
    "function",
    [
        torch.relu,
        F.relu,
        lambda x: F.relu(x * 1, inplace=True),
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.max_pool2d(x, (3, 2), stride=1, padding=1),
        lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True, dilation=(2, 1)),
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
        lambda x: F.max_pool2d(x[0], 2),
        lambda x: F.max_pool2d(torch.relu(x - 1), 2),
        lambda x: F.max_pool2d(F.relu(x - 1), 3, padding=1) + F.relu(x - 1).sum(),
        lambda x: (y := x - 1, z := F.relu(y), y.neg_(), F.max_pool2d(z, 2))[-1],
    ],
)
def test_rules_for_relu_and_pooling_have_the_native_derivatives(function):
    torch.manual_seed(0)
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)

    def call(x):
        with fast_rules():
            return function(x * x)

    assert torch.equal(call(x), function(x * x))
    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)


def test_modules_are_recorded_with_the_rules_and_pooled_before_the_relu():
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    with fast_rules():
        pooled = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.MaxPool2d(2))(x)
    nodes, node = [], pooled.grad_fn
    while node is not None and len(nodes) < 3:
        nodes.append(type(node).__name__)
        node = node.next_functions[0][0]
    assert nodes == ["_ReluBackward", "_MaxPoolBackward", "_ConvolutionBackward"]


def test_a_relu_that_changed_before_its_pooling_is_refused_as_natively():
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    for rules in (nullcontext(), fast_rules()):
        with rules:
            pooled = F.max_pool2d(torch.relu(x).mul_(-2), 2)
        with pytest.raises(RuntimeError, match="inplace"):
            pooled.sum().backward()


def test_a_bias_alone_and_an_input_without_batch():
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Tanh(), nn.Linear(18, 2)).double()
    data = torch.randn(5, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    everything = HessianOperator(model, data).to_dense()
    bias = HessianOperator(model, data, parameters="0.bias").to_dense()
    assert relative(bias, everything[8:10, 8:10]) < 1e-12
    x = torch.randn(1, 4, 4, dtype=torch.float64)
    with fast_rules():
        assert torch.equal(model[0](x), F.conv2d(x, model[0].weight, model[0].bias))


class _Witness(torch.autograd.Function):
    """Holds an object for as long as its graph lives."""

    alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    @staticmethod
    def forward(ctx, x):
        class Token: ...

        ctx.token = Token()
        _Witness.alive.add(ctx.token)
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator, FisherOperator])
@pytest.mark.parametrize("budget", [None, 0])
def test_graphs_are_freed_without_the_garbage_collector(kind, budget):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return _Witness.apply(self.linear(x))

    data = torch.randn(8, 3), torch.randint(0, 2, (8,))
    gc.collect()
    _Witness.alive.clear()
    gc.disable()
    try:
        operator = kind(Net(), data, chunk=2, memory_budget=budget)
        operator @ torch.ones(8)
        assert len(_Witness.alive) == (4 if budget is None else 0)
        with operator:
            operator @ torch.ones(8)
        assert len(_Witness.alive) == 0
        reference = weakref.ref(operator)
        del operator
        assert reference() is None
        operator = kind(Net(), data, chunk=2)
        del operator
        assert len(_Witness.alive) == 0
    finally:
        gc.enable()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_a_gpu_gives_the_same_products(name):
    model, (x, y) = make(name)
    operator = HessianOperator(model.cuda(), (x, y), chunk=5)
    v = torch.randn(operator.shape[0], dtype=torch.float64)
    assert relative((operator @ v).cpu(), dense_hessian(name, "cross_entropy") @ v) < 1e-10
