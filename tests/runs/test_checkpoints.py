"""A user's own checkpoints: read without unpickling, refused with a reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sharpkit.datasets import load_dataset
from sharpkit.errors import ArgumentError, DataError, ModelError
from sharpkit.importing import import_callable
from sharpkit.runs.checkpoints import load_arrays, load_checkpoint

MODULE = """
from torch import nn

def small():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

def text():
    return "no module"

number = 3
"""
BROKEN = {"syntax": "def f(:\n", "value": "raise ValueError('no data here')\n"}


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(MODULE)
    for name, text in BROKEN.items():
        (tmp_path / f"broken_{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).state_dict()


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_reads_what_training_scripts_write(working_directory, key, kind):
    path = working_directory / f"weights.{kind}"
    if kind == "safetensors":
        save_file(state(), path)
    else:
        torch.save({key: state(), "epoch": 3} if key else state(), path)
    model = load_checkpoint(path, "my_models:small")
    assert not model.training
    assert all(torch.equal(v, state()[k]) for k, v in model.state_dict().items())


def test_never_unpickles(working_directory):
    class Evil:
        def __reduce__(self):
            return (open, (str(working_directory / "written"), "w"))

    torch.save({"state_dict": Evil()}, "evil.pt")
    with pytest.raises(ModelError, match="cannot be read as plain tensors"):
        load_checkpoint("evil.pt", "my_models:small")
    np.savez("evil.npz", x_train=np.array([Evil()], dtype=object), y_train=np.zeros(1))
    with pytest.raises(DataError, match="not a readable"):
        load_arrays("evil.npz")
    assert not (working_directory / "written").exists()


def test_names_what_is_wrong_with_a_checkpoint(working_directory):
    with pytest.raises(ModelError, match="no such checkpoint"):
        load_checkpoint("absent.pt", "my_models:small")
    save_file({"0.weight": torch.zeros(8, 5)}, "other.safetensors")
    with pytest.raises(ModelError, match=r"other\.safetensors does not fit.*0\.weight"):
        load_checkpoint("other.safetensors", "my_models:small")
    (working_directory / "cut.safetensors").write_bytes(b"\x08\x00\x00")
    with pytest.raises(ModelError, match=r"cut\.safetensors: cannot be read"):
        load_checkpoint("cut.safetensors", "my_models:small")
    torch.save([1, 2], "list.pt")
    with pytest.raises(ModelError, match="expected a state dict"):
        load_checkpoint("list.pt", "my_models:small")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_models", "module:callable"),
        ("no_such_module:f", "cannot import"),
        ("my_models:absent", "cannot import"),
        ("my_models:number", "not callable"),
        ("broken_syntax:f", r"cannot import.*SyntaxError: .*broken_syntax\.py, line 1"),
        ("broken_value:f", "cannot import.*ValueError: no data here"),
    ],
)
def test_names_what_is_wrong_with_a_builder(name, message):
    with pytest.raises(ArgumentError, match=message):
        import_callable(name)


def test_a_builder_must_give_a_module():
    torch.save(state(), "weights.pt")
    with pytest.raises(ArgumentError, match="returned str"):
        load_checkpoint("weights.pt", "my_models:text")


def test_reads_arrays(working_directory):
    x, y = np.random.default_rng(0).normal(size=(6, 4)), np.arange(6) % 3
    np.savez("data.npz", x_train=x, y_train=y.astype(np.int32))
    inputs, labels = load_arrays("data.npz").tensors
    assert inputs.dtype == torch.float32
    assert labels.tolist() == y.tolist()
    with pytest.raises(DataError, match="x_test and y_test"):
        load_arrays("data.npz", "test")
    np.savez("uneven.npz", x_train=x, y_train=y[:-1])
    with pytest.raises(DataError, match="6 examples, y_train has 5"):
        load_arrays("uneven.npz")
    with pytest.raises(DataError, match="not a readable"):
        load_arrays("absent.npz")


def test_images_of_bytes_are_read_as_in_training(working_directory):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 6), ("test", 4)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (n, 5, 5, 3)).astype(np.uint8)
        arrays[f"y_{split}"] = np.arange(n) % 3
    np.savez("images.npz", **arrays)
    for split, expected in zip(("train", "test"), load_dataset("images.npz"), strict=True):
        found = load_arrays("images.npz", split)
        assert found.tensors[0].shape[1:] == (3, 5, 5)
        assert all(map(torch.equal, found.tensors, expected.tensors))
    np.savez("half.npz", x_train=arrays["x_train"], y_train=arrays["y_train"])
    with pytest.raises(DataError, match=r"uint8.*give x_train, .*, y_test; or .*float"):
        load_arrays("half.npz")
