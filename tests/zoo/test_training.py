"""A trained zoo depends on grid, recipe, seed and data alone, and survives interruption."""

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from sharpkit.errors import ArgumentError, DataError, ModelError, RunError
from sharpkit.zoo import load_zoo
from sharpkit.zoo.fashion_mnist import fashion_mnist, read_idx
from sharpkit.zoo.recipe import Recipe, train_model
from sharpkit.zoo.training import main, train_zoo

GRID = {"width": [3, 5], "dropout": [0.0, 0.3]}
RECIPE = Recipe(dense_units=8, batch_size=8, target_loss=0.6, max_epochs=200)


def blobs(count: int, seed: int) -> TensorDataset:
    """Noise images whose brightness tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    noise = 0.3 * torch.randn(count, 2, 6, 5, generator=generator)
    return TensorDataset(noise + labels.view(-1, 1, 1, 1) - 1, labels)


TRAIN, TEST = blobs(30, 0), blobs(21, 1)


def train(out, **changes):
    arguments = {"recipe": RECIPE, "shipped_test": 12, "progress": False, **changes}
    grid = arguments.pop("grid", GRID)
    return train_zoo(grid, TRAIN, TEST, out, **arguments)


def weights(path):
    """Every number of every model of a zoo of one task."""
    task = load_zoo(path)["task1"]
    states = {
        (id_, kind, name): tensor
        for id_, entry in task.items()
        for kind in ("final", "initial")
        for name, tensor in entry.load(kind).state_dict().items()
    }
    return task.model_configs, states


def same_zoo(a, b):
    (configs_a, states_a), (configs_b, states_b) = weights(a), weights(b)
    return configs_a == configs_b and all(
        torch.equal(states_a[key], states_b[key]) for key in states_a.keys() | states_b.keys()
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("zoo")
    report = train(path)
    assert report.trained == ["0", "1", "2", "3"]
    assert not report.failed and not report.skipped
    return path


def test_a_trained_zoo_loads_and_its_metrics_are_those_of_its_models(trained):
    task = load_zoo(trained)["task1"]
    assert task.possible_values == GRID
    assert [e.hyperparameters["width"] for e in task.values()] == [3, 3, 5, 5]
    x, y = task.dataset("train").tensors
    test_x, test_y = task.dataset("test").tensors
    assert torch.equal(x, TRAIN.tensors[0]) and torch.equal(test_y, TEST.tensors[1][:12])
    for entry in task.values():
        model = entry.load()
        with torch.no_grad():
            logits, test_logits = model(x), model(test_x)
        loss = torch.nn.functional.cross_entropy(logits.double(), y).item()
        assert entry.metrics["train_loss"] == pytest.approx(loss, rel=1e-6)
        assert loss <= RECIPE.target_loss
        assert entry.metrics["train_acc"] == (logits.argmax(1) == y).double().mean()
        shipped = (test_logits.argmax(1) == test_y).double().mean()
        assert entry.metrics["shipped_test_acc"] == shipped


def test_initial_kernels_are_float16_numbers_and_biases_zero(trained):
    _, states = weights(trained)
    for (_, kind, name), tensor in states.items():
        if kind == "initial":
            assert torch.equal(tensor, tensor.half().float())
            assert name.endswith("weight") or not tensor.any()


def test_neither_workers_nor_random_state_change_a_number(trained, tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    train(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    assert same_zoo(trained, tmp_path / "again")
    report = train(tmp_path / "two", workers=2)
    assert report.trained == ["0", "1", "2", "3"]
    assert same_zoo(trained, tmp_path / "two")


def test_another_seed_gives_other_weights(trained, tmp_path):
    train(tmp_path, seed=1)
    assert not same_zoo(trained, tmp_path)


def test_an_interrupted_run_goes_on_where_it_was(trained, tmp_path, monkeypatch):
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_model(*args, **kwargs)

    monkeypatch.setattr("sharpkit.zoo.training.train_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.undo()
    report = train(tmp_path)
    assert report.skipped == ["0", "1"] and report.trained == ["2", "3"]
    assert same_zoo(trained, tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_that_fails_is_reported_and_the_others_are_trained(tmp_path, workers):
    report = train(tmp_path, grid={"learning_rate": [0.02, 1e30], "width": [3, 5]}, workers=workers)
    assert report.trained == ["0", "1"]
    assert list(report.failed) == ["2", "3"]
    assert all("diverged" in message for message in report.failed.values())
    with pytest.warns(UserWarning, match="2 of 4 settings have no model"):
        assert list(load_zoo(tmp_path)["task1"]) == ["0", "1"]


def test_a_target_out_of_reach_is_an_error():
    with pytest.raises(ModelError, match="after 1 epochs; target 1e-09"):
        train_model(Recipe(target_loss=1e-9, max_epochs=1), TRAIN, TEST)


def test_a_missed_target_is_tried_again_from_other_random_numbers():
    def loss(*seed):
        recipe = replace(RECIPE, max_epochs=1, target_loss=1e9)
        return train_model(recipe, TRAIN, TEST, seed=seed).metrics["train_loss"]

    seed = next(s for s in range(20) if loss(s, 1) < loss(s, 0))
    recipe = replace(RECIPE, max_epochs=1, target_loss=loss(seed, 1))
    metrics = train_model(recipe, TRAIN, TEST, seed=(seed,)).metrics
    assert (metrics["attempt"], metrics["train_loss"]) == (1, loss(seed, 1))


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"seed": 3}, "seed"), ({"grid": {"width": [3]}}, "grid"), ({"recipe": Recipe()}, "recipe")],
)
def test_a_directory_of_another_run_is_refused(trained, changes, named):
    with pytest.raises(RunError, match=f"another {named};"):
        train(trained, **changes)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"colour": [1]}, "unknown hyperparameter 'colour'"),
        ({"width": []}, "needs distinct values"),
        ({"width": [3, 3]}, "needs distinct values"),
        ({}, "at least one"),
    ],
)
def test_unusable_grids_are_refused(tmp_path, grid, message):
    with pytest.raises(ArgumentError, match=message):
        train(tmp_path, grid=grid)


def test_unusable_data_is_refused(tmp_path):
    flat = TensorDataset(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(DataError, match="train data: expected float32"):
        train_zoo(GRID, flat, TEST, tmp_path)


def idx(array: np.ndarray) -> bytes:
    shape = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist_folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("t10k", 20)):
        images, labels = rng.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def test_fashion_mnist_is_balanced_shrunk_and_exact(mnist_folder):
    train, test = fashion_mnist(mnist_folder, train_size=20, seed=1)
    assert train.tensors[0].shape == (20, 1, 14, 14)
    assert torch.bincount(train.tensors[1]).tolist() == [2] * 10
    pixels = read_idx(mnist_folder / "t10k-images-idx3-ubyte.gz").astype(np.float64)
    mean = pixels.reshape(20, 14, 2, 14, 2).mean((2, 4))
    assert np.array_equal(test.tensors[0].squeeze(1).double().numpy(), mean / 128 - 0.5)
    again, _ = fashion_mnist(mnist_folder, train_size=20, seed=1)
    assert torch.equal(train.tensors[0], again.tensors[0])
    with pytest.raises(ArgumentError, match="train_size is 50"):
        fashion_mnist(mnist_folder, train_size=50)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (bytes([0, 0, 9, 1, 0, 0, 0, 1, 5]), "not an IDX file"),
        (bytes([0, 0, 8, 3, 0, 0]), "not an IDX file"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 3, 5]), r"1 bytes of data; shape \(3,\)"),
        (gzip.compress(bytes(100))[:-9], "cannot be read"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, content, message):
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"labels: {message}"):
        read_idx(path)
    with pytest.raises(DataError, match="absent: cannot be read"):
        read_idx(tmp_path / "absent")


def test_the_command_trains_and_packs(mnist_folder, tmp_path, monkeypatch, capsys):
    def small(folder, *, seed):
        return fashion_mnist(folder, train_size=20, seed=seed)

    monkeypatch.setattr("sharpkit.zoo.training.fashion_mnist", small)
    monkeypatch.setattr("sharpkit.zoo.training.EMBEDDED_GRID", {"width": [4, 6]})
    out = tmp_path / "out"
    assert main(["--fashion-mnist", str(mnist_folder), "--out", str(out)]) == 0
    assert "2 models trained" in capsys.readouterr().out
    configs = out / "reference_data" / "fashion_mnist_14x14" / "model_configs.json"
    assert list(json.loads(configs.read_text())) == ["0", "1"]
    assert (out / "embedded_zoo.tar.xz").is_file()
