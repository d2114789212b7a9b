"""BatchNorm in eval mode, after a convolution and elsewhere, against plain double backward."""

import pytest
import torch
from cores import slow_beyond
from curvature_cases import make, relative
from torch import nn
from torch.nn import functional as F

from sharpkit.curvature import FisherOperator, GaussNewtonOperator, HessianOperator
from sharpkit.curvature.fast_rules import fast_rules

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SIZES = ((7,), (5, 4), (3, 4, 3))


class Pooled(nn.Module):
    """The mean over positions of tanh, so that all parts have curvature."""

    def forward(self, x):
        return torch.tanh(x).flatten(2).mean(2)


def with_statistics(model, dtype=torch.float64):
    """The model in eval mode, with running statistics that matter, some far from 0."""
    g = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(generator=g).mul_(3)
            module.running_var.uniform_(0.3, 3.0, generator=g)
            if module.affine:
                module.weight.data.uniform_(-1.5, 1.5, generator=g)
                module.bias.data.normal_(generator=g)
    return model.to(dtype).eval()


def dense(model, x, y):
    """The Hessian by double backward with torch's own derivatives."""
    weights = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(F.cross_entropy(model(x), y), weights, create_graph=True)
    rows = [
        torch.autograd.grad(entry, weights, retain_graph=True, materialize_grads=True)
        for g in gradient
        for entry in g.flatten()
    ]
    return torch.stack([torch.cat([t.flatten() for t in row]) for row in rows])


def problem(rank, folded, **options):
    """A network with a BatchNorm after a convolution, or before one, in rank dimensions."""
    torch.manual_seed(0)
    convolution, norm = CONVOLUTIONS[rank - 1], NORMS[rank - 1]
    first = convolution(2, 4, 3, padding=1, bias=options.pop("bias", True))
    middle = [norm(4, **options)] if folded else [nn.Softplus(), norm(4, **options)]
    model = nn.Sequential(first, *middle, nn.ReLU(), convolution(4, 3, 2), Pooled())
    g = torch.Generator().manual_seed(2)
    x = torch.randn(6, 2, *SIZES[rank - 1], generator=g, dtype=torch.float64)
    return with_statistics(model), x, torch.arange(6) % 3


def nodes_of(model, x):
    """The names of the nodes that the rules record."""
    with fast_rules():
        start = model(x).grad_fn
    names, stack = set(), [start]
    while stack:
        node = stack.pop()
        names.add(type(node).__name__)
        stack += [n for n, _ in node.next_functions if n is not None]
    return names


@pytest.mark.parametrize("rank", slow_beyond(1, [2, 1, 3]))
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"momentum": None}, {"eps": 0.3}, {"bias": False}],
    ids=["plain", "no affine", "momentum None", "large eps", "no bias before"],
)
def test_products_are_those_of_the_dense_hessian(rank, folded, options):
    model, x, y = problem(rank, folded, **options)
    operator = HessianOperator(model, (x, y), chunk=4)
    assert operator.mode == "reverse"
    node = "_NormalisedConvolutionBackward" if folded else "_BatchNormBackward"
    assert node in nodes_of(model, x)
    expected = dense(model, x, y)
    assert relative(operator.to_dense(), expected) < 1e-11
    single = HessianOperator(model.float(), (x.float(), y))
    v = torch.randn(len(expected), generator=torch.Generator().manual_seed(3))
    assert relative((single @ v).double(), expected @ v.double()) < 1e-4


def test_a_norm_of_rows_between_dense_layers():
    torch.manual_seed(0)
    layers = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)
    model = with_statistics(nn.Sequential(*layers))
    x, y = torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 3
    assert relative(HessianOperator(model, (x, y), chunk=4).to_dense(), dense(model, x, y)) < 1e-12


@pytest.mark.parametrize(
    "trained", ["0.*", "0.weight", "0.bias", "1.*", "1.weight", "1.bias", "3.*", "[03].*"]
)
@pytest.mark.parametrize("folded", [True, False])
def test_a_selection_is_a_block_of_the_whole(folded, trained):
    model, x, y = problem(2, folded)
    names = [name for name, _ in model.named_parameters()]
    if not folded:
        trained = trained.replace("3", "4").replace("1", "2")  # one layer more
    block = HessianOperator(model, (x, y), parameters=trained)
    ends = torch.tensor([p.numel() for p in model.parameters()]).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    picked = [
        i
        for name, start, end in zip(names, starts, ends, strict=True)
        if name in block.parameters
        for i in range(start, end)
    ]
    assert relative(block.to_dense(), dense(model, x, y)[picked][:, picked]) < 1e-11


def test_a_scale_alone_computes_no_convolution_gradients():
    model, x, _ = problem(2, True)
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    assert "_BatchNormBackward" in nodes_of(model, x)
    assert "_NormalisedConvolutionBackward" not in nodes_of(model, x)


class Odd(nn.Module):
    """Uses of a convolution's output that must not be mistaken for its BatchNorm's alone."""

    def __init__(self, use):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.use = use

    def forward(self, x):
        return self.head(torch.tanh(self.use(self, self.conv(x))).mean((2, 3)))


USES = {
    "changed in place before": lambda m, z: m.norm(z.mul_(2)),
    "changed in place after": lambda m, z: m.norm(z).mul_(2),
    "used beside": lambda m, z: m.norm(z) + z.sin(),
    "two norms": lambda m, z: m.norm(z) * m.other(z),
    "two in a row": lambda m, z: m.other(m.norm(z)),
    "relu in place": lambda m, z: F.relu(m.norm(z), inplace=True),
    "a view of it": lambda m, z: m.norm(z.view(z.shape)),
    "a view as rows": lambda m, z: m.norm(z).view(len(z), 4, -1, 1),
    "transposed": lambda m, z: m.norm(z.transpose(2, 3)),
    "weights changed": lambda m, z: F.batch_norm(
        z, m.norm.running_mean, m.norm.running_var, m.norm.weight.square(), None
    ),
    "no scale": lambda m, z: F.batch_norm(z, m.norm.running_mean, m.norm.running_var),
}


@pytest.mark.parametrize("name", USES)
@pytest.mark.filterwarnings("ignore:the loss does not depend")
def test_other_uses_of_a_convolution(name):
    torch.manual_seed(0)
    model = with_statistics(Odd(USES[name]))
    x, y = torch.randn(6, 2, 5, 4, dtype=torch.float64), torch.arange(6) % 3
    weights = list(model.parameters())
    gradient = torch.autograd.grad(
        F.cross_entropy(model(x), y), weights, create_graph=True, materialize_grads=True
    )
    rows = [
        torch.autograd.grad(entry, weights, retain_graph=True, materialize_grads=True)
        if g.requires_grad
        else [torch.zeros_like(w) for w in weights]
        for g in gradient
        for entry in g.flatten()
    ]
    expected = torch.stack([torch.cat([t.flatten() for t in row]) for row in rows])
    operator = HessianOperator(model, (x, y), chunk=4)
    assert operator.mode == "reverse"
    assert relative(operator.to_dense(), expected) < 1e-11


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator, FisherOperator])
def test_chunks_of_one_and_channels_last_change_rounding_only(kind):
    model, (x, y) = make("residual")
    expected = kind(model, (x, y))
    v = torch.randn(expected.shape[0], dtype=torch.float64)
    last = x.contiguous(memory_format=torch.channels_last)
    for data in ((x, y), (last, y)):
        assert relative(kind(model, data, chunk=1) @ v, expected @ v) < 1e-12
    moved = model.to(memory_format=torch.channels_last)
    assert relative(kind(moved, (last, y)) @ v, expected @ v) < 1e-12


def test_rules_have_the_derivatives_of_torch():
    torch.manual_seed(0)
    mean, variance = torch.randn(3).double(), torch.rand(3).double() + 0.5
    given = [torch.randn(4, 3, 3, 2), torch.randn(3), torch.randn(3)]
    given = [t.double().requires_grad_() for t in given]

    def call(x, scale, shift):
        with fast_rules():
            return F.batch_norm(x, mean, variance, scale, shift)

    assert torch.equal(call(*given), F.batch_norm(given[0], mean, variance, *given[1:]))
    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)
