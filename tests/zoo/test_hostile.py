"""One bad task, file or value concerns only itself: it is told, and the others go on."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings

import pytest

from sharpkit.errors import ZooFormatError
from sharpkit.files import remove_leftovers, temporary_folder
from sharpkit.zoo import build_model, load_zoo, write_weights, zoo_info
from sharpkit.zoo.embedded import _unpacked, _verified, pack_zoo


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def configs(root, task="tiny"):
    return root / "reference_data" / task / "model_configs.json"


@pytest.fixture
def two_tasks(zoo_path):
    for part in ("input_data", "reference_data"):
        shutil.copytree(zoo_path / part / "tiny", zoo_path / part / "other")
    return zoo_path


def test_ids_with_and_without_prefix_are_the_same(zoo_path):
    rewrite(configs(zoo_path), lambda c: c.update(model_1=c.pop("1")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = load_zoo(zoo_path)["tiny"]
    assert set(task.model_configs) == set(task)
    assert task["1"].generalization_gap > 0


def test_an_id_that_comes_twice_concerns_its_task_only(two_tasks):
    rewrite(configs(two_tasks), lambda c: c.update(model_1=c["1"]))
    with pytest.warns(UserWarning, match="task tiny: .*'1' and 'model_1' are both model 1"):
        zoo = load_zoo(two_tasks)
    with pytest.raises(ZooFormatError, match="both model 1; remove one"):
        _ = zoo["tiny"]["1"].metrics
    assert zoo["other"]["1"].metrics and zoo["other"].check() == []
    with pytest.raises(ZooFormatError, match="both model 1"):
        load_zoo(two_tasks / "input_data" / "tiny")


def test_a_name_twice_in_one_object_is_refused(zoo_path):
    path = configs(zoo_path)
    path.write_text(path.read_text().replace('"10": {', '"1": {', 1))
    with pytest.raises(ZooFormatError, match="has the name '1' twice"):
        load_zoo(zoo_path)


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes only there")
def test_a_task_whose_name_is_not_utf8_is_told_and_the_others_go_on(two_tasks):
    inside = os.fsencode(two_tasks / "input_data")
    os.rename(inside + b"/tiny", inside + b"/t\xff")  # noqa: PTH104  (a Path is text)
    with pytest.warns(UserWarning, match=r"t\\udcff: the name of this folder.*rename it"):
        zoo = load_zoo(two_tasks)
    assert list(zoo) == ["other"]
    with pytest.warns(UserWarning, match="rename it"):
        table = zoo_info(two_tasks)
    assert table.task.tolist() == [r"t\udcff"] + ["other"] * 4
    assert "rename it" in table.problem[0] and set(table.problem[1:]) == {""}
    table.to_csv(two_tasks / "table.csv")
    shutil.rmtree(two_tasks / "input_data" / "other")
    with pytest.raises(ZooFormatError, match="rename it"):
        load_zoo(two_tasks)


@pytest.mark.parametrize("name", ["model_²", "model_٣", "model_1²"])
def test_digits_of_other_scripts_are_no_ids(zoo_path, name):
    (zoo_path / "input_data" / "tiny" / name).mkdir()
    assert list(load_zoo(zoo_path)["tiny"]) == ["1", "2", "10", "33"]


def test_a_superscript_shard_is_no_shard(zoo_path):
    task = load_zoo(zoo_path)["tiny"]
    before = task.shards("train")
    (before[0].parent / "shard_².tfrecord").touch()
    assert task.shards("train") == before


BAD_SECTIONS = {
    "metrics {}": {"metrics": {}},
    "metrics null": {"metrics": None},
    "metrics list": {"metrics": [1]},
    "metric huge": {"metrics": {"train_acc": 10**400, "test_acc": 0.5}},
    "metric infinite": {"metrics": {"train_acc": float("inf"), "test_acc": 0.5}},
    "hparams null": {"hparams": None},
    "hparams list": {"hparams": [1]},
    "hparams number": {"hparams": 5},
    "surrogate name": {"hparams": {"\ud800": {"possible_values": [1], "current_value": 1}}},
}


@pytest.mark.parametrize("case", BAD_SECTIONS)
def test_a_bad_entry_is_a_row_of_the_table(two_tasks, case):
    rewrite(configs(two_tasks), lambda c: c["2"].update(BAD_SECTIONS[case]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = zoo_info(two_tasks)
    bad = table[table.problem != ""]
    assert set(bad.task) == {"tiny"} and len(table[table.task == "other"]) == 4
    if case.split()[0] not in ("metric", "surrogate") or "infinite" in case:
        assert bad.model.tolist() == ["2"]  # else the file itself is refused


@pytest.mark.parametrize("shape", [None, 5, [], [0, 1, 1], [10**400], ["²"], [1e300, 1, 1]])
def test_a_bad_input_shape_is_a_row_of_the_table(zoo_path, shape):
    path = zoo_path / "input_data" / "tiny" / "model_2" / "config.json"
    rewrite(path, lambda c: c.update(input_shape=shape))
    table = zoo_info(zoo_path, deep=True)
    assert table.model[table.problem != ""].tolist() == ["2"]


@pytest.mark.parametrize(
    "layers",
    [
        [{"layer_name": "ZeroPadding2D", "padding": 15_000}],
        [
            {"layer_name": "ZeroPadding2D", "padding": 2_000},
            {"layer_name": "MaxPooling2D", "pool_size": 30_000, "strides": 1, "padding": "same"},
        ],
    ],
    ids=["memory", "hours"],
)
def test_a_forward_pass_that_would_take_all_memory_or_hours_is_a_row(zoo_path, layers):
    path = zoo_path / "input_data" / "tiny" / "model_2" / "config.json"
    end = [{"layer_name": "GlobalMaxPooling2D"}, {"layer_name": "Dense", "units": 3}]
    rewrite(path, lambda c: c["model_config"].__setitem__(slice(2, None), [*layers, *end]))
    entry = load_zoo(zoo_path)["tiny"]["2"]
    for weights in ("final", "initial"):
        write_weights(build_model(entry.config), entry.weights_path(weights))
    table = zoo_info(zoo_path, deep=True)
    assert len(table) == 4
    [problem] = table.problem[table.problem != ""]
    assert problem.count("not tried, as one example takes") == 2


# --- the cache -------------------------------------------------------------------------------


@pytest.fixture
def unpacked(zoo_path, tmp_path):
    """An archive and the folder it was unpacked into by another process."""
    archive = pack_zoo(zoo_path, tmp_path / "small.tar.xz")
    target = _unpacked(archive, tmp_path / "cache")
    _verified.clear()
    yield archive, target
    _verified.clear()


def plant_file(target):
    path = next(target.rglob("weights.hdf5"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def plant_link(target):
    path = next(target.rglob("weights.hdf5"))
    path.rename(target.parent / "elsewhere")
    path.symlink_to(target.parent / "elsewhere")


def plant_folder_link(target):
    path = next(target.rglob("model_1"))
    path.rename(target.parent / "elsewhere")
    path.symlink_to(target.parent / "elsewhere")


def plant_task(target):
    shutil.copytree(target / "input_data" / "tiny", target / "input_data" / "evil")


def plant_nothing(target):
    next(target.rglob("weights.hdf5")).unlink()


def plant_hole(target):
    os.truncate(next(target.rglob("weights.hdf5")), 2**40)


def plant_other_kind(target):
    shutil.rmtree(target)
    target.write_text("not a folder")


@pytest.mark.parametrize(
    "plant",
    [
        plant_file,
        plant_link,
        plant_folder_link,
        plant_task,
        plant_nothing,
        plant_hole,
        plant_other_kind,
    ],
)
def test_an_embedded_zoo_that_is_not_the_archives_is_replaced(unpacked, zoo_path, plant):
    archive, target = unpacked
    plant(target)
    assert _unpacked(archive, target.parent) == target
    assert not target.is_symlink()
    found = {p.relative_to(target): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    packed = {p.relative_to(zoo_path): p.read_bytes() for p in zoo_path.rglob("*") if p.is_file()}
    assert found == packed
    assert not list(target.parent.glob(".*"))


def test_an_intact_folder_is_kept(unpacked):
    archive, target = unpacked
    before = target.stat().st_ino
    assert _unpacked(archive, target.parent).stat().st_ino == before


def test_what_a_killed_process_was_unpacking_is_removed(unpacked, tmp_path):
    archive, target = unpacked
    process = os.fork() if hasattr(os, "fork") else pytest.skip("needs fork")
    if process == 0:
        with temporary_folder(target) as temporary:
            (temporary / "half").write_text("half")
            os._exit(0)  # as if killed: nothing is cleaned up
    os.waitpid(process, 0)
    [left] = target.parent.glob(".*.unpacking")
    assert (left / "half").exists()
    with temporary_folder(target) as mine:
        assert not left.exists() and mine.is_dir()
        remove_leftovers(target.parent)  # not what a running process is unpacking
        assert mine.is_dir()
    foreign = left.with_name(left.name.replace(left.name.split(".")[-2][:8], "0" * 8))
    foreign.mkdir()  # of another machine, whose processes are not known here
    _unpacked(archive, target.parent)
    assert foreign.is_dir()
