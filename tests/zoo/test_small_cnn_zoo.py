"""The Small CNN Zoo: opened, listed, checked on the user's images, scored and rated."""

import gzip
import pickle
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from small_cnns import EPOCHS, SmallCnnFiles, grey, logits

import sharpkit as sk
from sharpkit.cli import main
from sharpkit.errors import ArgumentError, DataError, ZooFormatError
from sharpkit.zoo import load_zoo, zoo_info

pytestmark = pytest.mark.filterwarnings("ignore:task mnist.*trained on a part:UserWarning")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    made = SmallCnnFiles(tmp_path_factory.mktemp("zoo") / "mnist")
    made.write()
    return made


@pytest.fixture
def copy(files, tmp_path):
    """One to damage."""
    return shutil.copytree(files.folder, tmp_path / "mnist")


def edit_metrics(folder, change):
    path = folder / "metrics.csv.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    path.write_bytes(gzip.compress("\n".join(change(lines)).encode()))


def with_cell(name, line, value):
    def change(lines):
        column = lines[0].split(",").index(name)
        cells = lines[line].split(",")
        cells[column] = value
        return [*lines[:line], ",".join(cells), *lines[line + 1 :]]

    return change


def test_every_network_gives_the_logits_of_a_plain_loop(files):
    task = load_zoo(files.folder)["mnist"]
    assert isinstance(task.source._weights, np.memmap)
    assert list(task) == [str(k) for k in range(8)]
    x = grey(files.test[0])
    for k, model in enumerate(task.values()):
        for weights, epoch in (("final", 86), ("initial", 0)):
            network = model.load(weights)
            assert not network.training
            with torch.no_grad():
                found = network(torch.tensor(x[:, None], dtype=torch.float32)).numpy()
            expected = logits(files.rows[k, epoch], x, files.settings[k]["activation"], 2)
            np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_the_images_are_grey_from_minus_one_to_one(files):
    for split, (images, labels) in (("train", files.train), ("test", files.test)):
        inputs, found = load_zoo(files.folder)["mnist"].dataset(split).tensors
        assert inputs.dtype == torch.float32 and inputs.shape == (40, 1, 28, 28)
        np.testing.assert_allclose(inputs[:, 0].numpy(), grey(images), atol=1e-6)
        assert found.tolist() == labels.tolist()


def test_colours_are_averaged(files, copy):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    shutil.rmtree(copy / "images")
    (copy / "images").mkdir()
    labels = np.arange(6)
    arrays = {"x_train": pixels, "y_train": labels, "x_test": pixels[:3], "y_test": labels[:3]}
    np.savez(copy / "images" / "colours.npz", **arrays)
    with pytest.warns(UserWarning, match="these are not its images"):
        inputs = load_zoo(copy)["mnist"].dataset("train").tensors[0]
    np.testing.assert_allclose(inputs[:, 0].numpy(), grey(pixels), atol=1e-6)


def test_records_and_settings_are_those_of_the_table(files):
    task = load_zoo(files.folder)["mnist"]
    model = task["3"]
    assert model.metrics == {
        "train_acc": files.metrics[3, 86]["train_accuracy"],
        "test_acc": files.metrics[3, 86]["test_accuracy"],
        "train_loss": pytest.approx(files.metrics[3, 86]["train_loss"]),
        "test_loss": pytest.approx(files.metrics[3, 86]["test_loss"]),
        "epoch": 86,
    }
    varying = ["activation", "dropout", "l2reg", "learning_rate", "optimizer", "train_fraction"]
    hparams = task.model_configs["3"]["hparams"]
    assert sorted(hparams) == [f"config.{name}" for name in varying]  # the others are constant
    assert hparams["config.learning_rate"]["current_value"] == 0.004
    assert len(hparams["config.learning_rate"]["possible_values"]) == 8
    assert list(task.frame()["config.activation"])[:4] == ["tanh", "tanh", "sigmoid", "selu"]


def test_the_layout_of_the_file_is_trusted_over_the_published_one(files, tmp_path):
    made = SmallCnnFiles(tmp_path / "mnist", order=[7, 6, 1, 0, 3, 2, 5, 4])
    first, second = (load_zoo(f)["mnist"]["2"].load() for f in (files.folder, made.write()))
    x = torch.randn(3, 1, 28, 28)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("stride", [1, 2])
def test_the_stride_that_gives_the_recorded_accuracies_is_kept_and_told(tmp_path, stride):
    made = SmallCnnFiles(tmp_path / "mnist", stride=stride, n=30, networks=2)
    task = load_zoo(made.write())["mnist"]
    assert task.way == f"stride {stride}"
    assert task["1"].load().conv1.stride == (stride, stride)
    table = zoo_info(tmp_path, accuracies=None)
    assert (table["problem"] == "").all() and (table["examples"] == 30).all()
    np.testing.assert_allclose(table["recomputed_test_acc"], table["test_acc"], atol=1e-9)
    other = 3 - stride
    x = grey(made.test[0])
    right = logits(made.rows[1, 86], x, made.settings[1]["activation"], other).argmax(1)
    accuracy = (right == made.test[1]).mean()
    told = f"stride {stride} (stride {other}: test accuracy {accuracy:.4f})"
    assert table["read_as"][1] == told


def test_info_checks_three_networks_or_as_many_as_are_asked_for(files):
    counts = [
        int(zoo_info(files.folder, accuracies=a)["recomputed_test_acc"].notna().sum())
        for a in (3, 5)
    ]
    assert counts == [3, 5]
    assert "recomputed_test_acc" not in zoo_info(files.folder, accuracies=0)
    table = zoo_info(files.folder, deep=True, accuracies=1)
    assert set(table["parameters"]) == {4970} and set(table["layers"]) == {4}
    with pytest.raises(ArgumentError, match="accuracies is -1"):
        zoo_info(files.folder, accuracies=-1)


def test_the_command_line_lists_and_checks_it(files):
    done = CliRunner().invoke(main, ["zoo", "info", str(files.folder), "--accuracies", "all"])
    assert done.exit_code == 0 and "8 rows, 0 with problems" in done.output
    assert "recomputed_test_acc" in done.output and "stride 2 (stride 1" in done.output
    done = CliRunner().invoke(main, ["zoo", "info", str(files.folder), "--accuracies", "most"])
    assert done.exit_code == 2 and "'most' is not a number" in done.output


def test_it_is_scored_and_rated(files, tmp_path):
    measures = [
        sk.MSharpness(m=[1, 8], rho=0.05),
        sk.measures.make_measure("distance_from_initial"),
    ]
    scores = sk.score_zoo(load_zoo(files.folder), measures, n=16, out=tmp_path, progress=False)
    assert scores.failures.empty
    frame = scores.frame()
    found = frame[frame["form"] == "euclidean"].set_index("model")["value"]
    for k in range(8):
        first, last = (files.rows[k, e].astype(np.float64) for e in (0, 86))
        assert found[str(k)] == pytest.approx(np.linalg.norm(last - first), rel=1e-6)
    gaps = scores.metrics()["generalization_gap"]
    expected = [files.metrics[k, 86] for k in range(8)]
    assert gaps.tolist() == pytest.approx(
        [m["train_accuracy"] - m["test_accuracy"] for m in expected]
    )
    table = sk.evaluate(scores, resamples=20, target="test_loss")
    assert table["kendall_tau"].notna().all()


def test_every_checkpoint_can_be_a_model_of_its_own(files):
    task = load_zoo(files.folder)["mnist"]
    epochs = task.at_epochs()
    assert epochs.name == "mnist@all" and len(epochs) == 8 * len(EPOCHS)
    assert list(epochs)[:4] == ["0@0", "0@1", "0@86", "1@0"]
    hparams = epochs.model_configs["3@1"]["hparams"]
    assert hparams["epoch"] == {"possible_values": [0, 1, 86], "current_value": 1}
    assert epochs["3@1"].metrics["test_acc"] == files.metrics[3, 1]["test_accuracy"]
    early = task.at_epochs(1)
    assert list(early) == [f"{k}@1" for k in range(8)] and early.name == "mnist@1"
    x = grey(files.test[0][:2])
    with torch.no_grad():
        found = early["2@1"].load()(torch.tensor(x[:, None], dtype=torch.float32))
    expected = logits(files.rows[2, 1], x, files.settings[2]["activation"], 2)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ArgumentError, match="no network of mnist has a checkpoint of epoch 5"):
        task.at_epochs(5)
    scores = sk.score_zoo(task.at_epochs(1, 86), sk.MSharpness(m=4, rho=0.1), n=8, progress=False)
    assert len(scores.frame()) == 16


def test_a_worker_gets_it_small_and_with_the_stride_that_was_found(files):
    task = load_zoo(files.folder)["mnist"]
    task.dataset("train")
    sent = pickle.dumps(task)
    assert len(sent) < 20_000
    task.path = None  # what was sent stands alone
    again = pickle.loads(sent)
    assert "_chosen" in vars(again) and again["4"].load().conv1.stride == (2, 2)


def test_several_tasks_are_the_folders_of_one(files, tmp_path):
    for name in ("mnist", "fashion_mnist"):
        shutil.copytree(files.folder, tmp_path / name)
    (tmp_path / "images").mkdir()
    (tmp_path / "mnist" / "images").rename(tmp_path / "images" / "mnist")
    with pytest.warns(UserWarning, match="trained on a part"):
        zoo = load_zoo(tmp_path)
    assert list(zoo) == ["fashion_mnist", "mnist"]
    assert zoo["mnist"].files() == [
        tmp_path / "images" / "mnist" / f"{split}-{kind}-ubyte"
        for split in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]


# what is damaged ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["nan", "", "1.5", "broken"])
def test_a_network_without_a_usable_accuracy_costs_itself(files, copy, value):
    edit_metrics(copy, with_cell("test_accuracy", 3 * 5 + 3, value))  # network 5, epoch 86
    with pytest.warns(UserWarning, match="1 of 8 models are left out; the first, 5: .*test_acc"):
        zoo = load_zoo(copy)
    assert list(zoo["mnist"].model_configs) == [str(k) for k in range(8) if k != 5]
    table = zoo_info(copy)
    assert list(table["model"][table["problem"] != ""]) == ["5"]


def test_a_network_that_is_left_out_is_a_failure_of_a_run_and_no_more(copy):
    edit_metrics(copy, with_cell("test_accuracy", 3 * 5 + 3, "nan"))
    with pytest.warns(UserWarning, match="1 of 8 models are left out"):
        zoo = load_zoo(copy)
    scores = sk.score_zoo(zoo, sk.MSharpness(m=4, rho=0.1), n=8, progress=False)
    assert list(scores.failures["model"]) == ["5"] and scores.frame()["model"].nunique() == 7
    assert sk.evaluate(scores, resamples=10)["models"].tolist() == [7]


def test_a_network_with_infinite_weights_costs_itself(copy):
    weights = np.load(copy / "weights.npy")
    weights[3 * 2 + 2, 1000] = np.inf
    np.save(copy / "weights.npy", weights)
    table = zoo_info(copy)
    [(model, problem)] = table.loc[table["problem"] != "", ["model", "problem"]].to_numpy()
    assert model == "2" and "row 8 (network 2, epoch 86): has NaN or infinite weights" in problem


def test_an_unknown_activation_costs_its_network(copy):
    edit_metrics(copy, lambda lines: [line.replace(",selu,", ",swish,") for line in lines])
    table = zoo_info(copy)
    assert list(table["model"][table["problem"] != ""]) == ["3", "7"]
    assert "config.activation is 'swish'; expected one of relu, tanh" in table["problem"][3]


@pytest.mark.parametrize("column", ["modeldir", "step", "config.activation", "test_accuracy"])
def test_a_missing_column_is_named(files, tmp_path, column):
    made = SmallCnnFiles(tmp_path / "mnist", n=4, networks=1)
    made.write(without=[column])
    with pytest.raises(ZooFormatError, match=f"metrics.csv.gz: column '{column}' is missing"):
        load_zoo(tmp_path)
    table = zoo_info(tmp_path)
    assert f"column '{column}' is missing" in table["problem"][0]


def test_weights_of_another_shape_are_refused(copy):
    weights = np.load(copy / "weights.npy")
    np.save(copy / "weights.npy", weights[:, :4969])
    with pytest.raises(ZooFormatError, match=r"shape \(24, 4969\); expected \(24, 4970\)"):
        load_zoo(copy)
    np.save(copy / "weights.npy", weights[:-1])
    with pytest.raises(ZooFormatError, match="has 24 checkpoints"):
        load_zoo(copy)
    np.save(copy / "weights.npy", weights.astype(np.int32))
    with pytest.raises(ZooFormatError, match="int32 of shape"):
        load_zoo(copy)


def test_nothing_in_a_file_of_arrays_is_run(copy):
    class Trap:
        def __reduce__(self):
            return (open, (str(copy / "trapped"), "w"))

    np.save(copy / "weights.npy", np.array([[Trap()]], dtype=object), allow_pickle=True)
    with pytest.raises(ZooFormatError, match=r"weights.npy: expected an array of numpy's format"):
        load_zoo(copy)
    assert not (copy / "trapped").exists()


def test_a_table_that_expands_without_end_is_refused(copy):
    (copy / "metrics.csv.gz").write_bytes(gzip.compress(bytes(80 * 2**20)))
    with pytest.raises(ZooFormatError, match="holds more than the"):
        load_zoo(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace("varname", "name"), "column 'varname' is missing"),
        (lambda t: t.replace('"(3, 3, 1, 16)"', '"(3, 3, 1, 17)"'), "as many columns as the shape"),
        (
            lambda t: t.replace("conv2d_1/kernel", "lstm/kernel"),
            "expected a kernel or bias of conv2d",
        ),
        (lambda t: t.replace("dense/", "conv2d_3/"), "expected convolutions and one dense layer"),
        (lambda t: t.replace(",0,16,", ",1,17,"), "variables share columns"),
        (lambda t: t.replace('"(3, 3, 1, 16)"', '"(3, 1, 3, 16)"'), "expected one channel, grey"),
    ],
)
def test_a_layout_that_makes_no_network_is_refused(copy, change, message):
    path = copy / "layout.csv"
    path.write_text(change(path.read_text()))
    with pytest.raises(ZooFormatError, match=message):
        load_zoo(copy)


def test_without_a_layout_nothing_is_guessed(copy):
    (copy / "layout.csv").unlink()
    with pytest.raises(ZooFormatError, match=r"layout.csv: file is missing"):
        load_zoo(copy)


def test_without_images_it_says_where_they_may_lie(copy):
    shutil.rmtree(copy / "images")
    with pytest.warns(UserWarning, match="comes without images.*mnist/images"):
        zoo = load_zoo(copy)
    scores = sk.score_zoo(zoo, sk.MSharpness(m=1, rho=0.1), limit=1, n=4, progress=False)
    assert "put mnist, or a link" in scores.failures["error"][0]
    table = zoo_info(copy)
    assert "recorded accuracies cannot be checked" in table["problem"][0] and len(table) == 9


def test_images_of_another_set_are_found_out(files, copy):
    from small_cnns import write_idx

    write_idx(copy / "images", files.train, (files.test[0], (files.test[1] + 3) % 10))
    with pytest.warns(UserWarning, match="these are not its images, or not its network"):
        load_zoo(copy)
    assert zoo_info(copy)["problem"].str.contains("these are not its images").any()


def test_damaged_images_are_an_error_of_theirs(copy):
    (copy / "images" / "t10k-labels-idx1-ubyte").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="cannot be checked: .*t10k-labels"):
        task = load_zoo(copy)["mnist"]
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte"):
        task.dataset("train")


def test_an_archive_must_be_unpacked_first(tmp_path):
    (tmp_path / "svhn_cropped.tar.xz").write_bytes(b"")
    with pytest.raises(ZooFormatError, match=r"unpack it \(tar xJf svhn_cropped.tar.xz\)"):
        load_zoo(tmp_path)


def test_a_zoo_elsewhere_must_be_copied(files, monkeypatch, tmp_path):
    import fsspec

    monkeypatch.setenv("SHARPKIT_CACHE", str(tmp_path))
    memory = fsspec.filesystem("memory")
    memory.put(str(files.folder), "/away/mnist", recursive=True)
    with pytest.raises(ZooFormatError, match=r"must be on this machine.*copy it here"):
        load_zoo("memory://away/mnist")
    memory.rm("/away", recursive=True)
