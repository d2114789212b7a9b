import itertools
import math

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

from sharpkit.errors import DataError, ModelError
from sharpkit.measures import (
    depth,
    distance_from_initial,
    frobenius_norms,
    output_margin,
    parameter_count,
    path_norm,
    spectral_norms,
)


def test_size_is_counted_by_hand():
    model, data = convolutional(), convolutional_data()
    assert parameter_count(model) == 2 * 5 * 9 + 5 + 10 + 5 * 4 * 9 + 36 * 3 + 3
    assert depth(model, data) == 3


def test_the_frobenius_forms_are_the_formulas():
    model, data = relu_network(), relu_data()
    squares = [float(model[i].weight.data.square().sum()) for i in (0, 2, 4)]
    gamma = output_margin(model, data)
    values = frobenius_norms(model, data)
    product = math.prod(squares)
    assert values["sum_of_squares"] == pytest.approx(sum(squares))
    assert values["log_product"] == pytest.approx(math.log(product))
    assert values["log_sum"] == pytest.approx(math.log(3 * product ** (1 / 3)))
    assert values["log_product_over_margin"] == pytest.approx(math.log(product / gamma**2))
    assert values["log_sum_over_margin"] == pytest.approx(
        math.log(3 * (product / gamma**2) ** (1 / 3))
    )


def test_all_frobenius_forms_but_the_sum_of_squares_survive_rescaling():
    model, data = relu_network(), relu_data()
    before, after = frobenius_norms(model, data), frobenius_norms(rescaled(model), data)
    assert after.pop("sum_of_squares") > 1.5 * before.pop("sum_of_squares")
    assert after == pytest.approx(before)
    assert frobenius_norms(permuted(model), data)["log_sum"] == pytest.approx(before["log_sum"])


def brute_force_path_norm(model):
    """Sum over explicit paths; a bias starts paths of its own."""
    layers = [m for m in model if isinstance(m, nn.Linear)]
    total = 0.0
    for start, first in enumerate(layers):
        rest = layers[start + 1 :]
        for units in itertools.product(*(range(m.out_features) for m in layers[start:])):
            tail = math.prod(
                float(m.weight.data[b, a]) ** 2
                for m, (a, b) in zip(rest, itertools.pairwise(units), strict=True)
            )
            if start == 0:
                total += tail * float(first.weight.data[units[0]].square().sum())
            if first.bias is not None:
                total += tail * float(first.bias.data[units[0]]) ** 2
    return total


@pytest.mark.parametrize("bias", [False, True])
def test_the_path_norm_is_a_sum_over_paths(bias):
    model, data = relu_network(bias=bias), relu_data()
    expected = brute_force_path_norm(model)
    values = path_norm(model, data)
    assert values["plain"] == pytest.approx(expected, rel=1e-12)
    assert values["over_margin"] == pytest.approx(expected / output_margin(model, data) ** 2)


def test_the_path_norm_survives_rescaling_and_permutation():
    model, data = relu_network(bias=True), relu_data()
    expected = path_norm(model, data)
    assert path_norm(rescaled(model), data) == pytest.approx(expected)
    assert path_norm(permuted(model), data) == pytest.approx(expected)


def test_the_path_norm_does_not_depend_on_how_a_batchnorm_is_written():
    model, data = convolutional(), convolutional_data()
    assert path_norm(model, data) == pytest.approx(path_norm(folded(model), data))


def test_the_path_norm_of_a_network_of_L_layers_scales_with_the_power_2L():
    model, data = relu_network(), relu_data()
    assert path_norm(scaled(model, 2.0), data)["plain"] == pytest.approx(
        2**6 * path_norm(model, data)["plain"]
    )


def test_the_path_norm_handles_a_batchnorm_that_cannot_be_folded():
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False)).double().eval()
    model[1].running_var.copy_(torch.tensor([3.0, 8.0]) - model[1].eps)
    model[1].running_mean.copy_(torch.tensor([1.0, 0.0]))
    model[2].weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    data = torch.randn(9, 2).double(), torch.zeros(9, dtype=torch.int64)
    # channel 1: slope² 1/3, shift² 1/3; channel 2: slope² 1/8, times weight² 4
    assert path_norm(model, data)["plain"] == pytest.approx(1 / 3 + 1 / 3 + 4 / 8)


class Pooled(nn.Module):
    """One path from every input to every output that it reaches: the path norm is ‖Jacobian‖²."""

    def __init__(self, pool):
        super().__init__()
        self.pool, self.scale = pool, nn.Parameter(torch.tensor(1.5).double())

    def forward(self, x):
        return self.scale * self.pool(x).flatten(1)


@pytest.mark.parametrize(
    ("pool", "shape"),
    [
        (nn.AvgPool2d(2), (2, 5, 5)),
        (nn.AvgPool2d(3, 2, 1), (2, 7, 7)),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), (2, 7, 7)),
        (nn.AvgPool2d(3, 2, ceil_mode=True), (2, 8, 8)),
        (nn.AvgPool2d(2, divisor_override=3), (2, 4, 4)),
        (nn.AdaptiveAvgPool2d(3), (2, 7, 8)),
        (nn.AdaptiveAvgPool2d((2, 5)), (2, 7, 8)),
        (nn.AdaptiveAvgPool2d(1), (2, 7, 8)),
        (nn.AvgPool1d(2), (3, 6)),
        (nn.AdaptiveAvgPool1d(4), (3, 6)),
        (nn.AvgPool3d(2), (1, 4, 4, 4)),
        (nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.AvgPool2d(2)), (1, 3, 3)),
        (lambda x: x.mean((2, 3)), (2, 4, 5)),
        (lambda x: 3 * x - x.flip(1) / 4, (2, 4)),
        (lambda x: torch.sub(x[:, :2], x[:, 2:], alpha=0.5), (4,)),
    ],
)
def test_constants_of_the_network_are_weights_of_its_paths(pool, shape):
    model = Pooled(pool)
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).double()
    jacobian = torch.autograd.functional.jacobian(model, x[:1])
    expected = float(jacobian.square().sum())
    labels = torch.zeros(3, dtype=torch.int64)
    assert path_norm(model, (x, labels))["plain"] == pytest.approx(expected)


def test_padding_before_a_maximum_carries_no_path_and_one_by_a_constant_is_refused():
    layers = nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 2)
    data = torch.randn(5, 1, 3, 3), torch.zeros(5, dtype=torch.int64)
    padded = nn.Sequential(nn.ConstantPad2d((0, 1, 0, 1), -math.inf), *layers)
    expected = sum(float(p.detach().square().sum()) for p in layers[2].parameters())
    assert path_norm(padded, data)["plain"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ModelError, match="constant_pad_nd"):
        path_norm(nn.Sequential(nn.ConstantPad2d((0, 1, 0, 1), 1.0), *layers), data)


def test_average_pooling_divides_by_the_square_of_its_window():
    model = nn.Sequential(
        nn.Conv2d(1, 1, 1, bias=False), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(1, 2, bias=False)
    )
    nn.init.ones_(model[0].weight)
    model[3].weight.data = torch.tensor([[1.0], [0.0]])
    data = torch.randn(5, 1, 2, 2), torch.zeros(5, dtype=torch.int64)
    assert path_norm(model, data)["plain"] == 0.25  # four paths of (1 · ¼ · 1)²


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.Tanh(), "tanh"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.GELU(), "gelu"),
        (nn.SiLU(), "silu"),
        (nn.Softmax(-1), "_softmax"),
        (nn.ReLU6(), "hardtanh"),
        (nn.LayerNorm(4), "native_layer_norm"),
    ],
)
def test_what_is_not_positively_homogeneous_has_no_path_norm(activation, name):
    model = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2))
    with pytest.raises(ModelError, match=f"computes '{name}': leave the path norm out"):
        path_norm(model, (torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)))


def test_products_of_activations_have_no_path_norm():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.a(x) * self.b(x)

    with pytest.raises(ModelError, match="computes 'mul'"):
        path_norm(Gated(), (torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)))


@pytest.mark.parametrize(
    "activation", [nn.ReLU(inplace=True), nn.LeakyReLU(), nn.PReLU(), nn.Dropout(0.5)]
)
def test_positively_homogeneous_activations_keep_the_weights_of_paths(activation):
    model = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2)).double()
    plain = nn.Sequential(model[0], nn.ReLU(), model[2])
    data = torch.randn(5, 3).double(), torch.zeros(5, dtype=torch.int64)
    assert path_norm(model, data)["plain"] == pytest.approx(path_norm(plain, data)["plain"])


def test_tokens_have_no_path_norm():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(DataError, match="path norm"):
        path_norm(model, (torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1])))


def test_distances_are_the_formulas():
    model, initial, data = relu_network(seed=0), relu_network(seed=5), relu_data()
    values = distance_from_initial(model, data, initial=initial)
    changes = [model[i].weight.data - initial[i].weight.data for i in (0, 2, 4)]
    frobenius = [float(c.square().sum()) for c in changes]
    norms = [float(torch.linalg.svdvals(model[i].weight.data)[0]) for i in (0, 2, 4)]
    assert values["frobenius"] == pytest.approx(sum(frobenius))
    assert values["euclidean"] == pytest.approx(math.sqrt(sum(frobenius)))
    assert values["spectral"] == pytest.approx(
        sum(float(torch.linalg.svdvals(c)[0]) ** 2 for c in changes)
    )
    over = spectral_norms(model, data)["log_product_over_margin"]
    ratio = sum(f / s**2 for f, s in zip(frobenius, norms, strict=True))
    assert values["log_complexity"] == pytest.approx(over + math.log(ratio))


def test_distances_survive_a_rescaling_of_both_networks_only_where_they_should():
    model, initial, data = relu_network(seed=0), relu_network(seed=5), relu_data()
    before = distance_from_initial(model, data, initial=initial)
    after = distance_from_initial(rescaled(model), data, initial=rescaled(initial))
    assert after["log_complexity"] == pytest.approx(before["log_complexity"])
    assert after["frobenius"] != pytest.approx(before["frobenius"])
    permutation = distance_from_initial(permuted(model), data, initial=permuted(initial))
    assert permutation == pytest.approx(before)


def test_a_network_that_did_not_move_is_refused():
    with pytest.raises(ModelError, match="equals its initial state"):
        distance_from_initial(relu_network(), relu_data(), initial=relu_network())


def test_another_architecture_is_refused():
    with pytest.raises(ModelError, match="initial model"):
        distance_from_initial(relu_network(), relu_data(), initial=relu_network()[:3])
