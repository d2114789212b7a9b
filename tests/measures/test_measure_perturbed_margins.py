import numpy as np
import pytest
import torch
from measure_helpers import (
    convolutional,
    convolutional_data,
    permuted,
    relu_data,
    relu_network,
    rescaled,
)
from scipy.stats import trim_mean

from sharpkit.errors import ArgumentError, DataError, ModelError
from sharpkit.measures import augmented_margin, mixup_margin
from sharpkit.measures.perturbed_margins import trimmed_mean
from sharpkit.measures.robustness import moved, same_class_pairs


def by_loops(model, cut, x, y):
    rows = model[:cut](x).detach()
    distances = []
    for row, label in zip(rows, y.tolist(), strict=True):
        row = row[None].clone().requires_grad_()
        z = model[cut:](row)[0]
        gamma = z[label] - torch.cat([z[:label], z[label + 1 :]]).max()
        (slope,) = torch.autograd.grad(gamma, row)
        distances.append(float(gamma.detach() / (slope.norm() + 1e-7)))
    spread = trim_mean(np.var(rows.flatten(1).numpy(), axis=0), 0.05) ** 0.5
    return np.mean(distances) / (spread + 1e-7)


def test_the_mixup_margin_is_a_loop_over_the_midpoints():
    model, (x, y) = relu_network(bias=True), relu_data()
    chosen, partner = same_class_pairs(y, torch.Generator().manual_seed(4))
    midpoints = (x[chosen] + x[partner]) / 2
    found = mixup_margin(model, (x, y), seed=4)
    assert found.value == pytest.approx(by_loops(model, 2, midpoints, y[chosen]))
    assert found.std_error > 0


def test_the_augmented_margin_is_a_loop_over_the_moved_images():
    model, (x, y) = convolutional(), convolutional_data()
    images = moved(x, 1, True, torch.Generator().manual_seed(2))
    # the convolution is followed by BatchNorm, so its own output is meant
    assert augmented_margin(model, (x, y), shift=1, seed=2).value == pytest.approx(
        by_loops(model, 1, images, y)
    )


def test_an_activation_right_behind_the_first_layer_belongs_to_it():
    model, (x, y) = convolutional(), convolutional_data()
    plain = torch.nn.Sequential(model[0], *model[2:])
    found = augmented_margin(plain, (x, y), shift=0, flip=False)
    assert found.value == pytest.approx(by_loops(plain, 2, x, y))


def test_they_survive_rescaling_and_permutation():
    model, data = relu_network(), relu_data()
    expected = mixup_margin(model, data).value
    for other in (rescaled(model), permuted(model)):
        assert mixup_margin(other, data).value == pytest.approx(expected, rel=1e-4)


def test_the_trimmed_mean_is_scipys():
    values = torch.randn(57, generator=torch.Generator().manual_seed(0)).double()
    assert trimmed_mean(values) == pytest.approx(trim_mean(values.numpy(), 0.05))


def test_bad_requests_say_what_was_expected():
    model, (x, y) = relu_network(), relu_data()
    with pytest.raises(DataError, match="no class has two"):
        mixup_margin(model, (x[:3], torch.tensor([0, 1, 2])))
    with pytest.raises(DataError, match="expected images"):
        augmented_margin(model, (x, y))
    with pytest.raises(ArgumentError, match="shift"):
        augmented_margin(convolutional(), convolutional_data(), shift=-1)
    with pytest.raises(ModelError, match="the same for all"):
        mixup_margin(model, (x[:1].repeat(4, 1), y[:1].repeat(4)))
