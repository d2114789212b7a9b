"""What is written reads back bit for bit, and a writer may be stopped at any point."""

import pytest
import torch
from paths import FIXTURE_ZOOS, SHARED, needs_shared

from sharpkit.errors import ArgumentError, DataError, ZooFormatError
from sharpkit.zoo import ZooWriter, build_model, load_zoo, write_zoo


def same_model(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def same_task(a, b):
    assert list(a) == list(b)
    assert a.model_configs == b.model_configs
    for split in ("train", "test"):
        for x, y in zip(a.dataset(split).tensors, b.dataset(split).tensors, strict=True):
            assert torch.equal(x, y)
    for id_ in a:
        assert a[id_].config == b[id_].config
        for weights in ("final", "initial"):
            assert same_model(a[id_].load(weights), b[id_].load(weights))


def test_a_copy_of_a_zoo_equals_it(zoo_path, tmp_path):
    write_zoo(load_zoo(zoo_path), tmp_path / "copy", shard_size=3)
    same_task(load_zoo(zoo_path)["tiny"], load_zoo(tmp_path / "copy")["tiny"])


@pytest.mark.filterwarnings("ignore:.*settings have no model")
@pytest.mark.parametrize(
    "root", [*FIXTURE_ZOOS, pytest.param(SHARED / "pgdl_toy", id="toy", marks=needs_shared)]
)
def test_a_copy_of_a_real_zoo_equals_it(root, tmp_path):
    zoo = load_zoo(root)
    write_zoo(zoo, tmp_path)
    for task in zoo:
        same_task(zoo[task], load_zoo(tmp_path)[task])


def test_a_broken_model_is_reported_after_the_others_are_copied(zoo_path, tmp_path):
    (zoo_path / "input_data" / "tiny" / "model_2" / "weights.hdf5").write_bytes(b"broken")
    with pytest.raises(ZooFormatError, match=r"1 parts were not written: .*model_2"):
        write_zoo(load_zoo(zoo_path), tmp_path / "copy")
    with pytest.warns(UserWarning, match="1 of 4 settings has no model"):
        assert list(load_zoo(tmp_path / "copy")["tiny"]) == ["1", "10", "33"]


def test_a_second_writer_continues_a_zoo(zoo_path, network):
    ZooWriter(zoo_path).write_model(
        "tiny",
        "7",
        network,
        initial=network.state_dict(),
        hyperparameters={"width": 3, "kind": "a"},
        possible_values={"width": [1, 2, 3], "kind": ["a", "b"]},
        metrics={"train_acc": torch.tensor(1.0), "test_acc": 0.5},
    )
    with pytest.warns(UserWarning, match=r"different possible values|no model"):
        task = load_zoo(zoo_path)["tiny"]
    assert list(task) == ["1", "2", "7", "10", "33"] == list(task.model_configs)
    assert task["7"].generalization_gap == 0.5


def test_a_shorter_split_replaces_a_longer_one(zoo_path):
    writer = ZooWriter(zoo_path, shard_size=2)
    writer.write_dataset("tiny", "train", torch.ones(3, 2, 5, 4), torch.tensor([0, 1, 2]))
    assert len(load_zoo(zoo_path)["tiny"].dataset("train")) == 3


def test_no_temporary_file_stays(zoo_path):
    assert not [p for p in zoo_path.rglob("*") if p.name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "x"}, "model id is 'x'"),
        ({"id": -1}, "model id is '-1'"),
        ({"task": "../up"}, "cannot be a directory name"),
        ({"task": ""}, "cannot be a directory name"),
        ({"hyperparameters": {}}, "must have the same names"),
        ({"metrics": {"train_acc": 1.0}}, "metrics missing: \\['test_acc'\\]"),
        ({"metrics": {"train_acc": 1.0, "test_acc": float("nan")}}, "not finite: \\['test_acc'\\]"),
    ],
)
def test_a_model_that_would_not_load_is_not_written(tmp_path, network, change, message):
    arguments = {
        "task": "t",
        "id": 1,
        "model": network,
        "initial": network,
        "hyperparameters": {"a": 1},
        "possible_values": {"a": [1]},
        "metrics": {"train_acc": 1.0, "test_acc": 1.0},
    }
    with pytest.raises(ArgumentError, match=message):
        ZooWriter(tmp_path / "zoo").write_model(**(arguments | change))
    assert not (tmp_path / "zoo").exists()


def test_data_that_would_not_load_are_not_written(tmp_path):
    writer, labels = ZooWriter(tmp_path / "zoo"), torch.tensor([0, 1])
    with pytest.raises(DataError, match="float32"):
        writer.write_dataset("t", "train", torch.ones(2, 3).double(), labels)
    with pytest.raises(DataError, match="at least one"):
        writer.write_dataset("t", "train", torch.ones(0, 3), labels[:0])
    with pytest.raises(DataError, match="do not go with"):
        writer.write_dataset("t", "train", torch.ones(3, 3), labels)
    with pytest.raises(ArgumentError, match="'train' or 'test'"):
        writer.write_dataset("t", "valid", torch.ones(2, 3), labels)
    with pytest.raises(ArgumentError, match="shard_size"):
        ZooWriter(tmp_path, shard_size=0)


def test_vectors_are_written_too(tmp_path):
    model = build_model({"input_shape": [3], "model_config": [{"layer_name": "Dense", "units": 2}]})
    writer = ZooWriter(tmp_path)
    inputs = torch.randn(5, 3)
    writer.write_dataset("t", "train", inputs, torch.tensor([0, 1, 0, 1, 0]))
    writer.write_model(
        "t", 0, model, initial=model, hyperparameters={}, possible_values={},
        metrics={"train_acc": 1, "test_acc": 1},
    )  # fmt: skip
    task = load_zoo(tmp_path)["t"]
    assert torch.equal(task.dataset("train").tensors[0], inputs)
    assert torch.equal(task["0"].load()(inputs), model(inputs))
