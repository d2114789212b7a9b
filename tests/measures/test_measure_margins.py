import math

import numpy as np
import pytest
import torch
from measure_helpers import permuted, relu_data, relu_network, rescaled, scaled
from torch import nn

from sharpkit.errors import ArgumentError, DataError, ModelError
from sharpkit.measures import inverse_margin, normalized_margin, output_margin, training_loss


def test_the_margin_is_the_percentile_of_a_loop_over_examples():
    model, (x, y) = relu_network(), relu_data()
    y = y.roll(1)  # some are wrong
    by_hand = []
    for output, label in zip(model(x).detach(), y.tolist(), strict=True):
        others = [float(z) for j, z in enumerate(output) if j != label]
        by_hand.append(float(output[label]) - max(others))
    for percentile in (0, 10, 50, 100):
        assert output_margin(model, (x, y), percentile=percentile) == pytest.approx(
            np.percentile(by_hand, percentile)
        )
    expected = np.percentile(by_hand, 10) ** -2
    assert inverse_margin(model, (x, y)) == pytest.approx(expected)


def test_margins_survive_rescaling_and_permutation():
    model, data = relu_network(bias=True), relu_data()
    expected = output_margin(model, data)
    assert output_margin(rescaled(model), data) == pytest.approx(expected)
    assert output_margin(permuted(model), data) == pytest.approx(expected)


def test_the_margin_scales_with_the_last_layer_and_the_normalised_margin_does_not():
    model, (x, y) = relu_network(), relu_data()
    assert output_margin(scaled(model, 2.0), (x, y)) == pytest.approx(
        8 * output_margin(model, (x, y))
    )
    expected = normalized_margin(model, (x, y))
    assert normalized_margin(scaled(model, 2.0), (x, y)) == pytest.approx(expected)
    assert normalized_margin(model, (7 * x, y)) == pytest.approx(expected)
    assert normalized_margin(rescaled(model), (x, y)) == pytest.approx(expected)


def test_the_normalised_margin_is_the_formula_and_keeps_the_sign():
    model, (x, y) = relu_network(), relu_data()
    y = y.roll(1)
    bound = math.prod(float(torch.linalg.svdvals(model[i].weight.data)[0]) for i in (0, 2, 4))
    expected = output_margin(model, (x, y)) / (bound * float(x.norm(dim=1).mean()))
    assert expected < 0
    assert normalized_margin(model, (x, y)) == pytest.approx(expected)


def test_the_loss_is_torchs_and_has_the_error_of_a_mean():
    model, (x, y) = relu_network(), relu_data()
    losses = nn.functional.cross_entropy(model(x), y, reduction="none").detach()
    value, error = training_loss(model, (x, y))
    assert value == pytest.approx(float(losses.mean()))
    assert error == pytest.approx(float(losses.std()) / len(x) ** 0.5)


def test_bad_requests_say_what_was_expected():
    model, (x, y) = relu_network(), relu_data()
    with pytest.raises(ArgumentError, match="between 0 and 100"):
        output_margin(model, (x, y), percentile=101)
    with pytest.raises(DataError, match="at least two outputs"):
        output_margin(nn.Linear(6, 1).double(), (x, torch.zeros_like(y)))
    zero = scaled(model, 0.0)
    with pytest.raises(ModelError, match="margins is 0"):
        inverse_margin(zero, (x, y))
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError):
        output_margin(model, (x, y))
