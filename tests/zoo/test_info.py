"""The table of a zoo lists every problem and stops at none."""

import json
import math

import h5py
import pytest
from paths import RECORDED, SHARED, needs_shared

from sharpkit.errors import ZooFormatError
from sharpkit.zoo import load_zoo, zoo_info


def model(zoo_path, id_):
    return zoo_path / "input_data" / "tiny" / f"model_{id_}"


def shard(zoo_path, k=0, split="train"):
    return zoo_path / "input_data" / "tiny" / "dataset_1" / split / f"shard_{k}.tfrecord"


def problems(zoo_path, **options):
    table = zoo_info(zoo_path, **options)
    bad = table[table.problem != ""]
    return [
        (row.model if isinstance(row.model, str) else "", row.problem) for row in bad.itertuples()
    ]


@pytest.mark.parametrize("deep", [False, True])
def test_a_good_zoo_has_one_row_a_model_and_no_problem(zoo_path, deep):
    table = zoo_info(load_zoo(zoo_path), deep=deep)
    assert list(table.columns) == [
        "task", "model", "layers", "parameters", "train_acc", "test_acc",
        "generalization_gap", "problem",
    ]  # fmt: skip
    assert list(table.model) == ["1", "2", "10", "33"]
    assert set(table.problem) == {""}
    assert set(table.layers) == {5} and set(table.parameters) == {54 + 3 + 6 + 180 + 3}
    assert table.generalization_gap[0] == pytest.approx(0.12)


@pytest.mark.filterwarnings("ignore:.*settings have no model")
@pytest.mark.parametrize(
    ("root", "models"),
    [
        (RECORDED / "pgdl_fixture", 2),
        pytest.param(SHARED / "pgdl_fixture", 8, marks=needs_shared),
        pytest.param(SHARED / "pgdl_toy", 18, marks=needs_shared),
    ],
)
def test_real_zoos_have_no_problem(root, models):
    table = zoo_info(root, deep=True)
    assert len(table) == models and set(table.problem) == {""}


@pytest.mark.parametrize("deep", [False, True])
def test_every_problem_is_listed(zoo_path, deep):
    (model(zoo_path, 1) / "config.json").write_text("{")
    (model(zoo_path, 2) / "weights.hdf5").write_bytes(b"broken")
    (model(zoo_path, 2) / "weights_init.hdf5").unlink()
    shard(zoo_path).write_bytes(b"")
    found = dict(problems(zoo_path, deep=deep))
    assert set(found) == {"", "1", "2"}
    assert "shard_0.tfrecord" in found[""]
    assert "config.json: expected JSON" in found["1"]
    assert (
        "weights.hdf5: expected an undamaged" in found["2"]
        and "weight file is missing" in found["2"]
    )


def test_deep_finds_what_a_glance_does_not(zoo_path):
    data = bytearray(shard(zoo_path, 1).read_bytes())
    data[100] ^= 1
    shard(zoo_path, 1).write_bytes(data)
    with h5py.File(model(zoo_path, 33) / "weights.hdf5", "r+") as file:
        file["dense/dense/bias:0"][0] = math.nan
    assert problems(zoo_path) == []
    found = dict(problems(zoo_path, deep=True))
    assert set(found) == {"", "33"}
    assert "shard_1.tfrecord" in found[""] and "corrupt" in found[""]
    assert "NaN or infinite" in found["33"]


def test_deep_finds_labels_and_inputs_that_do_not_fit_the_network(zoo_path):
    config = json.loads((model(zoo_path, 1) / "config.json").read_text())
    config["model_config"][-1]["units"] = 2
    with h5py.File(model(zoo_path, 1) / "weights.hdf5", "r+") as file:
        kernel = file["dense/dense/kernel:0"][:, :2]
        del file["dense/dense/kernel:0"], file["dense/dense/bias:0"]
        file["dense/dense/kernel:0"], file["dense/dense/bias:0"] = kernel, kernel[0]
    (model(zoo_path, 1) / "config.json").write_text(json.dumps(config))
    found = dict(problems(zoo_path, deep=True))
    assert set(found) == {"1"}
    assert "outputs (10, 2) do not fit label 2" in found["1"]


def test_shards_that_do_not_fit_together_are_found(zoo_path, tmp_path):
    import numpy as np

    from sharpkit.zoo.shards.tfrecord import write_shard

    write_shard(shard(zoo_path, 2), np.ones((2, 4), np.float32), np.array([0, 1]))
    [(where, problem)] = problems(zoo_path, deep=True)
    assert where == "" and "others have" in problem


def test_entries_and_models_that_do_not_match_are_listed(zoo_path):
    model(zoo_path, 33).rename(model(zoo_path, 34))
    found = dict(problems(zoo_path))
    assert found[""] == "model 33 is listed but absent"
    assert "model 34: no such entry" in found["34"]


def test_broken_model_configs_leave_the_rest_of_the_table(zoo_path):
    (zoo_path / "reference_data" / "tiny" / "model_configs.json").write_text("{")
    table = zoo_info(zoo_path)
    assert len(table) == 5
    assert table.parameters.notna().sum() == 4


def test_a_missing_test_split_is_no_problem_but_a_missing_train_split_is(zoo_path):
    for split in ("test", "train"):
        for k in range(3):
            shard(zoo_path, k, split).unlink(missing_ok=True)
        shard(zoo_path, 0, split).parent.rmdir()
    [(where, problem)] = problems(zoo_path)
    assert where == "" and "no train data" in problem


def test_no_zoo_at_all_is_an_error(tmp_path):
    with pytest.raises(ZooFormatError, match="no model found"):
        zoo_info(tmp_path)
