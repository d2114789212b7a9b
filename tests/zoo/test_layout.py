"""Zoos open wherever they may lie, lazily, and what is broken never hides what is good."""

import json
import pickle
import shutil
import warnings

import numpy as np
import pytest
import torch
from paths import FIXTURE_REFERENCE, FIXTURE_ZOOS, RECORDED, SHARED, needs_shared

from sharpkit.errors import ArgumentError, ZooFormatError
from sharpkit.zoo import load_zoo


def configs_path(root, task="tiny"):
    return root / "reference_data" / task / "model_configs.json"


def edit_configs(root, change):
    content = json.loads(configs_path(root).read_text())
    change(content)
    configs_path(root).write_text(json.dumps(content))


@pytest.mark.filterwarnings("ignore:.*settings have no model")
@pytest.mark.parametrize(
    ("root", "reference", "task", "models"),
    [
        (RECORDED / "pgdl_fixture", FIXTURE_REFERENCE, "task1_v4", 2),
        pytest.param(SHARED / "pgdl_fixture", FIXTURE_REFERENCE, "task1_v4", 8, marks=needs_shared),
        pytest.param(
            SHARED / "pgdl_toy", "../pgdl_toy_reference.npz", "pgdl_toy", 18, marks=needs_shared
        ),
    ],
)
def test_real_zoos_give_the_logits_that_tensorflow_computed(root, reference, task, models):
    expected = np.load(root / reference)
    loaded = load_zoo(root)[task]
    assert len(loaded) == models
    inputs, labels = (t[:64] for t in loaded.dataset("train").tensors)
    if "inputs" in expected:  # the small form leaves them out: wrong ones give wrong logits
        stored = torch.from_numpy(expected["inputs"])
        assert torch.equal(inputs, stored.permute(0, 3, 1, 2) if stored.ndim == 4 else stored)
    assert labels.tolist() == expected["labels"].tolist() and labels.dtype == torch.int64
    for id_, entry in loaded.items():
        for weights, key in (("final", "logits"), ("initial", "logits_init")):
            model = entry.load(weights)
            assert not model.training
            with torch.no_grad():
                logits = model(inputs).numpy()
            np.testing.assert_allclose(logits, expected[f"model_{id_}/{key}"], atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*settings have no model")
@pytest.mark.parametrize("path", ["", "input_data", "input_data/task1_v4"])
@pytest.mark.parametrize("root", FIXTURE_ZOOS)
def test_a_zoo_opens_from_its_root_its_input_data_and_its_task(root, path):
    task = load_zoo(root / path)["task1_v4"]
    small = RECORDED in root.parents
    all_models = ["20", "21", "22", "23", "32", "35", "38", "41"]
    assert list(task) == (["20", "41"] if small else all_models)
    assert task.possible_values["dropout_p"] == [0.0, 0.5]
    assert task["20"].hyperparameters["convwidth"] == 8
    gap = task["20"].metrics["train_acc"] - task["20"].metrics["test_acc"]
    assert task["20"].generalization_gap == gap
    assert len(task.dataset("test")) == (4 if small else 96)


def test_models_come_in_numeric_order_with_their_settings(zoo_path):
    task = load_zoo(zoo_path)["tiny"]
    assert list(task) == ["1", "2", "10", "33"]
    assert task["10"].hyperparameters == {"width": 2, "kind": "a"}
    assert task["10"].metrics == {"train_acc": 0.9, "test_acc": 0.79}
    assert task["10"].generalization_gap == pytest.approx(0.11)
    assert task.possible_values == {"width": [1, 2], "kind": ["a", "b"]}
    assert task["10"].task is task and task["10"].path.name == "model_10"


def test_model_configs_may_lie_beside_the_models(zoo_path):
    shutil.move(configs_path(zoo_path), zoo_path / "input_data" / "tiny")
    assert len(load_zoo(zoo_path / "input_data" / "tiny")["tiny"].model_configs) == 4


def test_a_folder_around_the_archive_is_looked_through(zoo_path):
    assert list(load_zoo(zoo_path.parent)) == ["tiny"]


def test_a_folder_of_tasks_needs_no_input_data_level(zoo_path):
    moved = (zoo_path / "input_data").rename(zoo_path / "models")
    assert list(load_zoo(moved)) == ["tiny"]


def test_the_litter_of_macos_is_skipped(zoo_path):
    for folder in (zoo_path / "input_data", zoo_path / "input_data" / "tiny"):
        (folder / ".DS_Store").write_bytes(b"\0")
        (folder / "__MACOSX").mkdir()
    (zoo_path / "input_data" / "tiny" / "dataset_1" / "train" / "._shard_0.tfrecord").touch()
    zoo = load_zoo(zoo_path)
    assert list(zoo) == ["tiny"]
    assert len(zoo["tiny"].dataset("train")) == 10


def test_opening_reads_nothing_but_model_configs(zoo_path):
    for file in (zoo_path / "input_data").rglob("*"):
        if file.is_file():
            file.write_bytes(b"broken")
    assert len(load_zoo(zoo_path)["tiny"]) == 4


def test_data_are_decoded_once(zoo_path):
    task = load_zoo(zoo_path)["tiny"]
    assert task.dataset("train") is task.dataset("train")
    inputs, labels = task.dataset("test").tensors
    assert inputs.shape == (6, 2, 5, 4) and inputs.dtype == torch.float32
    assert labels.dtype == torch.int64


def test_a_pickled_task_leaves_its_data_behind(zoo_path):
    task = load_zoo(zoo_path)["tiny"]
    data = task.dataset("train").tensors
    copied = pickle.loads(pickle.dumps(task["10"])).task
    assert copied._datasets == {} and list(copied) == list(task)
    assert all(map(torch.equal, copied.dataset("train").tensors, data))


def test_a_loaded_model_can_be_pickled(zoo_path):
    model = load_zoo(zoo_path)["tiny"]["1"].load()
    x = torch.randn(2, 2, 5, 4)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_shards_are_read_in_numeric_order(zoo_path):
    folder = zoo_path / "input_data" / "tiny" / "dataset_1" / "train"
    labels = load_zoo(zoo_path)["tiny"].dataset("train").tensors[1]
    for k in (2, 1, 0):  # 4, 4 and 2 examples
        (folder / f"shard_{k}.tfrecord").rename(folder / f"shard_{k + 9}.tfrecord")
    assert torch.equal(load_zoo(zoo_path)["tiny"].dataset("train").tensors[1], labels)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(ZooFormatError, match="nowhere: directory is missing"):
        load_zoo(tmp_path / "nowhere")


def test_a_file_is_not_a_zoo(tmp_path):
    (tmp_path / "zoo").touch()
    with pytest.raises(ZooFormatError, match="expected a directory"):
        load_zoo(tmp_path / "zoo")


def test_an_unreadable_directory_is_named(tmp_path, monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "iterdir", denied)
    with pytest.raises(ZooFormatError, match=r"cannot be read \(Permission denied\)"):
        load_zoo(tmp_path)


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(ZooFormatError, match="no model found; expected input_data"):
        load_zoo(tmp_path)


def test_an_empty_task_is_refused(zoo_path):
    for folder in (zoo_path / "input_data" / "tiny").glob("model_*"):
        shutil.rmtree(folder)
    with pytest.raises(ZooFormatError, match="tiny: task has no model_<id> directory"):
        load_zoo(zoo_path)


def test_an_empty_task_beside_a_good_one_is_warned_about(zoo_path):
    (zoo_path / "input_data" / "empty").mkdir()
    with pytest.warns(UserWarning, match="empty: task has no model_<id> directory"):
        assert list(load_zoo(zoo_path)) == ["tiny"]


@pytest.mark.parametrize("content", ["", "{", '{"1": ', "[]", "{}", "\xff", "[" * 100_000])
def test_broken_model_configs_are_named(zoo_path, content):
    configs_path(zoo_path).write_bytes(content.encode("latin-1"))
    with pytest.raises(ZooFormatError, match=r"model_configs\.json"):
        load_zoo(zoo_path)


def test_missing_model_configs_tell_where_they_were_sought(zoo_path):
    configs_path(zoo_path).unlink()
    with pytest.raises(ZooFormatError, match=r"is missing; looked for .*reference_data"):
        load_zoo(zoo_path)


def test_a_broken_task_does_not_lose_the_others(zoo_path):
    shutil.copytree(zoo_path / "input_data" / "tiny", zoo_path / "input_data" / "other")
    configs_path(zoo_path, "other").parent.mkdir()
    configs_path(zoo_path, "other").write_text("{")
    with pytest.warns(UserWarning, match="task other: .*expected JSON"):
        zoo = load_zoo(zoo_path)
    assert zoo["tiny"]["1"].generalization_gap > 0
    zoo["other"]["1"].load()
    with pytest.raises(ZooFormatError, match="expected JSON"):
        _ = zoo["other"].model_configs


def test_a_complete_zoo_gives_no_warning(zoo_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_zoo(zoo_path)


def test_models_and_entries_that_do_not_match_are_warned_about(zoo_path):
    (zoo_path / "input_data" / "tiny" / "model_33").rename(
        zoo_path / "input_data" / "tiny" / "model_34"
    )
    with pytest.warns(UserWarning) as caught:
        task = load_zoo(zoo_path)["tiny"]
    messages = " ".join(str(w.message) for w in caught)
    assert "models not in model_configs.json: 34" in messages
    assert "lists models that are absent: 33" in messages
    task["34"].load()
    with pytest.raises(ZooFormatError, match="model 34: no such entry"):
        _ = task["34"].hyperparameters


def test_doubled_and_missing_settings_are_warned_about(zoo_path):
    edit_configs(zoo_path, lambda c: c["33"]["hparams"].update(c["1"]["hparams"]))
    with pytest.warns(UserWarning) as caught:
        load_zoo(zoo_path)
    messages = [str(w.message) for w in caught]
    assert "task tiny: 2 models share the setting width=1 kind=b: 1, 33" in messages
    assert "task tiny: 1 of 4 settings has no model: width=2 kind=b" in messages


BAD_ENTRIES = {
    "'metrics' is missing": lambda e: e.pop("metrics"),
    "metric 'test_acc' is missing": lambda e: e["metrics"].pop("test_acc"),
    "metric 'train_acc' is 'high'": lambda e: e["metrics"].update(train_acc="high"),
    "metric 'train_acc' is nan": lambda e: e["metrics"].update(train_acc=float("nan")),
    "'hparams' is missing": lambda e: e.update(hparams=3),
    "'width' has no current_value": lambda e: e["hparams"]["width"].pop("current_value"),
}


@pytest.mark.parametrize("message", BAD_ENTRIES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_broken_entry_concerns_its_model_only(zoo_path, message):
    edit_configs(zoo_path, lambda c: BAD_ENTRIES[message](c["2"]))
    task = load_zoo(zoo_path)["tiny"]
    with pytest.raises(ZooFormatError, match=f"model 2: .*{message}"):
        _ = (task["2"].hyperparameters, task["2"].generalization_gap)
    assert task["10"].hyperparameters == {"width": 2, "kind": "a"}
    assert task["10"].generalization_gap > 0


@pytest.mark.parametrize("content", ["{", "[]", '{"model_config": [{"layer_name": "LSTM"}]}'])
def test_a_broken_config_concerns_its_model_only(zoo_path, content):
    task = load_zoo(zoo_path)["tiny"]
    (task["2"].path / "config.json").write_text(content)
    with pytest.raises(ZooFormatError, match=r"model_2/config\.json"):
        task["2"].load()
    task["10"].load()


def test_a_missing_test_split_is_an_error_only_when_asked_for(zoo_path):
    shutil.rmtree(zoo_path / "input_data" / "tiny" / "dataset_1" / "test")
    task = load_zoo(zoo_path)["tiny"]
    task.dataset("train")
    with pytest.raises(ZooFormatError, match="this task has no test data"):
        task.dataset("test")


def test_a_missing_shard_is_noticed(zoo_path):
    task = load_zoo(zoo_path)["tiny"]
    task.shards("train")[1].unlink()
    with pytest.raises(ZooFormatError, match=r"shard_1\.tfrecord is missing"):
        task.dataset("train")


def test_a_split_without_shards_is_refused(zoo_path):
    task = load_zoo(zoo_path)["tiny"]
    for shard in task.shards("train"):
        shard.unlink()
    with pytest.raises(ZooFormatError, match=r"no shard_<k>\.tfrecord found"):
        task.dataset("train")


def test_wrong_names_are_answered_with_the_right_ones(zoo_path):
    zoo = load_zoo(zoo_path)
    with pytest.raises(KeyError, match="it has tiny"):
        zoo["huge"]
    with pytest.raises(KeyError, match="4 models"):
        zoo["tiny"]["7"]
    with pytest.raises(ArgumentError, match="'final' or 'initial'"):
        zoo["tiny"]["1"].load("best")
    with pytest.raises(ArgumentError, match="'train' or 'test'"):
        zoo["tiny"].dataset("validation")


def test_a_shard_far_away_is_a_gap(zoo_path):
    folder = zoo_path / "input_data" / "tiny" / "dataset_1" / "train"
    last = max(folder.glob("shard_*.tfrecord"))
    last.rename(folder / "shard_99999999999.tfrecord")
    (folder / "shard_0.tfrecord").touch()
    with pytest.raises(ZooFormatError, match=r"shard_\d{1,2}\.tfrecord is missing"):
        load_zoo(zoo_path)["tiny"].shards("train")
