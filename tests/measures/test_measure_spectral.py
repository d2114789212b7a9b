import math

import numpy as np
import pytest
import torch
from measure_helpers import (
    convolutional,
    convolutional_data,
    folded,
    permuted,
    relu_data,
    relu_network,
    rescaled,
    scaled,
)
from torch import nn

from sharpkit.errors import ModelError
from sharpkit.measures import spectral_norm, spectral_norms
from sharpkit.measures.weight_layers import weight_layers

CONVOLUTIONS = {
    "plain": (nn.Conv2d(3, 4, 3), (3, 8, 7)),
    "same": (nn.Conv2d(3, 4, 3, padding=1), (3, 8, 8)),
    "strided": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 9, 8)),
    "dilated": (nn.Conv2d(3, 4, 3, dilation=2, padding=2), (3, 8, 8)),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2, padding=1), (4, 7, 7)),
    "circular": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 8, 8)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2), (3, 6, 6)),
    "one axis": (nn.Conv1d(3, 5, 4), (3, 40)),
    "small": (nn.Conv2d(2, 3, 3, padding=1), (2, 4, 4)),
    "uneven padding": (
        nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 3, stride=2)),
        (3, 8, 8),
    ),
}


def dense(model, shape):
    """The matrix of x -> model(x) − model(0), column by column."""
    size = math.prod(shape)
    with torch.no_grad():
        basis = torch.eye(size, dtype=torch.float64).view(size, *shape)
        return (model(basis) - model(torch.zeros(1, *shape, dtype=torch.float64))).flatten(1)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_the_norm_of_a_convolution_is_that_of_its_matrix(kind):
    model, shape = CONVOLUTIONS[kind]
    model = model.double()
    data = torch.zeros(1, *shape, dtype=torch.float64), torch.tensor([0])
    (layer,) = weight_layers(model, data)
    expected = float(torch.linalg.matrix_norm(dense(model, shape), ord=2))
    assert spectral_norm(layer) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("seed", [45, *range(8)])
def test_close_singular_values_do_not_stop_the_search_early(seed):
    """Seed 45 has two within 3e-5 of each other."""
    torch.manual_seed(seed)
    model, shape = nn.Conv2d(1, 12, 3, padding=1, bias=False).double(), (1, 14, 14)
    (layer,) = weight_layers(model, (torch.zeros(1, *shape).double(), torch.tensor([0])))
    expected = float(torch.linalg.matrix_norm(dense(model, shape), ord=2))
    assert spectral_norm(layer) == pytest.approx(expected, rel=1e-8)


def test_a_circular_convolution_agrees_with_the_fourier_formula():
    model, shape = CONVOLUTIONS["circular"]
    model = model.double()
    (layer,) = weight_layers(model, (torch.zeros(1, *shape).double(), torch.tensor([0])))
    kernel = np.einsum("oihw->hwio", model.weight.detach().numpy())
    blocks = np.fft.fft2(kernel, shape[1:], axes=(0, 1))
    assert spectral_norm(layer) == pytest.approx(np.linalg.svd(blocks)[1].max(), rel=1e-8)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_the_norm_of_a_matrix_is_its_largest_singular_value(shape):
    model = nn.Linear(*shape).double()
    (layer,) = weight_layers(model, (torch.zeros(1, shape[0]).double(), torch.tensor([0])))
    expected = float(torch.linalg.svdvals(model.weight.detach())[0])
    assert spectral_norm(layer) == pytest.approx(expected, rel=1e-12)


def test_folding_a_batchnorm_by_hand_changes_nothing():
    data = convolutional_data()
    model = convolutional()
    assert spectral_norms(model, data) == pytest.approx(spectral_norms(folded(model), data))


def test_the_products_do_not_depend_on_the_scale_of_a_layer_or_the_order_of_units():
    model, data = relu_network(), relu_data()
    expected = spectral_norms(model, data)
    assert spectral_norms(rescaled(model), data) == pytest.approx(expected)
    assert spectral_norms(permuted(model), data) == pytest.approx(expected)


def test_scaling_every_weight_cancels_in_the_margin_forms():
    model, data = relu_network(), relu_data()
    before, after = spectral_norms(model, data), spectral_norms(scaled(model, 3.0), data)
    assert after["log_product"] == pytest.approx(before["log_product"] + 6 * math.log(3.0))
    for form in ("log_product_over_margin", "log_sum_over_margin", "log_complexity"):
        assert after[form] == pytest.approx(before[form])


def test_the_forms_are_the_formulas():
    model, data = relu_network(), relu_data()
    s = [float(torch.linalg.svdvals(model[i].weight.data)[0]) for i in (0, 2, 4)]
    f = [float(model[i].weight.data.square().sum()) for i in (0, 2, 4)]
    values = spectral_norms(model, data)
    product = math.prod(x**2 for x in s)
    assert values["log_product"] == pytest.approx(math.log(product))
    assert values["log_sum"] == pytest.approx(math.log(3 * product ** (1 / 3)))
    rank = sum(a / b**2 for a, b in zip(f, s, strict=True))
    assert values["stable_rank"] == pytest.approx(rank)
    assert values["log_complexity"] == pytest.approx(
        values["log_product_over_margin"] + math.log(rank)
    )


def test_a_layer_that_is_zero_is_refused_by_name():
    model = relu_network()
    model[2].weight.data.zero_()
    with pytest.raises(ModelError, match=r"2\.weight|margins is 0"):
        spectral_norms(model, relu_data())


def test_a_convolution_that_is_never_called_is_refused_by_name():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(3, 2), nn.Conv2d(1, 1, 3)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ModelError, match=r"spare\.weight"):
        spectral_norms(Spare(), (torch.randn(4, 3), torch.tensor([0, 1, 0, 1])))
