"""Which groups run side by side on a CPU: it follows from sizes and from the kind of layers."""

import pytest
import torch
from torch import Tensor, nn

from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.groupwise.survey import Survey, survey

CPU = torch.device("cpu")


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Doubled(nn.Module):
    """A weight in an operation that has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (2.0 * self.head.weight).T


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))


def small_cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def large_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 512, 3), nn.Conv2d(512, 256, 3), nn.Flatten(), nn.LazyLinear(3)
    )


def surveyed(model: nn.Module, *shape: int) -> Survey:
    inputs = torch.randn(4, *shape)
    model.eval()(inputs)  # shapes of lazy layers
    function = FunctionalModel(model)
    weights = {name: function.value(name) for name in function.names}
    return survey(function, weights, Examples(inputs, torch.zeros(4, dtype=torch.long)))


@pytest.mark.parametrize(
    ("model", "shape", "alone"),
    [
        (perceptron(), (5,), 257),
        (small_cnn(), (1, 8, 8), 33),
        (large_cnn(), (1, 12, 12), 8),  # 150 MFLOP: a group fills the cores
        (LastState(), (7, 5), 17),
        (Doubled(), (5,), 16),
    ],
)
def test_groups_of_costlier_layers_run_alone_earlier(
    model: nn.Module, shape: tuple[int, ...], alone: int
) -> None:
    assert surveyed(model, *shape).alone(CPU) == alone


def test_a_patch_embedding_does_not_make_a_network_one_of_convolutions() -> None:
    patches = nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=4), nn.Flatten(), nn.Linear(32, 256), nn.Linear(256, 3)
    )
    assert 0 < surveyed(patches, 1, 8, 8).convolved < 0.5
    assert surveyed(patches, 1, 8, 8).alone(CPU) == 257
