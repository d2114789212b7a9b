"""Small networks and transformations under which measures must behave as their theory says."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

DATA_SIZE = 40


def relu_network(*, bias: bool = False, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8, bias=bias),
        nn.ReLU(),
        nn.Linear(8, 7, bias=bias),
        nn.ReLU(),
        nn.Linear(7, 3, bias=bias),
    ).double()


def relu_data(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(DATA_SIZE, 6, generator=generator, dtype=torch.float64)
    return x, relu_network()(x).argmax(1)  # the network is right everywhere


def convolutional(*, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.ZeroPad2d((0, 1, 0, 1)),
        nn.Conv2d(5, 4, 3, stride=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 3),
    ).double()
    norm = model[1]
    norm.running_mean.uniform_(-0.5, 0.5)
    norm.running_var.uniform_(0.5, 2.0)
    norm.weight.data.uniform_(-1.5, 1.5)
    norm.bias.data.uniform_(-0.5, 0.5)
    return model.eval()


def convolutional_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(30, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (30,), generator=generator)


def rescaled(model: nn.Sequential, factor: float = 4.0) -> nn.Sequential:
    """The same function: one hidden layer times a factor, the next divided by it."""
    other = copy.deepcopy(model)
    first, second = [m for m in other if isinstance(m, nn.Linear)][:2]
    for p in first.parameters():
        p.data *= factor
    second.weight.data /= factor
    return other


def permuted(model: nn.Sequential) -> nn.Sequential:
    """The same function: the units of the first hidden layer in another order."""
    other = copy.deepcopy(model)
    first, second = [m for m in other if isinstance(m, nn.Linear)][:2]
    order = torch.randperm(first.out_features, generator=torch.Generator().manual_seed(0))
    for p in first.parameters():
        p.data = p.data[order]
    second.weight.data = second.weight.data[:, order]
    return other


def scaled(model: nn.Module, factor: float) -> nn.Module:
    """Every parameter times a factor."""
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data *= factor
    return other


def folded(model: nn.Sequential) -> nn.Sequential:
    """`convolutional()` with its BatchNorm multiplied into the first convolution by hand."""
    conv, norm = copy.deepcopy(model[0]), model[1]
    scale = norm.weight.data / (norm.running_var + norm.eps).sqrt()
    conv.weight.data *= scale[:, None, None, None]
    conv.bias.data = norm.bias.data + scale * (conv.bias.data - norm.running_mean)
    return nn.Sequential(conv, *copy.deepcopy(list(model[2:])))
