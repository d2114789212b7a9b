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
from torch import nn

from sharpkit.errors import ArgumentError, DataError
from sharpkit.measures import davies_bouldin
from sharpkit.measures.representations import features


def index(rows, labels):
    """The definition, written as loops."""
    rows, labels = np.asarray(rows, dtype=float), np.asarray(labels)
    classes = sorted(set(labels.tolist()))
    centres = {c: rows[labels == c].mean(0) for c in classes}
    spread = {
        c: np.mean([np.linalg.norm(r - centres[c]) for r in rows[labels == c]]) for c in classes
    }
    worst = [
        max(
            (spread[a] + spread[b]) / np.linalg.norm(centres[a] - centres[b])
            for b in classes
            if b != a
        )
        for a in classes
    ]
    return np.mean(worst)


def test_the_index_is_the_definition_on_the_last_hidden_layer():
    model, (x, y) = relu_network(), relu_data()
    with torch.no_grad():
        hidden = model[:4](x)
    assert davies_bouldin(model, (x, y)) == pytest.approx(index(hidden, y))


def test_a_layer_can_be_chosen_and_feature_maps_are_pooled():
    model, (x, y) = convolutional(), convolutional_data()
    with torch.no_grad():
        maps = model[:3](x)
    pooled = davies_bouldin(model, (x, y), layer="2")
    assert pooled == pytest.approx(index(maps.mean((2, 3)), y))
    flat = davies_bouldin(model, (x, y), layer="2", pool=False)
    assert flat == pytest.approx(index(maps.flatten(1), y))


def test_the_index_survives_rescaling_and_permutation():
    model, data = relu_network(bias=True), relu_data()
    for other in (rescaled(model), permuted(model)):
        for layer in ("1", "3"):
            assert davies_bouldin(other, data, layer=layer) == pytest.approx(
                davies_bouldin(model, data, layer=layer)
            )


def test_features_keep_the_order_of_the_data():
    model, (x, y) = relu_network(), relu_data()
    rows, labels = features(model, (x.repeat(4, 1), y.repeat(4)), layer="4")
    torch.testing.assert_close(rows, model(x.repeat(4, 1)).detach())
    assert torch.equal(labels, y.repeat(4))


def test_bad_requests_say_what_was_expected():
    model, (x, y) = relu_network(), relu_data()
    with pytest.raises(ArgumentError, match="no such module"):
        davies_bouldin(model, (x, y), layer="conv")
    with pytest.raises(DataError, match="1 classes among"):
        davies_bouldin(model, (x, torch.zeros_like(y)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in nn.Module.modules(model))
