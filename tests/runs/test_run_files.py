"""Files of runs with fields of other types: refused by the file's and the field's name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import sharpkit as sk
from sharpkit.errors import DataError, ModelError, RunError
from sharpkit.runs.checkpoints import load_arrays, load_checkpoint
from sharpkit.runs.trained import load_trained, same_examples, trained_data
from sharpkit.training import build_architecture


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A network as `sharpkit train` leaves it, with its data."""
    folder = tmp_path_factory.mktemp("run")
    model = build_architecture("nin-4x1", (1, 4, 4), 3, seed=0)
    save_file(model.state_dict(), folder / "model.safetensors")
    x = np.arange(96, dtype=np.uint8).reshape(6, 4, 4)
    y = np.arange(6) % 3
    np.savez(folder / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    return folder


def write_config(run, **changes):
    provenance = {
        "architecture": "nin-4x1",
        "input_shape": [1, 4, 4],
        "classes": 3,
        "data": str(run / "data.npz"),
        "root": None,
    }
    config = {"label_noise": 0.5, "seed": 1, "provenance": provenance}
    for name, value in changes.items():
        (config if name in config else provenance)[name] = value
    (run / "config.json").write_text(json.dumps(config))


def use(run):
    model, (train, _) = load_trained(run), trained_data(run)
    assert same_examples(run, run)
    return model(train.tensors[0])


def test_what_train_writes_is_read(run):
    write_config(run)
    assert use(run).shape == (6, 3)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architecture", 5, "architecture is 5, expected text"),
        ("architecture", "wrn-9-1", "expected a depth of 6n"),
        ("architecture", "resnet" + 5000 * "9", "numbers of at most five digits"),
        ("architecture", "resnet٢٠", "unknown architecture"),
        ("input_shape", None, "input_shape is None, expected a list of sizes"),
        ("input_shape", [1, "4", 4], "input_shape is .*, expected a list of sizes"),
        ("input_shape", [1, 4, 10**400], "an integer of more than 300 digits"),
        ("input_shape", [4, 4], "needs inputs of shape"),
        ("classes", True, "classes is True, expected a whole number"),
        ("classes", 10**30, "classes is 10+, expected a whole number"),
        ("data", ["x"], r"data is \['x'\], expected text"),
        ("data", "nowhere.npz2", "unknown data set 'nowhere.npz2'"),
        ("data", "\ud800", "half of a surrogate pair"),
        ("root", 5, "root is 5, expected text or null"),
        ("root", "/nowhere", "root is for fashion-mnist"),
        ("label_noise", "0.5", "label_noise is '0.5', expected 0 to 1"),
        ("label_noise", float("nan"), "label_noise is nan, expected 0 to 1"),
        ("seed", -1, "seed is -1, expected a whole number >= 0"),
        ("seed", 1.5, "seed is 1.5, expected a whole number >= 0"),
        ("provenance", [], "not JSON with a provenance"),
    ],
)
def test_fields_of_config_json_are_checked(run, field, value, message):
    write_config(run, **{field: value})
    with pytest.raises(RunError, match=rf"config.json.*{message}"):
        use(run)


@pytest.mark.parametrize("key", [0, None, ("a",), 1.5])
def test_names_of_tensors_are_text(tmp_path, key):
    torch.save({key: torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"a.pt: expected names of tensors, found the key"):
        load_checkpoint(tmp_path / "a.pt", lambda: nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["x_train", "y_train"])
def test_single_numbers_are_no_examples(tmp_path, name):
    path = tmp_path / "a.npz"
    np.savez(path, **{"x_train": np.zeros((2, 3)), "y_train": np.zeros(2, int), name: np.array(1)})
    with pytest.raises(DataError, match=r"a.npz: expected x_train of shape \(n, \.\.\.\)"):
        load_arrays(path)


# --- checkpoints of a training ----------------------------------------------------------------


def fit(out, **settings):
    torch.manual_seed(0)
    data = torch.arange(32.0).reshape(8, 4) / 32, torch.arange(8) % 3
    model = nn.Linear(4, 3)
    try:
        return sk.fit(
            model, data, epochs=2, batch_size=4, lr=0.1, out=out, progress=False, **settings
        )
    except Exception:
        torch.manual_seed(0)
        assert torch.equal(model.weight, nn.Linear(4, 3).weight), "nothing is half restored"
        raise


def changed(content, place, value):
    *path, last = place
    for name in path:
        content = content[name]
    content[last] = value


PLACES = {
    ("config",): 5,
    ("model",): [1],
    ("model", "weight"): torch.zeros(3, 5),
    ("model", "bias"): None,
    ("model", "more"): torch.zeros(1),
    ("optimizer",): None,
    ("optimizer", "state"): [],
    ("optimizer", "state", 0, "momentum_buffer"): torch.zeros(2),
    ("optimizer", "state", 7): {"momentum_buffer": torch.zeros(2)},
    ("optimizer", "param_groups"): [],
    ("optimizer", "param_groups", 0, "momentum"): "0.9",
    ("optimizer", "param_groups", 0, "params"): [1, 0],
    ("history",): {"epoch": 1},
    ("history", 0): 3,
    ("history", 0, "epoch"): 2,
    ("history", 0, "loss"): "low",
}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_fields_of_a_checkpoint_are_checked(tmp_path, place):
    fit(tmp_path)
    path = tmp_path / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    changed(content, place, PLACES[place])
    torch.save(content, path)
    with pytest.raises(RunError, match=r"checkpoint.pt: the checkpoint is corrupt; remove it"):
        fit(tmp_path)


def test_a_file_where_tensorboard_writes_is_told(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").touch()
    with pytest.raises(RunError, match=r"tensorboard: cannot be written \(File exists\)"):
        fit(tmp_path, tensorboard=True)
