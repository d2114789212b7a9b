import itertools

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
from sklearn.metrics import davies_bouldin_score
from torch import nn
from torch.nn import functional as F

from sharpkit.errors import DataError
from sharpkit.measures import davies_bouldin_mixup


def blocks(n, size, seed=0):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return [order[i : i + size] for i in range(0, n - size + 1, size)] or [order]


def by_loops(model, features, x, y, classes):
    """The winner's definition: blocks of 120, and all pairs in blocks of 10 examples a class."""
    index = np.mean([davies_bouldin_score(features[b], y[b]) for b in blocks(len(y), 120)])
    shares = {c: [] for c in range(classes)}
    for block in blocks(len(y), 10 * classes):
        for c in range(classes):
            pairs = list(itertools.combinations([i for i in block if y[i] == c], 2))
            wrong = [int(model((x[i : i + 1] + x[j : j + 1]) / 2).argmax()) != c for i, j in pairs]
            if pairs:
                shares[c].append(np.mean(wrong))
    return index, np.mean([np.mean(s) for s in shares.values() if s])


def test_it_is_the_winners_definition_written_as_loops():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 81, 3)
    ).double()
    x = torch.randn(250, 1, 9, 9).double()
    y = model(x + 0.3 * torch.randn(x.shape)).argmax(1)
    with torch.no_grad():
        maps = F.max_pool2d(model[:2](x), 4).flatten(1)  # 2 x 2 of 9 x 9
        index, mixup = by_loops(model, maps.numpy(), x, y.numpy(), 3)
    found = davies_bouldin_mixup(model, (x, y))
    assert found == pytest.approx(
        {"product": index * mixup, "davies_bouldin": index, "mixup": mixup}
    )
    assert mixup > 0


def test_a_dense_network_is_measured_at_its_first_layer_and_another_can_be_named():
    model, (x, y) = relu_network(bias=True), relu_data()
    with torch.no_grad():
        first, second = model[:2](x).numpy(), model[:4](x).numpy()
    assert davies_bouldin_mixup(model, (x, y))["davies_bouldin"] == pytest.approx(
        davies_bouldin_score(first, y.numpy())
    )
    found = davies_bouldin_mixup(model, (x, y), layer="3")
    assert found["davies_bouldin"] == pytest.approx(davies_bouldin_score(second, y.numpy()))


def test_it_survives_rescaling_and_permutation():
    model, data = relu_network(bias=True), relu_data()
    expected = davies_bouldin_mixup(model, data)
    for other in (rescaled(model), permuted(model)):
        assert davies_bouldin_mixup(other, data) == pytest.approx(expected)


def test_maps_smaller_than_the_window_are_pooled_whole():
    model, (x, y) = convolutional(), convolutional_data()
    small = nn.Sequential(nn.AvgPool2d(2), model[0], nn.Flatten(), nn.Linear(45, 3)).double()
    with torch.no_grad():
        rows = model[0](F.avg_pool2d(x, 2)).amax((2, 3)).numpy()
    found = davies_bouldin_mixup(small, (x, y))
    assert found["davies_bouldin"] == pytest.approx(davies_bouldin_score(rows, y.numpy()))


def test_what_cannot_be_mixed_or_clustered_is_refused():
    model, (x, y) = relu_network(), relu_data()
    with pytest.raises(DataError, match="no class has two"):
        davies_bouldin_mixup(model, (x[:3], torch.tensor([0, 1, 2])))
    with pytest.raises(DataError, match="at least 2 classes"):
        davies_bouldin_mixup(model, (x, torch.zeros_like(y)))
