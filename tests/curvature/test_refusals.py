"""Input from which no curvature can be computed: refused at construction, with the cause."""

import warnings

import pytest
import torch
from curvature_cases import make
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from sharpkit.curvature import (
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    spectral_density,
    top_eigenvalues,
    trace,
)
from sharpkit.errors import ArgumentError, DataError, ModelError

KINDS = [HessianOperator, GaussNewtonOperator, FisherOperator]
X, Y = torch.randn(12, 3), torch.randint(0, 2, (12,))


class Applied(nn.Module):
    """A linear layer followed by any function."""

    def __init__(self, function, outputs=2):
        super().__init__()
        self.linear = nn.Linear(3, outputs)
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x))


@pytest.mark.parametrize("kind", KINDS)
def test_nan_weights_and_losses(kind):
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="'weight' has 1 NaN"):
        kind(model, (X, Y))
    x = X.clone()
    x[7] = 0
    with pytest.raises(ModelError, match=r"loss of .*examples.* is (nan|inf)"):
        kind(Applied(lambda z: z / z.sum(1, keepdim=True).mul(0)), (X, Y))
    with pytest.raises(DataError, match="NaN"):
        kind(nn.Linear(3, 2), (torch.full((12, 3), torch.nan), Y))


def test_a_late_nan_names_its_examples():
    x = torch.ones(200, 3)
    x[150] = -1

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return torch.stack([(x @ self.w).sqrt(), x @ self.w], 1)

    with pytest.raises(ModelError, match="loss of examples 150 to 159 is nan"):
        HessianOperator(Root(), (x, torch.zeros(200, dtype=torch.int64)), chunk=10)


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_losses_that_are_not_scalar_means(kind):
    with pytest.raises(ModelError, match=r"must be a scalar, got \(12,\)"):
        kind(nn.Linear(3, 2), (X, Y), loss=lambda f, y: F.cross_entropy(f, y, reduction="none"))
    with pytest.raises(ModelError, match="not a mean over examples"):
        kind(nn.Linear(3, 2), (X, Y), loss=lambda f, y: F.cross_entropy(f, y, reduction="sum"))
    with pytest.raises(ArgumentError, match="unknown loss"):
        kind(nn.Linear(3, 2), (X, Y), loss="hinge")


def test_batch_statistics():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with pytest.raises(ModelError, match=r"'1' \(BatchNorm1d\) is in training mode.*model.eval"):
        HessianOperator(model, (X, Y))
    assert model.training
    assert model[1].num_batches_tracked == 0
    HessianOperator(model.eval(), (X, Y))
    without = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)).eval()
    with pytest.raises(ModelError, match="keeps no running statistics"):
        HessianOperator(without, (X, Y))
    with pytest.raises(ModelError, match="depend on the others in its batch"):
        HessianOperator(Applied(lambda z: z - z.mean(0)), (X, Y))


def test_dropout_and_other_randomness():
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    with pytest.raises(ModelError, match=r"'1' \(Dropout\) drops units"):
        HessianOperator(model, (X, Y))
    HessianOperator(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.0)), (X, Y))
    with pytest.raises(ModelError, match="the model is random"):
        HessianOperator(Applied(lambda z: F.dropout(z, 0.5)), (X, Y))


class Noisy(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        return X[i] + torch.randn(3), Y[i]


def test_data_that_change():
    model, data = nn.Linear(3, 2), TensorDataset(X, Y)
    with pytest.raises(DataError, match="shuffles"):
        HessianOperator(model, DataLoader(data, shuffle=True))
    assert HessianOperator(model, DataLoader(data, shuffle=True), seed=0).n == 12
    for random in (
        Noisy(),
        DataLoader(Noisy(), batch_size=4),
        DataLoader(data, batch_size=4, sampler=WeightedRandomSampler([1.0] * 12, 12)),
    ):
        state = torch.get_rng_state()
        with pytest.raises(DataError, match="differ between two passes"):
            HessianOperator(model, random)
        assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(DataError, match="shuffles"):
        HessianOperator(model, DataLoader(data, sampler=RandomSampler(data)))


def test_a_plain_loader_gives_every_example_its_weight():
    # the last batch is smaller: a mean of batch means would be wrong
    model = nn.Linear(3, 2)
    loader = DataLoader(TensorDataset(X, Y), batch_size=5)
    v = torch.ones(8)
    assert torch.allclose(HessianOperator(model, loader) @ v, HessianOperator(model, (X, Y)) @ v)


@pytest.mark.parametrize("kind", KINDS)
def test_selections(kind):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ArgumentError, match="no parameter matches 'conv"):
        kind(model, (X, Y), parameters="conv*")
    with pytest.raises(ArgumentError, match="empty"):
        kind(model, (X, Y), parameters=[])
    with pytest.raises(ArgumentError, match="no parameter of the model"):
        kind(model, (X, Y), parameters=nn.Linear(3, 3))
    model[0].requires_grad_(False)
    operator = kind(model, (X, Y))
    assert operator.shape == (10, 10)
    assert operator.left_out == ("0.weight", "0.bias")
    everything = kind(model, (X, Y), parameters="*")
    assert (everything.shape, everything.left_out) == ((26, 26), ())
    assert not model[0].weight.requires_grad
    model.requires_grad_(False)
    assert kind(model, (X, Y)).shape == (26, 26)
    assert kind(nn.Linear(3, 2).half(), (X, Y)).dtype == torch.float32
    mixed = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).double())
    with pytest.raises(ArgumentError, match=r"float32, torch\.float64"):
        kind(mixed, (X, Y))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("kind", KINDS)
def test_unused_parameters_are_rows_of_zeros_and_named(kind):
    with pytest.warns(UserWarning, match=r"does not depend on spare.weight, spare.bias.*zero"):
        operator = kind(Unused(), (X, Y))
    assert operator.unused == ["spare.weight", "spare.bias"]
    dense = operator.to_dense()
    assert torch.equal(dense[8:], torch.zeros(8, 16))
    assert dense[:8, :8].abs().max() > 0
    with pytest.raises(ModelError, match="does not depend on any selected parameter"):
        kind(Unused(), (X, Y), parameters="spare.*")
    with pytest.raises(ModelError, match="does not depend on any selected parameter"):
        kind(Applied(lambda z: z.detach()), (X, Y))


def test_labels_and_sizes():
    with pytest.raises(DataError, match="labels run from 0 to 5"):
        HessianOperator(nn.Linear(3, 2), (X, torch.tensor([5] + [0] * 11)))
    with pytest.raises(DataError, match="differ in length"):
        HessianOperator(nn.Linear(3, 2), (X, Y[:5]))
    with pytest.raises(ArgumentError, match="n = 13"):
        HessianOperator(nn.Linear(3, 2), (X, Y), n=13)
    assert HessianOperator(nn.Linear(3, 2), (X, Y), n=5).n == 5
    operator = HessianOperator(nn.Linear(3, 2), (X, Y))
    with pytest.raises(ArgumentError, match=r"shape \(8,\), got \(7,\)"):
        operator.matvec(torch.ones(7))
    with pytest.raises(ArgumentError, match=r"shape \(8, k\), got \(7, 2\)"):
        operator.matmat(torch.ones(7, 2))
    for chunk in (0, -1, 2.5, "big"):
        with pytest.raises(ArgumentError, match="chunk must be"):
            HessianOperator(nn.Linear(3, 2), (X, Y), chunk=chunk)
    with pytest.raises(ArgumentError, match="memory_budget"):
        HessianOperator(nn.Linear(3, 2), (X, Y), memory_budget=-1)
    with pytest.raises(ArgumentError, match="kind must be"):
        FisherOperator(nn.Linear(3, 2), (X, Y), kind="sampled")
    with pytest.raises(ArgumentError, match="needs the likelihood"):
        FisherOperator(nn.Linear(3, 2), (X, Y), loss=lambda f, y: F.cross_entropy(f, y))
    with pytest.raises(ArgumentError, match="needs the likelihood"):
        FisherOperator(nn.Linear(3, 2), (X, Y), loss=nn.CrossEntropyLoss(label_smoothing=0.1))
    with pytest.raises(ArgumentError, match="needs the likelihood"):
        FisherOperator(nn.Linear(3, 2), (X, F.one_hot(Y).float()), loss=nn.CrossEntropyLoss())


def test_graphs_that_do_not_fit_are_refused_with_their_size(monkeypatch):
    monkeypatch.setattr("sharpkit.curvature.memory.available_memory", lambda device: 100)
    with pytest.raises(ArgumentError, match=r"one chunk of 12 examples needs .* MB on cpu.*0.0 MB"):
        HessianOperator(nn.Linear(3, 2), (X, Y))
    monkeypatch.setattr("sharpkit.curvature.memory.available_memory", lambda device: 400)
    with pytest.raises(ArgumentError, match=r"keeping 12 of 12 chunks needs"):
        HessianOperator(nn.Linear(3, 2), (X, Y), chunk=1, memory_budget=10**9)
    operator = HessianOperator(nn.Linear(3, 2), (X, Y), chunk=1)
    assert operator.kept_bytes <= 200
    with pytest.raises(ArgumentError, match=r"a dense 8 x 8 matrix needs"):
        monkeypatch.setattr("sharpkit.curvature.memory.available_memory", lambda device: 100)
        operator.to_dense()


def test_copies_and_a_basis_that_do_not_fit_are_refused_before_there_is_a_product(monkeypatch):
    monkeypatch.setattr("sharpkit.curvature.memory.available_memory", lambda device: 90)
    with pytest.raises(ArgumentError, match=r"an operator of 8 parameters .*needs 0.0 MB on cpu"):
        HessianOperator(nn.Linear(3, 2), (X, Y))

    class Huge:  # the Hessian of a network of a billion parameters, of which nothing exists
        shape, dtype, device = (10**9, 10**9), torch.float32, torch.device("cpu")

        def matmat(self, vectors):
            raise AssertionError("a product was made")

    monkeypatch.setattr("sharpkit.curvature.memory.available_memory", lambda device: 64 * 10**9)
    message = r"80 steps x 1 probes x 1000000000 parameters needs 344.0 GB on cpu, of which 64.0 GB"
    with pytest.raises(ArgumentError, match=message):
        spectral_density(Huge(), steps=80)
    with pytest.raises(ArgumentError, match=r"of 40 vectors and its restart needs 336.0 GB"):
        top_eigenvalues(Huge(), 1)
    with pytest.raises(ArgumentError, match=r"of 30 vectors for Hutch\+\+ needs 360.0 GB"):
        trace(Huge(), products=90)


@pytest.mark.parametrize("kind", KINDS)
def test_data_changed_in_place_are_noticed_where_they_are_read_again(kind):
    x = X.clone()
    kept = kind(nn.Linear(3, 2), (x, Y), chunk=5)
    again = kind(nn.Linear(3, 2), (x, Y), chunk=5, memory_budget=0)
    v = torch.ones(8)
    product = kept @ v
    again @ v
    x[7] += 1
    assert torch.equal(kept @ v, product)
    with pytest.raises(DataError, match="examples 4 to 7 have changed"):
        again @ v
    with kept:
        pass
    with pytest.raises(DataError, match="examples 4 to 7 have changed"):
        kept @ v


def test_a_model_that_computes_something_else_later_is_noticed():
    model = Applied(torch.tanh)
    operator = HessianOperator(model, (X, Y), memory_budget=0)
    model.function = torch.sin
    with pytest.raises(ModelError, match="the model computes something else"):
        operator @ torch.ones(8)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_only_a_closure_reaches(kind):
    torch.manual_seed(0)  # of some weights the loss, a regulariser, is refused as such
    model = nn.Linear(3, 2)
    weight = model.weight
    hidden = Applied(lambda z: z)
    hidden.function = lambda z: z @ hidden_weight
    hidden_weight = nn.Parameter(torch.eye(2))
    hidden.register_parameter("own", hidden_weight)
    with pytest.raises(ModelError, match=r"references of its own.*also in a copy"):
        kind(hidden, (X, Y))
    with pytest.raises(ModelError, match=r"references of its own.*also in a copy"):
        kind(model, (X, Y), loss=lambda f, y: F.cross_entropy(f, y) + weight.square().sum())


def test_a_model_that_cannot_be_copied():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.own = [self.linear.weight]

        def forward(self, x):
            return x @ self.own[0].T

        def __deepcopy__(self, memo):
            raise TypeError("holds a socket")

    with pytest.raises(ModelError, match=r"cannot be copied \(holds a socket\)"):
        HessianOperator(Listed(), (X, Y))


@pytest.mark.parametrize("kind", [GaussNewtonOperator, FisherOperator])
def test_a_loss_that_reads_the_weights_has_no_curvature_of_the_outputs(kind):
    model = nn.Linear(3, 2)
    options = {"kind": "empirical"} if kind is FisherOperator else {}

    def loss(outputs, labels):
        return F.cross_entropy(outputs, labels) + model.weight.square().sum()

    with pytest.raises(ModelError, match="depends on the weights also at fixed outputs"):
        kind(model, (X, Y), loss=loss, **options)


def test_labels_of_which_none_counts():
    with pytest.raises(DataError, match="no label counts"):
        HessianOperator(nn.Linear(3, 2), (X, torch.full((12,), -100)))


class _ForwardOnly(torch.autograd.Function):
    """x² whose backward pass has a forward-mode rule, but no reverse-mode one."""

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return _Slope.apply(grad, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return 2 * x * tangent


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(grad, x):
        return 2 * x * grad

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("derivative for aten::slope_backward is not implemented")

    @staticmethod
    def jvp(ctx, grad_dot, x_dot):
        grad, x = ctx.saved_tensors
        return 2 * (x_dot * grad + x * grad_dot)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_steps_in_with_a_warning_that_names_the_operation(kind):
    torch.manual_seed(0)
    model = Applied(_ForwardOnly.apply).double()
    data = X.double(), Y
    with pytest.warns(UserWarning, match="forward over reverse.*aten::slope_backward"):
        operator = kind(model, data, chunk=5)
    assert operator.kept_chunks == 0
    model.function = torch.square
    assert torch.allclose(operator.to_dense(), kind(model, data).to_dense(), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_attention_pinned_by_the_model_is_computed_in_plain_steps(kind):
    class Pinned(nn.Module):
        def __init__(self, backend):
            super().__init__()
            self.backend = backend
            self.qkv = nn.Linear(8, 24)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 1, 8)).permute(2, 0, 3, 1, 4)
            with sdpa_kernel(self.backend):
                y = F.scaled_dot_product_attention(q, k, v)
            return self.head(y[:, 0].mean(1))

    torch.manual_seed(0)
    model, data = Pinned(SDPBackend.FLASH_ATTENTION).double(), (torch.randn(12, 4, 8).double(), Y)
    pinned = kind(model, data)
    v = torch.randn(pinned.shape[0], dtype=torch.float64)
    product = pinned @ v
    model.backend = SDPBackend.MATH
    assert torch.allclose(product, kind(model, data) @ v, atol=1e-12)


def test_standard_attention_works_without_advice():
    model, data = make("transformer")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HessianOperator(model, data)
    with pytest.raises(ModelError, match="drops units"):
        HessianOperator(model.train(), data)
