import pytest
import torch
from measure_helpers import convolutional, convolutional_data, folded
from torch import nn

from sharpkit.errors import ModelError
from sharpkit.measures.weight_layers import initial_layers, weight_layers

DATA = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 1])


def names(model, data):
    return [layer.name for layer in weight_layers(model, data)]


def test_a_batchnorm_is_folded_into_the_layer_before_it():
    model, data = convolutional(), convolutional_data()
    assert torch.allclose(folded(model)(data[0]), model(data[0]))
    ours, reference = weight_layers(model, data), weight_layers(folded(model), data)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a.weight, b.weight, rtol=1e-12, atol=0)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_batchnorm_after_an_activation_is_not_folded(inplace):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[2].running_var.fill_(9.0)
    model = model.double()
    assert torch.equal(weight_layers(model, DATA)[0].weight, model[0].weight.data)


def test_a_padding_belongs_to_the_convolution_after_it():
    model, data = convolutional(), convolutional_data()
    layers = weight_layers(model, data)
    assert layers[0].pad is None and layers[0].input_shape == (2, 6, 6)
    assert layers[1].pad is model[3] and layers[1].input_shape == (5, 6, 6)


def test_a_shared_weight_is_listed_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    assert names(model, DATA) == ["0.weight"]


def test_biases_and_layernorm_are_not_layers():
    model = nn.Sequential(nn.LayerNorm((3,)), nn.Linear(3, 2)).double()
    assert names(model, DATA) == ["1.weight"]


def test_attention_weights_are_layers():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double()
    data = torch.zeros(2, 5, 8, dtype=torch.float64), torch.zeros(2, 5, 8)
    assert names(model, data) == [
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    ]


def test_a_model_without_matrices_is_refused():
    with pytest.raises(ModelError, match="no weight matrix"):
        weight_layers(nn.BatchNorm1d(3).double(), DATA)


def test_another_architecture_as_initial_model_is_refused():
    layers = weight_layers(nn.Linear(3, 2).double(), DATA)
    with pytest.raises(ModelError, match=r"expected shape \(2, 3\)"):
        list(initial_layers(layers, nn.Linear(3, 4).double(), DATA))
    deeper = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    with pytest.raises(ModelError, match="no such weight"):
        list(initial_layers(layers, deeper, DATA))
    layers = weight_layers(nn.Sequential(nn.Linear(3, 2)).double(), DATA)
    with pytest.raises(ModelError, match=r"the model lacks: 1\.weight"):
        list(initial_layers(layers, deeper, DATA))
