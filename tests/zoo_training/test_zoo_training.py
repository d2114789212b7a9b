"""A trained zoo depends on grid, recipe, seed and data alone, and survives interruption."""

import gzip
import json
import os
import resource
import signal
import subprocess
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from paths import RECORDED
from torch.utils.data import TensorDataset

from sharpkit.data.idx import read_idx
from sharpkit.errors import ArgumentError, DataError, ModelError, RunError
from sharpkit.run_directory import sole_driver
from sharpkit.workers import Workers
from sharpkit.zoo import build_model, load_zoo
from sharpkit.zoo_training.fashion_mnist import fashion_mnist
from sharpkit.zoo_training.model import optimizer_of, train_model
from sharpkit.zoo_training.recipe import Recipe
from sharpkit.zoo_training.zoo import _train_one, train_zoo

GRID = {"width": [3, 5], "dropout": [0.0, 0.3]}
RECIPE = Recipe(dense_units=8, batch_size=8, stop_at_loss=0.6, epochs=200)


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
        assert loss <= RECIPE.stop_at_loss
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


@pytest.mark.parametrize("backend", ["processes", pytest.param("ray", marks=pytest.mark.slow)])
def test_backends_train_the_same_zoo(trained, tmp_path, backend):
    if backend == "ray":
        pytest.importorskip("ray", reason="Ray is not installed: pip install 'sharpkit[ray]'")
    train(tmp_path, workers=Workers(1, backend=backend))
    assert same_zoo(trained, tmp_path)


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

    monkeypatch.setattr("sharpkit.zoo_training.zoo.train_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.undo()
    report = train(tmp_path)
    assert report.skipped == ["0", "1"] and report.trained == ["2", "3"]
    assert same_zoo(trained, tmp_path)


def test_what_a_killed_run_left_half_written_is_removed(trained, tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    for folder in ("input_data/task1/model_0", "input_data/task1/dataset_1/train", "training"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f".weights.hdf5.{ended.pid}-{'0f' * 16}.tmp").touch()
    train(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    assert same_zoo(trained, tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_that_fails_is_reported_and_the_others_are_trained(tmp_path, workers):
    report = train(tmp_path, grid={"lr": [0.02, 1e30], "width": [3, 5]}, workers=workers)
    assert report.trained == ["0", "1"]
    assert list(report.failed) == ["2", "3"]
    assert all("diverged" in message for message in report.failed.values())
    with pytest.warns(UserWarning, match="2 of 4 settings have no model"):
        assert list(load_zoo(tmp_path)["task1"]) == ["0", "1"]


def test_a_target_out_of_reach_is_an_error():
    with pytest.raises(ModelError, match="after 1 epochs; target 1e-09"):
        train_model(Recipe(stop_at_loss=1e-9, epochs=1), TRAIN, TEST)


def test_a_missed_target_is_tried_again_from_other_random_numbers():
    def loss(*seed):
        recipe = replace(RECIPE, epochs=1, stop_at_loss=1e9)
        return train_model(recipe, TRAIN, TEST, seed=seed).metrics["train_loss"]

    seed = next(s for s in range(20) if loss(s, 1) < loss(s, 0))
    recipe = replace(RECIPE, epochs=1, stop_at_loss=loss(seed, 1))
    metrics = train_model(recipe, TRAIN, TEST, seed=(seed,)).metrics
    assert (metrics["attempt"], metrics["train_loss"]) == (1, loss(seed, 1))


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"seed": 3}, "seed"), ({"grid": {"width": [3]}}, "grid"), ({"recipe": Recipe()}, "recipe")],
)
def test_a_directory_of_another_run_is_refused(trained, changes, named):
    with pytest.raises(RunError, match=rf"another configuration \({named}: "):
        train(trained, **changes)


def test_the_same_grid_in_another_order_is_refused(trained):
    reverse = dict(reversed(GRID.items()))
    with pytest.raises(RunError, match=r"in the order .*numbers the models"):
        train(trained, grid=reverse)


OLD_NAMES = {
    "lr": "learning_rate",
    "scale_lr": "scale_learning_rate",
    "stop_at_loss": "target_loss",
    "epochs": "max_epochs",
}


def as_of_an_earlier_version(root, grid):
    """A zoo whose files have the names of before; its last model is not there yet."""

    def renamed(table):
        return {OLD_NAMES.get(name, name): value for name, value in table.items()}

    note = root / "training" / "task1.json"
    plan = json.loads(note.read_text())
    plan |= {"recipe": renamed(plan["recipe"]), "grid": renamed(plan["grid"])}
    note.write_text(json.dumps(plan))
    configs = root / "reference_data" / "task1" / "model_configs.json"
    entries = json.loads(configs.read_text())
    for entry in entries.values():
        entry["hparams"] = renamed(entry["hparams"])
    entries.popitem()
    configs.write_text(json.dumps(entries))
    return note.read_text()


@pytest.mark.parametrize("grid", [GRID, {"lr": [0.01, 0.02], "width": [3]}])
def test_a_zoo_of_an_earlier_version_goes_on_under_its_own_names(tmp_path, grid):
    train(tmp_path, grid=grid)
    before = weights(tmp_path)[1]
    note = as_of_an_earlier_version(tmp_path, grid)
    last = max(id_ for id_, _, _ in before)
    report = train(tmp_path, grid=grid)
    assert report.trained == [last]
    assert (tmp_path / "training" / "task1.json").read_text() == note
    task = load_zoo(tmp_path)["task1"]
    assert task.possible_values == {OLD_NAMES.get(n, n): v for n, v in grid.items()}
    after = weights(tmp_path)[1]
    assert all(torch.equal(after[key], before[key]) for key in before)
    with pytest.raises(RunError, match="recipe: momentum"):
        train(tmp_path, grid=grid, recipe=replace(RECIPE, momentum=0.8))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"colour": [1]}, "unknown hyperparameter 'colour'"),
        ({"width": []}, "needs distinct values"),
        ({"width": [3, 3]}, "needs distinct values"),
        ({}, "at least one"),
        ({"dropout": [0.0, 1.0]}, "dropout is 1.0: expected 0 <= dropout < 1"),
    ],
)
def test_unusable_grids_are_refused(tmp_path, grid, message):
    with pytest.raises(ArgumentError, match=message):
        train(tmp_path, grid=grid)


def test_unusable_data_is_refused(tmp_path):
    flat = TensorDataset(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(DataError, match="train data: expected images float32"):
        train_zoo(GRID, flat, TEST, tmp_path)


def killed(mark, *args):
    """`_train_one` in a process that dies: the first of model 1, every one of model 2."""
    *_, (id_, _), _ = args
    if id_ == "2" or (id_ == "1" and not mark.exists()):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return _train_one(*args)


@pytest.mark.slow
def test_a_killed_process_costs_at_most_its_own_model(trained, tmp_path, monkeypatch):
    killer = partial(killed, tmp_path / "mark")
    monkeypatch.setattr("sharpkit.zoo_training.zoo._train_one", killer)
    report = train(tmp_path / "zoo", workers=2)
    assert report.trained == ["0", "1", "3"]
    assert "SIGKILL" in report.failed["2"]
    monkeypatch.undo()
    assert train(tmp_path / "zoo").trained == ["2"]
    assert same_zoo(trained, tmp_path / "zoo")


def test_limit_trains_the_first_models_and_the_rest_can_follow(trained, tmp_path):
    assert train(tmp_path, limit=1).trained == ["0"]
    report = train(tmp_path)
    assert report.skipped == ["0"] and report.trained == ["1", "2", "3"]
    assert same_zoo(trained, tmp_path)


@pytest.mark.parametrize("file", ["model_0/weights.hdf5", "dataset_1/train/shard_0.tfrecord"])
def test_a_full_disk_is_told_and_the_zoo_goes_on_later(trained, tmp_path, file):
    size = (trained / "input_data" / "task1" / file).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))
    try:
        with pytest.raises(RunError, match=r"cannot be written .* run the same again to go on"):
            train(tmp_path / "zoo")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "zoo").rglob("*.tmp"))
    assert train(tmp_path / "zoo").trained == ["0", "1", "2", "3"]
    assert same_zoo(trained, tmp_path / "zoo")


def test_replicates_differ_by_their_seed_alone(trained, tmp_path):
    report = train(tmp_path, grid={"width": [3, 5]}, replicates=2)
    assert report.trained == ["0", "1", "2", "3"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = load_zoo(tmp_path)["task1"]
    assert [e.hyperparameters for e in task.values()] == [{"width": w} for w in (3, 3, 5, 5)]
    first, second = (task[i].load("initial").state_dict()["conv2d.weight"] for i in "01")
    assert not torch.equal(first, second)
    alone = load_zoo(trained)["task1"]["0"].load("initial").state_dict()["conv2d.weight"]
    assert torch.equal(first, alone)  # of model 0 and this seed, whatever else is trained
    with pytest.raises(RunError, match="replicates: 2 there, null now"):
        train(tmp_path, grid={"width": [3, 5]})
    with pytest.raises(ArgumentError, match="replicates is 0: expected a whole number >= 1"):
        train(tmp_path / "none", replicates=0)


def test_two_drivers_of_one_directory_are_refused(tmp_path):
    with sole_driver(tmp_path), pytest.raises(RunError, match="another process"):
        train(tmp_path)


def test_sam_is_an_axis_of_the_grid(tmp_path):
    report = train(tmp_path, grid={"rho": [0.0, 0.05], "m": [0, 2]})
    assert report.trained == ["0", "1", "2", "3"]
    _, states = weights(tmp_path)

    def kernel(id_):
        return states[id_, "final", "conv2d.weight"]

    config = replace(RECIPE, rho=0.0).network((6, 5, 2), 3)
    assert json.loads((tmp_path / "input_data/task1/model_0/config.json").read_text()) == config
    assert not torch.equal(kernel("2"), kernel("3"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "mlp"}, "expected one of 'cnn', 'vgg', 'nin'"),
        ({"width": 0}, "width is 0: expected a whole number >= 1"),
        ({"lr": 0.0}, "lr is 0.0: expected lr > 0"),
        ({"momentum": 1.0}, "momentum is 1.0: expected 0 <= momentum < 1"),
        ({"rho": -0.1}, "rho must be finite and at least 0, got -0.1"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
    ],
)
def test_recipes_out_of_range_are_refused(change, message):
    with pytest.raises(ArgumentError, match=message):
        Recipe(**change)


def parameters(recipe, input_shape=(32, 32, 3)):
    return build_model(recipe.network(input_shape, 10), device="meta").parameter_count


def test_the_sizes_of_the_competitions_networks_are_met():
    """1.7 to 19.2 million for task 1, 3.4 to 9.2 for task 2 (DESIGN, section 3)."""
    vgg = Recipe(architecture="vgg", convs_per_block=2, dense_units=128)
    assert parameters(replace(vgg, width=256, num_conv_blocks=3)) == pytest.approx(1.7e6, rel=0.02)
    assert parameters(replace(vgg, width=512, num_conv_blocks=1)) == pytest.approx(19.2e6, rel=0.01)
    nin = Recipe(architecture="nin", convs_per_block=3, width=512)
    assert parameters(replace(nin, num_conv_blocks=2)) == pytest.approx(3.4e6, rel=0.01)
    assert parameters(replace(nin, num_conv_blocks=4)) == pytest.approx(9.2e6, rel=0.01)


def test_vgg_has_the_layers_of_the_competitions_files():
    """The fixture's models 20 and 41 have the layers of task 1, with other widths."""
    for id_, blocks, dense, dropout, width in ((20, 1, 1, 0.0, 8), (41, 3, 2, 0.5, 16)):
        folder = RECORDED / "pgdl_fixture" / "input_data" / "task1_v4" / f"model_{id_}"
        theirs = build_model(json.loads((folder / "config.json").read_text()), device="meta")
        recipe = Recipe(
            architecture="vgg",
            width=width,
            num_conv_blocks=blocks,
            convs_per_block=2,
            num_dense_layers=dense,
            dense_units=16,
            dropout=dropout,
        )
        ours = build_model(recipe.network((32, 32, 3), 10), device="meta")
        assert str(ours) == str(theirs)


def test_nin_halves_the_image_in_every_block_and_averages_positions():
    recipe = Recipe(architecture="nin", width=4, num_conv_blocks=2, convs_per_block=3, dropout=0.5)
    layers = recipe.network((8, 8, 1), 3)["model_config"]
    kinds = [layer["layer_name"] for layer in layers]
    assert kinds == [*["Conv2D"] * 3, "Dropout"] * 2 + ["Conv2D", "GlobalAveragePooling2D"]
    model = build_model({"model_config": layers, "input_shape": [8, 8, 1]}).eval()
    assert model(torch.zeros(5, 1, 8, 8)).shape == (5, 3)
    strides = [m.stride[0] for m in model if isinstance(m, torch.nn.Conv2d)]
    assert strides == [2, 1, 1, 2, 1, 1, 1]


def test_the_step_size_follows_the_recipe():
    def rates(recipe, epochs):
        optimizer, schedule = optimizer_of(torch.nn.Linear(1, 1), recipe, 10)
        found = []
        for _ in range(epochs):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    grows = Recipe(lr=0.02, batch_size=64, decay=0.5)
    assert rates(grows, 3) == pytest.approx([0.04, 0.02, 0.01])
    published = Recipe(
        lr=0.001,
        scale_lr=False,
        batch_size=512,
        decay=0.2,
        decay_epochs=(2, 3),
    )
    assert rates(published, 4) == pytest.approx([0.001, 0.001, 0.0002, 0.00004])


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
        (gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 90, *range(90)]))[:-9], "cannot be read"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, content, message):
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"labels: {message}"):
        read_idx(path)
    with pytest.raises(DataError, match="absent: cannot be read"):
        read_idx(tmp_path / "absent")
