"""Model zoos and phase-transition zoos: opened, listed, checked, scored, rated; damaged ones."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from small_cnns import write_idx
from trials import (
    ACTIVATIONS,
    plain_logits,
    plain_weights,
    residual_logits,
    residual_weights,
    write_images,
    write_trial,
)

import sharpkit as sk
from sharpkit.errors import ZooFormatError
from sharpkit.zoo import load_zoo, zoo_info
from sharpkit.zoo.formats import find_tasks
from sharpkit.zoo.model_zoos import preparation

NAME = "NN_tune_trainable_0ada0_{k:05d}_{k}_model=CNN,optim_lr=0.1_2022-05-21_13-14-23"
LANDSCAPE = {"log_hessian_trace_train": 3.0, "representation_similarity": 0.9}


def params_of(k, **more):
    return {
        "model::type": "CNN",
        "model::channels_in": 1,
        "model::o_dim": 4,  # as some published zoos say, whose networks have ten outputs
        "model::nlin": list(ACTIVATIONS)[k % 3],
        "model::dropout": 0.5 * (k % 2),
        "model::init_type": "uniform",
        "optim::optimizer": "adam" if k < 3 else "sgd",
        "optim::lr": 0.001,
        "optim::wd": 0.0001 * (1 + k // 2),
        "seed": 1 + k,
        "training::batchsize": 10,
        "dataset::dump": "/data/zoos/MNIST/dataset.pt",
        "cuda": True,
    } | more


def accuracy(logits, labels):
    return float((np.asarray(logits).argmax(1) == labels).mean())


def small_zoo(folder, random, networks=6, padded=True):
    """Networks that drift from the first, whose outputs are the labels of most images."""
    x = random.normal(size=(60, 1, 28, 28)).astype(np.float32)
    start, step = (plain_weights("CNN", 0.0, random) for _ in "ab")
    y = plain_logits(start, "CNN", "tanh", x).argmax(1)
    y[::8] = (y[::8] + 1) % 10
    made = {}
    for k in range(networks):
        params = params_of(k)
        names = list(plain_weights("CNN", params["model::dropout"], random))
        epochs = {}
        for epoch in (0, 25, 50):
            drift = 0.1 * k + (50 - epoch) / 50
            values = [a + drift * b for a, b in zip(start.values(), step.values(), strict=True)]
            state = dict(zip(names, values, strict=True))
            outputs = plain_logits(state, "CNN", params["model::nlin"], x)
            metrics = {"train_acc": accuracy(outputs[:30], y[:30]), "train_loss": 0.1 + 0.01 * k}
            metrics |= {"test_acc": accuracy(outputs[30:], y[30:]), "test_loss": 0.2 + 0.03 * k}
            if epoch == 0:
                metrics |= {"train_acc": -999, "train_loss": -999}
            epochs[epoch] = metrics, state
        write_trial(folder / NAME.format(k=k), params, epochs, padded=padded)
        made[k] = epochs
    write_images(folder / "images", (x[:30], y[:30]), (x[30:], y[30:]))
    return made, x, y


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo") / "tune_zoo_mnist_hyperparameter"
    return folder, *small_zoo(folder, np.random.default_rng(0))


@pytest.fixture
def copy(made, tmp_path):
    """One to damage."""
    return shutil.copytree(made[0], tmp_path / "tune_zoo_mnist")


@pytest.mark.parametrize("kind", ["CNN", "CNN2", "CNN3"])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_plain_networks_give_the_logits_of_a_loop(tmp_path, kind, activation):
    random = np.random.default_rng(1)
    side = 32 if kind == "CNN3" else 28
    x = random.normal(size=(2, 3, side, side)).astype(np.float32)
    dropout = 0.5 if activation in ("tanh", "gelu") else 0.0
    state = plain_weights(kind, dropout, random, channels=3)
    named = {"model::type": kind, "model::nlin": activation, "model::dropout": dropout}
    write_trial(
        tmp_path / "a", params_of(0, **named), {5: ({"train_acc": 1, "test_acc": 1}, state)}
    )
    with pytest.warns(UserWarning, match="comes without images"):
        network = load_zoo(tmp_path)[tmp_path.name]["a"].load()
    assert not network.training
    with torch.no_grad():
        found = network(torch.from_numpy(x))
    expected = plain_logits(state, kind, activation, x)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("blocks", "options"),
    [
        ([2, 2, 2, 2], {"width": 2}),
        ([2, 2, 2, 2], {"width": 3, "channels": 1, "classes": 7}),
        ([1, 2, 1, 1], {"width": 2, "bottleneck": True}),
        ([2, 2, 2, 2], {"width": 2, "kernel": 7}),
    ],
)
def test_residual_networks_of_any_width_are_built_from_their_shapes(tmp_path, blocks, options):
    state = residual_weights(blocks=blocks, random=np.random.default_rng(2), **options)
    params = params_of(0, **{"model::type": "Resnet18_width", "model::width": options["width"]})
    parallel = {f"module.{name}": value for name, value in state.items()}
    write_trial(tmp_path / "a", params, {150: ({"train_acc": 1, "test_acc": 1}, parallel)})
    with pytest.warns(UserWarning, match="comes without images"):
        network = load_zoo(tmp_path)[tmp_path.name]["a"].load()
    x = torch.randn(2, options.get("channels", 3), 32, 32)
    with torch.no_grad():
        found = network(x)
    expected = residual_logits(state, x)
    assert found.shape == (2, options.get("classes", 10))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert all(p.requires_grad for p in network.parameters())


def test_ids_settings_and_records_are_those_of_the_folders(made):
    task = load_zoo(made[0])[made[0].name]
    assert list(task) == [f"0ada0_{k:05d}" for k in range(6)]
    model = task["0ada0_00003"]
    assert model.epoch == 50 and model.metrics == {
        n: pytest.approx(v) for n, v in made[1][3][50][0].items()
    }
    assert model.hyperparameters["model::nlin"] == "tanh" and model.hyperparameters["seed"] == 4
    names = set(task.model_configs["0ada0_00003"]["hparams"])
    assert names == {"model::nlin", "model::dropout", "optim::optimizer", "optim::wd"}
    frame = task.frame()
    assert frame["model::dropout"].tolist() == [0.0, 0.5] * 3
    again = pickle.loads(pickle.dumps(task))
    assert list(again) == list(task) and again["0ada0_00001"].load()


@pytest.mark.parametrize("padded", [True, False])
def test_weights_before_and_after_training(tmp_path, padded):
    made, x, _ = small_zoo(tmp_path / "mnist", np.random.default_rng(3), networks=2, padded=padded)
    model = load_zoo(tmp_path)["mnist"]["0ada0_00001"]
    for weights, epoch in (("final", 50), ("initial", 0)):
        with torch.no_grad():
            found = model.load(weights)(torch.from_numpy(x[:4])).numpy()
        expected = plain_logits(made[1][epoch][1], "CNN", params_of(1)["model::nlin"], x[:4])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert [p.name for p in model.files()] == ["params.json", "result.json", "checkpoints"]


def test_every_checkpoint_can_be_a_model_of_its_own(made):
    task = load_zoo(made[0])[made[0].name].at_epochs(25, 50)
    assert list(task)[:3] == ["0ada0_00000@25", "0ada0_00000@50", "0ada0_00001@25"]
    entry = task.model_configs["0ada0_00002@25"]
    assert entry["hparams"]["epoch"]["current_value"] == 25
    assert entry["metrics"]["test_acc"] == made[1][2][25][0]["test_acc"]
    first = load_zoo(made[0])[made[0].name].at_epochs(0)
    assert set(first.unusable) == set(first)  # nothing was recorded in training then
    assert "train_acc is missing" in first.unusable["0ada0_00000@0"]


def test_info_compares_accuracies(made):
    table = zoo_info(made[0], deep=True, accuracies=None)
    assert (table["problem"] == "").all() and (table["examples"] == 30).all()
    np.testing.assert_allclose(table["recomputed_test_acc"], table["test_acc"])
    assert set(table["parameters"]) == {200 + 8 + 1200 + 6 + 96 + 4 + 720 + 20 + 200 + 10}


def test_it_is_scored_and_rated(made, tmp_path):
    zoo = load_zoo(made[0])
    measures = [sk.MSharpness(m=[1, 6], rho=0.1), sk.measures.make_measure("distance_from_initial")]
    scores = sk.score_zoo(zoo, measures, n=12, out=tmp_path, progress=False)
    assert scores.failures.empty and scores.frame()["model"].nunique() == 6
    frame = scores.frame()
    found = frame[frame["form"] == "euclidean"].set_index("model")["value"]
    for k in range(6):
        states = [made[1][k][epoch][1] for epoch in (0, 50)]
        squares = [
            ((a - b).astype(np.float64) ** 2).sum()
            for a, b in zip(*map(dict.values, states), strict=True)
        ]
        assert found[f"0ada0_{k:05d}"] == pytest.approx(sum(squares) ** 0.5, rel=1e-5)
    table = sk.evaluate(scores, resamples=10, target="test_loss")
    assert table["kendall_tau"].notna().all()


@pytest.fixture
def phases(tmp_path):
    """Residual networks of two widths and batch sizes, with what is known of their landscape."""
    random, folder = np.random.default_rng(4), tmp_path / "cifar_10-ResNet18_subset"
    x = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = None
    for k in range(8):
        width, batch = (2, 4)[k % 2], (16, 128)[k // 2 % 2]
        state = residual_weights(width, [1, 1, 1, 1], random)
        outputs = residual_logits(state, x).numpy()
        y = outputs.argmax(1) if y is None else y
        metrics = {"train_acc": accuracy(outputs[:12], y[:12]), "train_loss": 1.0}
        metrics |= {"test_acc": accuracy(outputs[12:], y[12:]), "test_loss": 1.5}
        params = {
            "model::type": "Resnet18_width", "model::width": width, "model::o_dim": 10,
            "training::batchsize": batch, "optim::lr": 0.1, "seed": k // 4,
            "training::data_path": "/ds2/model_zoos/taxonomy/cifar_10/",
        }  # fmt: skip
        measured = metrics | {n: v + k for n, v in LANDSCAPE.items()} | {"curve": None}
        epochs = {115: (metrics | {"log_hessian_trace_train": 99.0}, None), 150: (measured, state)}
        write_trial(folder / f"model {k}", params, epochs)
    write_images(folder / "images", (x[:12].numpy(), y[:12]), (x[12:].numpy(), y[12:]))
    return folder


def test_phases_of_training_are_columns_to_rate_against(phases):
    zoo = load_zoo(phases)
    task = zoo["cifar_10-ResNet18_subset"]
    assert next(iter(task)) == "model 0" and task.source.data_set == "cifar10"
    assert sorted(task.model_configs["model 3"]["hparams"]) == [
        "model::width", "seed", "training::batchsize",
    ]  # fmt: skip
    assert task["model 5"].metrics["log_hessian_trace_train"] == 8.0  # of its own epoch
    assert (zoo_info(zoo, accuracies=None)["problem"] == "").all()
    scores = sk.score_zoo(zoo, sk.MSharpness(m=[1, 4], rho=0.1), n=8, progress=False)
    assert scores.failures.empty
    table = sk.evaluate(scores, resamples=10, target="log_hessian_trace_train")
    assert table["kendall_tau"].notna().all()
    with pytest.raises(ZooFormatError, match="no checkpoint of epoch 0"):
        task["model 0"].load("initial")


# images ------------------------------------------------------------------------------------------


def published(monkeypatch, trained, total):
    known = preparation.PREPARATIONS
    small = preparation.Preparation((0.1307,), (0.3081,), (trained, total))
    monkeypatch.setitem(known, ("mnist", "CNN"), {"as published": small})


def test_published_images_are_prepared_and_divided_as_the_programs_did(copy, monkeypatch):
    random = np.random.default_rng(5)
    images, labels = random.integers(0, 256, (30, 28, 28), dtype=np.uint8), np.arange(30) % 10
    shutil.rmtree(copy / "images")
    labels = labels.astype(np.uint8)
    write_idx(copy / "images", (images[:20], labels[:20]), (images[20:], labels[20:]))
    published(monkeypatch, 15, 20)
    with pytest.warns(UserWarning, match="not its images"):
        task = load_zoo(copy)["tune_zoo_mnist"]
    inputs, found = task.dataset("train").tensors
    # torch.utils.data.random_split is what the programs called
    split, _ = torch.utils.data.random_split(
        range(20), [15, 5], generator=torch.Generator().manual_seed(42)
    )
    assert found.tolist() == labels[list(split)].tolist()
    expected = (images[list(split)] / 255 - 0.1307) / 0.3081
    np.testing.assert_allclose(inputs[:, 0].numpy(), expected, atol=1e-5)
    test, found = task.dataset("test").tensors
    np.testing.assert_allclose(test[:, 0].numpy(), (images[20:] / 255 - 0.1307) / 0.3081, atol=1e-5)
    assert next(f.name for f in task.files()) == "train-images-idx3-ubyte"


def test_another_number_of_images_is_refused(copy, made):
    shutil.rmtree(copy / "images")
    images = np.zeros((20, 28, 28), np.uint8)
    write_idx(copy / "images", (images, images[:, 0, 0]), (images, images[:, 0, 0]))
    with pytest.warns(UserWarning):
        task = load_zoo(copy)["tune_zoo_mnist"]
    with pytest.raises(ZooFormatError, match="20 training images; the data set has 60,000"):
        task.dataset("train")


def test_resizing_grey_and_crop_are_those_of_pillow():
    random = np.random.default_rng(6)
    pixels = random.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(3)
    half = (0.5,), (0.5,)
    small = preparation.Preparation(*half, (3, 3), size=28)((pixels, labels), "test", "")
    grey = preparation.Preparation(*half, (3, 3), crop=28, grey=True)((pixels, labels), "test", "")
    for k in range(3):
        image = Image.fromarray(pixels[k].transpose(1, 2, 0))
        resized = np.asarray(image.resize((28, 28), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        np.testing.assert_allclose(small.tensors[0][k].numpy(), resized / 127.5 - 1, atol=1e-6)
        middle = np.asarray(image.convert("L"))[2:30, 2:30]
        np.testing.assert_allclose(grey.tensors[0][k, 0].numpy(), middle / 127.5 - 1, atol=1e-6)


def test_of_two_preparations_the_one_that_fits_is_kept_and_told(tmp_path, monkeypatch):
    random = np.random.default_rng(7)
    pixels = random.integers(0, 256, (40, 28, 28), dtype=np.uint8)
    state = plain_weights("CNN", 0.0, random)
    x = ((pixels / 255 - 0.8) / 0.1)[:, None]
    y = plain_logits(state, "CNN", "relu", x).argmax(1).astype(np.uint8)
    metrics = {"train_acc": 1.0, "test_acc": 1.0}
    write_trial(
        tmp_path / "mnist" / "a", params_of(1, **{"model::dropout": 0.0}), {9: (metrics, state)}
    )
    write_idx(tmp_path / "mnist" / "images", (pixels[:20], y[:20]), (pixels[20:], y[20:]))
    ways = {
        "mean 0.5": preparation.Preparation((0.5,), (0.5,), (20, 20)),
        "mean 0.8": preparation.Preparation((0.8,), (0.1,), (20, 20)),
    }
    monkeypatch.setitem(preparation.PREPARATIONS, ("mnist", "CNN"), ways)
    task = load_zoo(tmp_path)["mnist"]
    assert task.way == "mean 0.8"
    [row] = zoo_info(tmp_path).to_dict("records")
    assert row["problem"] == "" and row["read_as"].startswith("mean 0.8 (mean 0.5: test accuracy")
    np.testing.assert_allclose(task.dataset("test").tensors[0].numpy(), x[20:], atol=1e-5)


# what is damaged ---------------------------------------------------------------------------------


def trial(copy, k):
    return copy / NAME.format(k=k)


def edit(path, change):
    lines = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")


class Class:
    """Something that a checkpoint must not name."""


def break_params(copy):
    (trial(copy, 2) / "params.json").write_text("{")


def break_result(copy):
    (trial(copy, 2) / "result.json").write_text("\0\0")


def no_result(copy):
    (trial(copy, 2) / "result.json").unlink()


def nan_accuracy(copy):
    edit(trial(copy, 2) / "result.json", lambda line: line | {"test_acc": float("nan")})


def no_accuracy(copy):
    edit(trial(copy, 2) / "result.json", lambda line: line | {"test_acc": None})


def no_checkpoint(copy):
    for folder in trial(copy, 2).glob("checkpoint_*"):
        shutil.rmtree(folder)


def of_checkpoint(change):
    def damage(copy):
        path = trial(copy, 2) / "checkpoint_000050" / "checkpoints"
        state = torch.load(path)
        torch.save(change(state), path)

    return damage


def truncated(copy):
    path = trial(copy, 2) / "checkpoint_000050" / "checkpoints"
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_params, "params.json: expected JSON"),
        (break_result, "has no line with training_iteration 50"),
        (no_result, "result.json: file is missing"),
        (nan_accuracy, "test_acc is missing or not a finite number"),
        (no_accuracy, "test_acc is missing"),
        (no_checkpoint, "no checkpoint; expected checkpoint_<epoch>/checkpoints"),
        (truncated, "checkpoints: expected a file of torch.save"),
        (of_checkpoint(lambda s: s | {"x": Class()}), "it names"),
        (of_checkpoint(lambda s: [*s.values()]), "expected tensors by name"),
        (of_checkpoint(lambda s: dict(list(s.items())[:-1])), "lacking: 'module_list.11.bias'"),
        (of_checkpoint(lambda s: s | {"module_list.0.bias": torch.zeros(9)}), "has shape (9,)"),
        (of_checkpoint(lambda s: s | {"module_list.0.bias": torch.full((8,), np.nan)}), "has NaN"),
        (of_checkpoint(lambda s: {"a.weight": torch.zeros(2, 2)}), "expected three convolutions"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:task tune_zoo_mnist:UserWarning")
def test_a_damaged_network_costs_itself(copy, damage, message):
    damage(copy)
    table = zoo_info(copy)
    [(model, problem)] = table.loc[table["problem"] != "", ["model", "problem"]].to_numpy()
    assert model == "0ada0_00002" and message in problem
    zoo = load_zoo(copy)
    scores = sk.score_zoo(zoo, sk.MSharpness(m=2, rho=0.1), n=4, limit=3, progress=False)
    assert list(scores.failures["model"]) == ["0ada0_00002"] and len(scores.frame()) == 2


def test_types_and_activations_that_are_not_known_are_named(copy):
    for k, change in enumerate(({"model::type": "vit_b_16"}, {"model::nlin": "swish"})):
        path = trial(copy, k) / "params.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    problems = zoo_info(copy)["problem"]
    assert "model::type is 'vit_b_16'; networks of the types CNN, CNN2, CNN3" in problems[0]
    assert "model::nlin is 'swish'; expected one of relu" in problems[1]


def test_residual_names_that_do_not_fit_are_told(tmp_path):
    state = residual_weights(2, [1, 1, 1, 1], np.random.default_rng(0))
    less = {name: value for name, value in state.items() if name != "layer2.0.bn1.bias"}
    wide = {"layer4.0.conv1.weight": torch.zeros(3, 8, 3, 3)}
    transformer = {"blocks.0.attention.weight": torch.zeros(2, 2)}
    cases = {
        "lacking": (less, "lacking: 'layer2.0.bn1.bias'"),
        "beyond": (state | {"extra.weight": torch.zeros(1)}, "beyond it: 'extra.weight'"),
        "kernel": (state | {"conv1.weight": torch.zeros(2, 3, 5, 5)}, "kernel of (5, 5); expected"),
        "shape": (state | wide, "has shape (3, 8, 3, 3); expected (16, 8, 3, 3)"),
        "other": (transformer, "expected conv1, bn1, layer1.0.conv1"),
    }
    for name, (broken, _) in cases.items():
        params = params_of(0, **{"model::type": "Resnet18"})
        write_trial(tmp_path / name, params, {1: ({"train_acc": 1, "test_acc": 1}, broken)})
    table = zoo_info(tmp_path, accuracies=0).set_index("model")["problem"]
    for name, (_, message) in cases.items():
        assert message in table[name]


def test_of_lines_for_one_epoch_the_last_counts_and_broken_ones_are_passed_over(copy):
    path = trial(copy, 1) / "result.json"
    last = json.loads(path.read_text().splitlines()[-1])
    lines = [json.dumps(last | {"test_acc": 0.25}), '{"training_iteration": 5', ""]
    path.write_text(path.read_text() + "\n".join(lines))
    assert find_tasks(copy)["tune_zoo_mnist"]["0ada0_00001"].metrics["test_acc"] == 0.25
    problem = zoo_info(copy, accuracies=None).set_index("model")["problem"]["0ada0_00001"]
    assert "recorded is 0.2500" in problem  # which is not its accuracy


def test_a_zoo_elsewhere_must_be_copied(made, monkeypatch, tmp_path):
    import fsspec

    monkeypatch.setenv("SHARPKIT_CACHE", str(tmp_path))
    memory = fsspec.filesystem("memory")
    memory.put(str(trial(made[0], 0)), "/off/zoo/a", recursive=True)
    with pytest.raises(ZooFormatError, match="must be on this machine: copy it here"):
        load_zoo("memory://off/zoo")
    memory.rm("/off", recursive=True)
