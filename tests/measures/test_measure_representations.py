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
)
from torch import nn

from sharpkit.errors import ArgumentError, DataError, ModelError
from sharpkit.measures import davies_bouldin, effective_rank, representation_variance
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


def test_the_variance_within_classes_is_one_minus_the_share_that_the_class_explains():
    model, (x, y) = relu_network(bias=True), relu_data()
    with torch.no_grad():
        hidden = model[:4](x).numpy()
    centres = np.stack([hidden[y.numpy() == label].mean(0) for label in y.tolist()])
    explained = ((centres - hidden.mean(0)) ** 2).sum() / ((hidden - hidden.mean(0)) ** 2).sum()
    assert representation_variance(model, (x, y)) == pytest.approx(1 - explained)


def test_collapsed_classes_have_no_variance_and_useless_features_nothing_else():
    x = torch.tensor([[1.0], [1.0], [3.0], [3.0]])
    model = nn.Linear(1, 2)
    assert representation_variance(model, (x, torch.tensor([0, 0, 1, 1]))) == 0.0
    assert representation_variance(model, (x, torch.tensor([0, 1, 0, 1]))) == 1.0
    with pytest.raises(ModelError, match="the same for all examples"):
        representation_variance(model, (torch.ones(4, 1), torch.tensor([0, 0, 1, 1])))
    with pytest.raises(DataError, match="1 classes among"):
        representation_variance(model, (x, torch.tensor([0, 0, 0, 0])))


def entropy_rank(matrix):
    values = np.linalg.svd(matrix, compute_uv=False)
    share = values / values.sum()
    share = share[share > 0]
    return np.exp(-(share * np.log(share)).sum())


def test_effective_ranks_are_the_definition():
    model, (x, y) = convolutional(), convolutional_data()
    found = effective_rank(model, (x, y))
    with torch.no_grad():
        hidden = model[:7](x).numpy()
    assert found["representation"] == pytest.approx(entropy_rank(hidden - hidden.mean(0)))
    weights = [p.data.flatten(1).numpy() for p in folded(model).parameters() if p.ndim > 1]
    assert found["weights"] == pytest.approx(np.mean([entropy_rank(w) for w in weights]))


def test_equal_directions_count_fully_and_a_rank_of_one_is_one():
    model = nn.Linear(4, 4, bias=False).double()
    model.weight.data = 3 * torch.linalg.qr(torch.randn(4, 4).double())[0]
    x = torch.cat([torch.eye(4), -torch.eye(4)]).double()
    found = effective_rank(model, (x, torch.zeros(8).long()))
    assert found == pytest.approx({"representation": 4.0, "weights": 4.0})
    model.weight.data = torch.outer(torch.arange(4.0), torch.ones(4)).double()
    assert effective_rank(model, (x, torch.zeros(8).long()))["weights"] == pytest.approx(1.0)


def test_the_new_indices_survive_rescaling_and_permutation():
    model, data = relu_network(bias=True), relu_data()
    for other in (rescaled(model), permuted(model)):
        assert effective_rank(other, data) == pytest.approx(effective_rank(model, data))
        assert representation_variance(other, data) == pytest.approx(
            representation_variance(model, data)
        )


def test_nothing_has_no_rank():
    model, (x, y) = relu_network(), relu_data()
    with pytest.raises(ModelError, match="the same for all examples"):
        effective_rank(model, (x[:1].repeat(3, 1), y[:1].repeat(3)))
    model[4].weight.data.zero_()
    with pytest.raises(ModelError, match="a weight is zero"):
        effective_rank(model, (x, y))
