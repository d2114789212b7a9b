"""Layers become torch modules that compute what Keras computes, or are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sharpkit.errors import ZooFormatError
from sharpkit.zoo import build_model, load_weights

REFERENCE = np.load(Path(__file__).with_name("keras_reference.npz"))
CASES = [key.removesuffix("/config") for key in REFERENCE.files if key.endswith("/config")]


def to_torch(x):
    return torch.from_numpy(x).permute(0, 3, 1, 2) if x.ndim == 4 else torch.from_numpy(x)


def reference_model(case, tmp_path):
    model = build_model(json.loads(str(REFERENCE[f"{case}/config"])), device="meta")
    if f"{case}/weights" in REFERENCE:
        path = tmp_path / "weights.hdf5"
        path.write_bytes(REFERENCE[f"{case}/weights"].tobytes())
        load_weights(model, path)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_every_layer_gives_keras_outputs(case, tmp_path):
    model = reference_model(case, tmp_path)
    with torch.no_grad():
        outputs = model(to_torch(REFERENCE[f"{case}/inputs"]))
    expected = to_torch(REFERENCE[f"{case}/outputs"])
    assert tuple(outputs.shape[1:]) == model.output_shape
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_every_layer_can_be_vectorised_and_differentiated(case, tmp_path):
    model = reference_model(case, tmp_path)
    x = to_torch(REFERENCE[f"{case}/inputs"])
    singles = torch.func.vmap(lambda one: model(one[None])[0])(x)
    torch.testing.assert_close(singles, model(x), atol=1e-5, rtol=1e-5)
    parameters = dict(model.named_parameters())
    if not parameters:
        return

    def loss(p, one):
        return torch.func.functional_call(model, p, (one[None],)).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for name, gradient in gradients.items():
        assert gradient.shape == (len(x), *parameters[name].shape)
        assert torch.isfinite(gradient).all()


def config(*layers, input_shape=(6, 6, 3)):
    return {"input_shape": list(input_shape), "model_config": list(layers)}


def conv(**keywords):
    return {"layer_name": "Conv2D", "filters": 2, "kernel_size": 3, **keywords}


BAD_LAYERS = {
    "unknown layer; supported": {"layer_name": "LSTM", "units": 3},
    "unknown keyword 'colour'": conv(colour=1),
    "'data_format'": conv(data_format="channels_first"),
    "'padding' is 'causal'": conv(padding="causal"),
    "'padding' is 1": conv(padding=1),
    "'activation' is 'snake'": conv(activation="snake"),
    r"'activation' is \['relu'\]": conv(activation=["relu"]),
    "'filters' is 2.5": conv(filters=2.5),
    "'filters' is -1": conv(filters=-1),
    "'filters' is True": conv(filters=True),
    "'kernel_size' is 'three'": conv(kernel_size="three"),
    r"'kernel_size' is \[1, 2, 3\]": conv(kernel_size=[1, 2, 3]),
    "'strides' is 0": conv(strides=0),
    "cannot both exceed 1": conv(strides=2, dilation_rate=2),
    "do not divide": conv(groups=2),
    "does not fit": conv(kernel_size=7),
    "'use_bias' is 'yes'": conv(use_bias="yes"),
    "'dtype' is 'float16'": conv(dtype="float16"),
    "'input_shape' is": conv(input_shape=[1, 2, 3]),
    "'units' is missing": {"layer_name": "Dense"},
    "'axis' is 1": {"layer_name": "BatchNormalization", "axis": 1},
    r"'axis' is \[1, 2, 3\]": {"layer_name": "LayerNormalization", "axis": [1, 2, 3]},
    "'renorm' is True": {"layer_name": "BatchNormalization", "renorm": True},
    "'rate' is 2": {"layer_name": "Dropout", "rate": 2},
    "'target_shape'": {"layer_name": "Reshape", "target_shape": [5, 5]},
    "'dims'": {"layer_name": "Permute", "dims": [1, 1, 2]},
    "'shared_axes'": {"layer_name": "PReLU", "shared_axes": [7]},
    "'layer_name' must be": {"units": 3},
    "expected a dict": 3,
    "too large": {"layer_name": "Dense", "units": 10**14},
    "torch can build": {"layer_name": "Dense", "units": 10**20},
}


@pytest.mark.parametrize("message", BAD_LAYERS)
def test_what_is_not_understood_is_refused_with_model_and_layer(message):
    with pytest.raises(ZooFormatError, match=message) as caught:
        build_model(config(BAD_LAYERS[message]), model_name="model_7/config.json")
    assert "model_7/config.json: layer 0" in str(caught.value)


def test_the_error_names_the_layer_by_its_index():
    layers = [conv(), {"layer_name": "Flatten"}, {"layer_name": "Dense", "units": 2, "bias": 1}]
    with pytest.raises(ZooFormatError, match=r"m: layer 2 \(Dense\): unknown keyword 'bias'"):
        build_model(config(*layers), model_name="m")


@pytest.mark.parametrize(
    "bad",
    [
        3,
        {},
        {"model_config": [], "input_shape": [3]},
        {"model_config": [{"layer_name": "Flatten"}]},
        {"model_config": [{"layer_name": "Flatten"}], "input_shape": [3, 0]},
        {"model_config": [{"layer_name": "Flatten"}], "input_shape": [3, "x"]},
        {"model_config": [{"layer_name": "Flatten"}], "input_shape": [float("nan")]},
    ],
)
def test_a_config_of_another_form_is_refused(bad):
    with pytest.raises(ZooFormatError, match="model"):
        build_model(bad)


def test_a_layer_that_needs_a_map_says_so():
    with pytest.raises(ZooFormatError, match="needs a feature map"):
        build_model(config({"layer_name": "MaxPooling2D"}, input_shape=[5]))


def test_an_input_layer_inside_the_network_is_refused():
    with pytest.raises(ZooFormatError, match="first layer"):
        build_model(config(conv(), {"layer_name": "InputLayer"}))


def test_keywords_that_do_not_change_inference_are_accepted():
    plain = build_model(config(conv()))
    inert = conv(name="x", trainable=False, kernel_initializer="zeros", dtype="float32", seed=3)
    assert str(build_model(config(inert))) == str(plain)


def test_too_many_parameters_are_refused_before_they_are_allocated():
    layer = {"layer_name": "Dense", "units": 2**31}
    with pytest.raises(ZooFormatError, match="parameters"):
        build_model(config(layer, input_shape=[1024]))


def test_modules_are_named_after_their_keras_layers():
    model = build_model(config(conv(activation="relu", padding="same", strides=2), conv()))
    assert list(dict(model.named_children())) == [
        "conv2d_pad", "conv2d", "conv2d_activation", "conv2d_1",
    ]  # fmt: skip
