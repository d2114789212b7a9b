"""What the tests of the zoo share."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sharpkit.zoo import ZooWriter, build_model

collect_ignore = ["make_keras_reference.py"]  # needs TensorFlow; run by hand

CONFIG = {
    "input_shape": [5, 4, 2],
    "model_config": [
        {"layer_name": "Conv2D", "filters": 3, "kernel_size": 3, "padding": "same"},
        {"layer_name": "BatchNormalization"},
        {"layer_name": "ReLU"},
        {"layer_name": "Flatten"},
        {"layer_name": "Dense", "units": 3},
    ],
}


@pytest.fixture
def network():
    """A small network with trained-looking BatchNorm statistics, in eval mode."""
    torch.manual_seed(0)
    model = build_model(CONFIG)
    model(torch.randn(8, *model.input_shape))
    return model.eval()


@pytest.fixture
def zoo_path(tmp_path, network) -> Path:
    """A zoo of four models on a complete 2 x 2 grid, written by the package."""
    writer = ZooWriter(tmp_path / "zoo", shard_size=4)
    inputs, labels = torch.randn(10, 2, 5, 4), torch.arange(10) % 3
    writer.write_dataset("tiny", "train", inputs, labels)
    writer.write_dataset("tiny", "test", inputs[:6] + 1, labels[:6])
    grid = {"width": [1, 2], "kind": ["a", "b"]}
    for k, id_ in enumerate((2, 10, 1, 33)):
        writer.write_model(
            "tiny",
            id_,
            network,
            initial=build_model(CONFIG),
            hyperparameters={"width": grid["width"][k % 2], "kind": grid["kind"][k // 2]},
            possible_values=grid,
            metrics={"train_acc": 0.9, "test_acc": 0.8 - 0.01 * k},
        )
    return tmp_path / "zoo"


@pytest.fixture
def reference():
    """What Keras computed; see make_keras_reference.py."""
    return np.load(Path(__file__).with_name("keras_reference.npz"))
