"""Thousands of networks in a few files: bits, order, damage, and death while they are written."""

from __future__ import annotations

import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import uuid
import warnings
from itertools import count
from pathlib import Path

import fsspec
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_writer import same_model, same_task

from sharpkit import doors
from sharpkit.cli import main
from sharpkit.errors import ArgumentError, ModelError, ZooFormatError
from sharpkit.zoo import StackedTask, ZooWriter, build_model, load_zoo, write_zoo, zoo_info
from sharpkit.zoo.stacked import writer as stack_writer
from sharpkit.zoo.stacked.file import read_stack
from sharpkit.zoo.stacked.task import stack_files

GRID = {"units": [2, 3], "dropout": [0.0, 0.5], "seed": [0, 1, 2]}
IDS = [str(i) for i in range(12)]


def network(units, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    layers = [
        {"layer_name": "Dense", "units": units, "activation": "relu"},
        {"layer_name": "Dropout", "rate": dropout},
        {"layer_name": "Dense", "units": 3},
    ]
    return build_model({"input_shape": [4], "model_config": layers})


def write(writer, id_, setting, *, seed=0):
    writer.write_model(
        "small",
        id_,
        network(setting["units"], setting["dropout"], seed + int(id_)),
        initial=network(setting["units"], setting["dropout"], seed + 100 + int(id_)),
        hyperparameters=setting,
        possible_values=GRID,
        metrics={"train_acc": 1.0, "test_acc": 0.9 - 0.01 * int(id_)},
    )


def settings():
    """Ids in another order than their shapes."""
    for i in range(12):
        yield (
            str(i),
            {
                "units": GRID["units"][i % 2],
                "dropout": GRID["dropout"][i // 2 % 2],
                "seed": GRID["seed"][i // 4],
            },
        )


def write_all(path, layout, ids=IDS):
    writer = ZooWriter(path, layout=layout)
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    for split in ("train", "test"):
        writer.write_dataset("small", split, x, torch.arange(10) % 3)
    for id_, setting in settings():
        if id_ in ids:
            write(writer, id_, setting)
    return writer


def stacks(path):
    return list(stack_files(path / "input_data" / "small" / "networks").values())


@pytest.fixture(autouse=True, scope="module")
def few_in_a_file():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stack_writer, "_MOST", 4)
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory, few_in_a_file):
    """Nothing changes it."""
    path = tmp_path_factory.mktemp("plain")
    write_all(path, "pgdl").finish()
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory, few_in_a_file):
    path = tmp_path_factory.mktemp("stacked")
    write_all(path, "stacked").finish()
    return path


@pytest.fixture
def stacked(written, tmp_path):
    """A copy for the test to change."""
    return Path(shutil.copytree(written, tmp_path / "stacked"))


def same_files(a, b):
    """Names and bytes of all files below two folders."""
    names = [{p.relative_to(root) for p in root.rglob("*") if p.is_file()} for root in (a, b)]
    return names[0] == names[1] and all(filecmp.cmp(a / n, b / n, shallow=False) for n in names[0])


# --- what is written reads back ------------------------------------------------------------------


def test_models_written_one_by_one_are_those_of_the_other_layout(plain, stacked):
    task = load_zoo(stacked)["small"]
    assert isinstance(task, StackedTask)
    same_task(load_zoo(plain)["small"], task)
    assert list(task) == IDS and task.possible_values == GRID
    assert task["7"].hyperparameters == dict(settings())["7"]
    assert task["7"].generalization_gap == pytest.approx(0.17)
    assert task.frame().equals(load_zoo(plain)["small"].frame())


def test_a_zoo_there_and_back_has_the_same_bytes(plain, tmp_path):
    write_zoo(load_zoo(plain), tmp_path / "there", layout="stacked")
    assert len(stacks(tmp_path / "there")) == 4  # 6 networks of each of two shapes
    write_zoo(load_zoo(tmp_path / "there"), tmp_path / "back")
    assert same_files(plain, tmp_path / "back")


def test_batch_norm_comes_through(zoo_path, tmp_path):
    write_zoo(load_zoo(zoo_path), tmp_path / "stacked", layout="stacked")
    same_task(load_zoo(zoo_path)["tiny"], load_zoo(tmp_path / "stacked")["tiny"])


def test_any_program_reads_a_file_by_row(stacked):
    task = load_zoo(stacked)["small"]
    (path,) = task["5"].files()
    ids = list(read_stack(path).rows)
    tensor = load_file(path)["final/dense.weight"]
    assert torch.equal(tensor[ids.index("5")], task["5"].load().get_parameter("dense.weight"))


def test_every_model_is_there_as_soon_as_it_is_written(tmp_path):
    writer = ZooWriter(tmp_path, layout="stacked")
    for written, (id_, setting) in enumerate(settings(), 1):
        write(writer, id_, setting)
        assert list(writer.entries("small")) == list(load_zoo_silently(tmp_path)) == IDS[:written]
        assert len(stacks(tmp_path)) <= 2 * 3 + 2  # 3 that wait, of two shapes, and full ones


def load_zoo_silently(path):
    """The task, whose grid is not complete."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_zoo(path)["small"]


def test_a_second_writer_goes_on_and_replaces(stacked):
    writer = ZooWriter(stacked, layout="stacked")
    assert set(writer.entries("small")) == set(IDS)
    before = {i: load_zoo(stacked)["small"][i].digest() for i in IDS}
    write(writer, "3", dict(settings())["3"], seed=50)
    writer.finish()
    task = load_zoo(stacked)["small"]
    same = network(3, 0.5, 53).state_dict()
    assert all(torch.equal(same[k], v) for k, v in task["3"].load().state_dict().items())
    assert [i for i in IDS if task[i].digest() != before[i]] == ["3"]


def test_a_model_that_changes_its_shape_is_replaced(stacked):
    writer = ZooWriter(stacked, layout="stacked")
    write(writer, "0", dict(settings())["1"])
    writer.finish()
    assert load_zoo_silently(stacked)["0"].load().get_parameter("dense.weight").shape == (3, 4)
    assert len(load_zoo_silently(stacked)) == 12


def test_many_shapes_are_written_before_memory_runs_out(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(stack_writer, "_MAX_HELD", 500)  # bytes: two or three networks
    write_zoo(load_zoo(plain), tmp_path / "there", layout="stacked")
    same_task(load_zoo(plain)["small"], load_zoo(tmp_path / "there")["small"])
    assert len(stacks(tmp_path / "there")) > 4


def test_what_is_said_of_networks_stays_short(plain, tmp_path, monkeypatch):
    """Possible values stand in a file once, and a file has fewer networks before it is too long."""
    task = load_zoo(plain)["small"]
    many = list(range(3000))
    for entry in task.model_configs.values():
        entry["hparams"]["seed"]["possible_values"] = many
    with pytest.warns(UserWarning, match="settings have no model"):
        write_zoo({"small": task}, tmp_path / "many", layout="stacked")
        found = load_zoo(tmp_path / "many")["small"]
    assert found.model_configs == task.model_configs
    assert all(path.stat().st_size < 30_000 for path in stacks(tmp_path / "many"))
    monkeypatch.setattr(stack_writer, "_MAX_TEXT", 2000)
    write_zoo(load_zoo(plain), tmp_path / "short", layout="stacked")
    same_task(load_zoo(plain)["small"], load_zoo(tmp_path / "short")["small"])
    assert len(stacks(tmp_path / "short")) > 4


def test_what_would_not_be_read_again_is_not_written(stacked, tmp_path, monkeypatch):
    """Of thousands of models, model_configs.json may be longer than any reader takes."""
    zoo = load_zoo(stacked)
    values = doors.json_values(json.dumps(zoo["small"].model_configs).encode())
    monkeypatch.setattr(doors, "MAX_JSON_VALUES", values - 1)
    with pytest.raises(ZooFormatError, match=rf"model_configs.json: not written.* {values} values"):
        write_zoo(zoo, tmp_path / "plain")
    assert not list(tmp_path.glob("plain/reference_data/*/model_configs.json"))
    write_zoo(zoo, tmp_path / "again", layout="stacked")
    monkeypatch.setattr(doors, "MAX_JSON_VALUES", 20)
    with pytest.raises(ZooFormatError, match=r"values; at most 20 are read"):
        write(ZooWriter(tmp_path / "one", layout="stacked"), "0", dict(settings())["0"])
    assert not stacks(tmp_path / "one")


def test_tasks_of_both_layouts_lie_in_one_zoo(plain, zoo_path, tmp_path):
    write_zoo(load_zoo(plain), zoo_path, layout="stacked")
    zoo = load_zoo(zoo_path)
    assert [type(task).__name__ for task in zoo.values()] == ["StackedTask", "PgdlTask"]
    assert list(zoo) == ["small", "tiny"] and not zoo.refused
    assert list(load_zoo(zoo_path / "input_data" / "small")) == ["small"]
    write_zoo(zoo, tmp_path / "copy")
    same_task(zoo["small"], load_zoo(tmp_path / "copy")["small"])


def test_directories_beside_stacks_are_told(stacked, plain):
    source = plain / "input_data" / "small" / "model_0"
    shutil.copytree(source, stacked / "input_data" / "small" / "model_0")
    with pytest.warns(UserWarning, match="1 directories model_<id> beside networks are not read"):
        load_zoo(stacked)


def test_info_has_a_row_for_every_model(stacked):
    table = zoo_info(stacked, deep=True)
    assert table["model"].tolist() == IDS and not table["problem"].any()
    assert set(table["parameters"]) == {2 * 4 + 2 + 3 * 2 + 3, 3 * 4 + 3 + 3 * 3 + 3}


def test_what_would_not_load_is_not_written(tmp_path):
    writer = ZooWriter(tmp_path, layout="stacked")
    model = network(2)
    common = {
        "hyperparameters": {},
        "possible_values": {},
        "metrics": {"train_acc": 1, "test_acc": 1},
    }
    wrong = {k: v[:1] for k, v in network(2).state_dict().items()}
    with pytest.raises(ModelError, match=r"dense.weight has shape \(1, 4\); expected \(2, 4\)"):
        writer.write_model("small", 0, model, initial=wrong, **common)
    with torch.no_grad():
        model.get_parameter("dense.bias")[0] = torch.nan
    with pytest.raises(ModelError, match=r"dense.bias must be finite float32"):
        writer.write_model("small", 0, model, initial=network(2), **common)
    with pytest.raises(ArgumentError, match="model id is 'a'"):
        writer.write_model("small", "a", network(2), initial=network(2), **common)
    assert not tmp_path.joinpath("input_data").exists() or not stacks(tmp_path)
    with pytest.raises(ArgumentError, match="layout is 'flat'; expected 'pgdl' or 'stacked'"):
        ZooWriter(tmp_path, layout="flat")


def test_a_zoo_is_not_written_over_itself(stacked):
    with pytest.raises(ArgumentError, match="cannot be written where it is"):
        write_zoo(load_zoo(stacked), stacked)
    same = load_zoo(stacked)
    assert len(same["small"]) == 12


# --- remote, and from the shell ------------------------------------------------------------------


def test_a_remote_zoo_is_the_local_one(stacked, tmp_path, monkeypatch):
    monkeypatch.setenv("SHARPKIT_CACHE", str(tmp_path / "cache"))
    name = f"zoo-{uuid.uuid4().hex}"
    fsspec.filesystem("memory").put(str(stacked), f"/{name}", recursive=True)
    zoo = load_zoo(f"memory://{name}")
    same_task(load_zoo(stacked)["small"], zoo["small"])
    assert zoo["small"]["4"].digest() == load_zoo(stacked)["small"]["4"].digest()
    assert not zoo_info(f"memory://{name}", deep=True)["problem"].any()


def test_the_command_converts_both_ways(plain, tmp_path):
    shell = CliRunner()
    for source, layout, target in (
        (plain, "stacked", "there"),
        (tmp_path / "there", "pgdl", "back"),
    ):
        arguments = [
            "zoo",
            "convert",
            str(source),
            "--layout",
            layout,
            "--to",
            str(tmp_path / target),
        ]
        result = shell.invoke(main, arguments)
        assert result.exit_code == 0 and "12 models of 1 tasks written" in result.output
    assert same_files(plain, tmp_path / "back")


# --- damage --------------------------------------------------------------------------------------


def test_a_file_that_was_cut_short_is_told_with_its_networks(stacked):
    task = load_zoo(stacked)["small"]
    (path,) = task["0"].files()
    ids = list(read_stack(path).rows)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.warns(UserWarning, match=rf"{path.name}: was cut short; its {len(ids)} networks"):
        task = load_zoo(stacked)["small"]
    with pytest.raises(ZooFormatError, match=rf"{path.name}, network 0: .* cut short"):
        task["0"].load()
    others = [i for i in IDS if i not in ids]
    assert others and all(task[i].load() for i in others)
    table = zoo_info(stacked).set_index("model")["problem"]
    assert set(table.index[table.astype(bool)]) == set(ids)
    with pytest.raises(ZooFormatError, match=r"cut short; copy the file again, or remove it"):
        ZooWriter(stacked, layout="stacked").entries("small")


def flip(path, id_, name="final/dense.weight"):
    """Change one bit of the last number of a tensor of a network."""
    stack = read_stack(path)
    stored, rows = stack.tensors[name], len(stack.rows)
    at = stored.start + (stack.rows[id_] + 1) * (stored.size // rows) - 4
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_changed_bit_concerns_one_network(stacked):
    task = load_zoo(stacked)["small"]
    before = {i: task[i].digest() for i in IDS}
    flip(task["4"].files()[0], "4")
    with pytest.raises(ZooFormatError, match=r"network 4: its final weights are damaged"):
        task["4"].load()
    assert [i for i in IDS if task[i].digest() != before[i]] == ["4"]
    assert all(task[i].load() for i in IDS if i != "4") and task["4"].load("initial")
    table = zoo_info(stacked)
    assert table.loc[table["problem"].astype(bool), "model"].tolist() == ["4"]


def test_a_damaged_header_is_told_with_its_file(stacked, zoo_path):
    path = stacks(stacked)[1]
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"}" + content[9:])
    with pytest.raises(ZooFormatError, match=rf"{path.name}.*Copy the damaged files again"):
        load_zoo(stacked)
    table = zoo_info(stacked)
    assert table["problem"].str.contains(path.name).all()
    shutil.copytree(stacked / "input_data" / "small", zoo_path / "input_data" / "small")
    with pytest.warns(UserWarning, match=f"task small: .*{path.name}"):
        zoo = load_zoo(zoo_path)
    assert len(zoo["tiny"]) == 4 and "2 tasks" in repr(zoo)


def rewritten(path, change):
    """The file with other metadata, as a program that knows .safetensors writes it."""
    told = json.loads(json.loads(header(path))["__metadata__"]["networks"])
    change(told)
    save_file(load_file(path), path, {"networks": json.dumps(told)})


def header(path):
    content = path.read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "its version is 2, not 1"),
        (lambda c: c["members"][0].update(id="../x"), "the id of a network is '../x'"),
        (lambda c: c["members"][0].update(id="9" * 5000), "the id of a network is '9"),
        (lambda c: c["members"][0].update(id="²"), "the id of a network is '²'"),
        (lambda c: c["members"][0].update(config=7), "IndexError"),
        (lambda c: c["members"][0].update(entry=[]), "is no object"),
        (lambda c: c["members"][0].update(sha256={}), "KeyError"),
        (lambda c: c["members"].append(c["members"][0]), "one twice"),
        (lambda c: c["members"].clear(), "it has no network"),
        (lambda c: c["members"].pop(), "expected F32 with a row for each of"),
        (lambda c: c.pop("configs"), "KeyError"),
        (lambda c: c["values"].clear(), "IndexError"),
    ],
)  # fmt: skip
def test_metadata_that_do_not_fit_are_refused(stacked, change, message):
    path = stacks(stacked)[0]
    rewritten(path, change)
    with pytest.raises(ZooFormatError, match=rf"{path.name}.*{message}"):
        read_stack(path)


def test_tensors_of_another_kind_are_refused(stacked):
    path = stacks(stacked)[0]
    tensors, metadata = load_file(path), json.loads(header(path))["__metadata__"]
    for name, wrong in (("double", torch.zeros(4, 2).double()), ("rows", torch.zeros(3, 2))):
        save_file({**tensors, name: wrong}, path, metadata)
        with pytest.raises(ZooFormatError, match=rf"{path.name}, '{name}': is F.*expected F32"):
            read_stack(path)
    save_file({**tensors, "final/more": torch.zeros(4, 2)}, path, metadata)
    with pytest.raises(ZooFormatError, match=r"network 0: has tensors of shapes .*config needs"):
        load_zoo(stacked)["small"]["0"].load()
    save_file(tensors, path)
    with pytest.raises(ZooFormatError, match="found no 'networks' in its metadata"):
        read_stack(path)


@pytest.mark.parametrize(
    ("offsets", "shape"),
    [
        ([0, 2**40], [4, 2**36]),  # far more than the file has
        ([8, 40], [4, 2]),  # after a gap
        ([0, 2**80], [4, 2]),
        ([-8, 24], [4, 2]),
        ([0, 32], [4, 2**61]),
        ([0, 32], [4, -2]),
        ([0, 32], [True, 8]),
        ([0], [4, 2]),
    ],
)
def test_what_a_header_states_takes_no_memory(tmp_path, stacked, offsets, shape):
    metadata = json.loads(header(stacks(stacked)[0]))["__metadata__"]
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    text = json.dumps({"__metadata__": metadata, "final/w": tensor}).encode()
    path = stacks(stacked)[0]
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(32))
    if shape[1] == 2**36:  # a file that was cut short, as far as its header tells
        with pytest.raises(ZooFormatError, match="cut short"):
            read_stack(path).load("0", "final")
    else:
        with pytest.raises(ZooFormatError, match=path.name):
            read_stack(path)


ODD_VALUES = [None, True, -1, 0.5, 2**63, -(10**300), 1e308, [], {}, [[]], "", "²", "../x", "0"]


def places(tree, parent=None, key=None):
    if parent is not None:
        yield parent, key
    for k, node in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(node, dict | list):
            yield from places(node, tree, k)
        else:
            yield tree, k


def test_odd_values_anywhere_in_a_header_give_errors_of_the_project_alone(stacked):
    path = stacks(stacked)[0]
    good, whole = path.read_bytes(), json.loads(header(path))
    told, seen = json.loads(whole["__metadata__"]["networks"]), set()
    for seed in range(120):
        rng = random.Random(seed)
        parts = {"header": json.loads(json.dumps(whole)), "told": json.loads(json.dumps(told))}
        parent, key = rng.choice(list(places(parts[rng.choice(["header", "told"])])))
        parent[key] = rng.choice(ODD_VALUES)
        if isinstance(metadata := parts["header"]["__metadata__"], dict) and seed % 2:
            metadata["networks"] = json.dumps(parts["told"])
        text = json.dumps(parts["header"]).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + good[8 + len(header(path)) :])
        try:
            for id_ in read_stack(path).rows:
                entry = StackedTask("small", path.parents[1])[id_]
                for ask in (entry.load, lambda entry=entry: (entry.metrics, entry.frame())):
                    ask()
            seen.add("read")
        except ZooFormatError as error:
            seen.add("refused")
            assert path.name in str(error) or "networks: model" in str(error), seed
        finally:
            path.write_bytes(good)
    assert seen == {"read", "refused"}


# --- death at any moment -------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


def test_an_end_at_any_change_of_the_folder_loses_nothing(plain, tmp_path, monkeypatch):
    """Every name that is set or removed is a moment; after each, what was added is there."""
    monkeypatch.setattr(stack_writer, "_MOST", 2)
    expected, first, ends = load_zoo(plain)["small"], dict(list(settings())[:5]), 0
    for moment in count():
        root, added, left = tmp_path / f"zoo{moment}", [], count(moment, -1)

        def dying(change, left=left):
            def changed(*given, **options):
                if next(left) <= 0:
                    raise Killed
                return change(*given, **options)

            return changed

        writer = ZooWriter(root, layout="stacked")
        try:
            with monkeypatch.context() as patched:
                for name in ("replace", "unlink"):
                    patched.setattr(Path, name, dying(getattr(Path, name)))
                for id_, setting in first.items():
                    write(writer, id_, setting)
                    added.append(id_)
        except Killed:
            ends += 1
        if added:
            there = load_zoo_silently(root)
            assert set(added) <= set(there) and len(there) <= len(added) + 1
        writer = ZooWriter(root, layout="stacked")
        for id_ in first.keys() - set(added):
            write(writer, id_, first[id_])
        writer.finish()
        last = load_zoo_silently(root)
        assert list(last) == list(first) and len(stacks(root)) <= 4
        assert all(same_model(last[i].load(), expected[i].load()) for i in first)
        assert all(last.model_configs[i] == expected.model_configs[i] for i in first)
        if ends == moment:
            break
    assert ends == 5 + 2 * (1 + 2)  # a file for each, and twice one for two, whose own ones go


_SCRIPT = """
import sys
sys.path[:0] = {tests!r}
from test_stacks import settings, write
from sharpkit.zoo import ZooWriter
from sharpkit.zoo.stacked import writer as stack_writer
stack_writer._MOST = 4
writer = ZooWriter({root!r}, layout="stacked")
for id_, setting in settings():
    write(writer, id_, setting)
    print(id_, flush=True)
"""


def test_a_killed_process_leaves_a_zoo(plain, tmp_path):
    script = _SCRIPT.format(
        tests=list(map(str, Path(__file__).parents[:2])), root=str(tmp_path / "zoo")
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.strip() == "6":
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    assert set(IDS[:7]) <= set(load_zoo_silently(tmp_path / "zoo"))
    done = set(load_zoo_silently(tmp_path / "zoo"))
    write_all(tmp_path / "zoo", "stacked", [i for i in IDS if i not in done]).finish()
    same_task(load_zoo(plain)["small"], load_zoo(tmp_path / "zoo")["small"])
    assert not list((tmp_path / "zoo").rglob("*.tmp"))


def test_a_task_that_is_open_follows_files_that_are_brought_together(tmp_path):
    writer = write_all(tmp_path, "stacked", ["0", "2"])
    task = load_zoo_silently(tmp_path)
    first = task["0"].digest()
    writer.finish()
    assert len(stacks(tmp_path)) == 1
    assert task["0"].load() and task["0"].digest() == first
