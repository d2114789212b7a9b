"""Whatever stands in a file of a zoo, only errors of the project come of it, and the table does.

The files stay well formed and mean nonsense; tests/fuzz damages their bytes.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from sharpkit.errors import SharpkitError
from sharpkit.zoo import load_zoo, zoo_info

CASES = 50  # of each kind of file

ODD_NAMES = ["", "²", "٣", "\ud800", "model_1", "01", "=1+1", "\x1b[2J", "x" * 300, "a/b", "-1"]
ODD_VALUES: list[Any] = [None, True, -1, 0, 0.5, 2**31, 2**63, 10**300, 10**400, -(10**400), 1e308]
ODD_VALUES += [float("nan"), float("inf"), [], {}, [[]], [1] * 100, {"a": None}, [None], "relu"]
ODD_VALUES += ODD_NAMES


def mutated_json(rng: random.Random, path: Path) -> None:
    """Replace, rename or remove two to eight values."""
    tree = json.loads(path.read_text())
    for _ in range(rng.choice([2, 3, 5, 8])):
        places = list(_places(tree))
        if not places:
            break
        parent, key = rng.choice(places)
        action = rng.choice(["replace", "replace", "move", "rename", "remove"])
        if action == "replace":
            parent[key] = copy.deepcopy(rng.choice(ODD_VALUES))
        elif action == "move":
            other, name = rng.choice(places)
            parent[key] = copy.deepcopy(other[name])
        elif action == "rename" and isinstance(parent, dict):
            parent[rng.choice(ODD_NAMES)] = parent.pop(key)
        else:
            del parent[key]
    path.write_text(json.dumps(tree))


def _places(tree: Any) -> Any:
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


ODD_ATTRIBUTES: list[Any] = [
    5, 2.5, "dense", [], [1, 2], [["dense"]], ["dense", "dense"], ["dense"] * 200, ["é"],
    ["../dense"], [b"\xff"], [""], h5py.Empty("f4"), h5py.Empty("S1"), np.zeros(3, "S0"),
    np.zeros(2, [("a", "f4")]), np.array([b"dense" * 500]), [True], [1 + 2j], ["conv2d"],
]  # fmt: skip
ODD_ARRAYS: list[dict[str, Any]] = [
    {"data": data}
    for data in (
        1.0, "text", h5py.Empty("f4"), np.ones((60, 3), "i4"), np.ones((60, 3), "f2"),
        np.ones((60, 3), ">f8"), np.ones((60, 3), "c8"), np.ones((60, 3), np.longdouble),
        np.ones((60, 3), [("a", "f4")]), np.full((60, 3), 1e300), np.ones((60, 3), "S4"),
        np.ones((3, 60), "f4"), np.ones((60, 3, 1), "f4"), np.ones((0, 3), "f4"),
    )
] + [
    {"shape": (60, 3), "dtype": "f4", **settings}
    for settings in (
        {}, {"chunks": (1, 1)}, {"chunks": (60, 3), "compression": 9}, {"fillvalue": np.nan},
        {"data": np.ones((60, 3)), "chunks": (7, 2), "compression": "gzip", "shuffle": True},
        {"data": np.ones((60, 3)), "chunks": (7, 2), "compression": "lzf"},
        {"data": np.ones((60, 3)), "chunks": (7, 2), "fletcher32": True},
        {"data": np.ones((60, 3)), "chunks": (7, 2), "scaleoffset": 3},
        {"maxshape": (None, None)}, {"external": [("/dev/zero", 0, 720)]},
    )
]  # fmt: skip


def mutated_weights(rng: random.Random, path: Path) -> None:
    """Another attribute, array, group or link in the place of a good one."""
    with h5py.File(path, "r+") as file:
        nodes: list[Any] = [file]
        file.visititems(lambda _, node: nodes.append(node))
        groups = [node for node in nodes if isinstance(node, h5py.Group)]
        arrays = [node.name for node in nodes if isinstance(node, h5py.Dataset)]
        action = rng.choice(["attribute", "array", "array", "link", "group"])
        if action == "attribute":
            key = rng.choice(["layer_names", "weight_names", "layer_names0"])
            node = rng.choice(groups)
            node.attrs.pop(key, None)
            if rng.random() < 0.9:
                node.attrs[key] = rng.choice(ODD_ATTRIBUTES)
            return
        name = rng.choice(arrays)
        del file[name]
        if action == "array":
            file.create_dataset(name, **rng.choice(ODD_ARRAYS))
        elif action == "link":
            targets = [h5py.SoftLink(name), h5py.SoftLink("/"), h5py.ExternalLink("/dev/zero", "/")]
            file[name] = rng.choice([*targets, file, file["dense"], np.dtype("f4")])
        else:
            file.create_group(name)


def mutated_shard(rng: random.Random, path: Path) -> None:
    """Records with other types, shapes and values of the right and of other kinds."""
    bombs = pytest.importorskip("bombs", reason="needs Linux")
    records = []
    for _ in range(rng.choice([1, 2, 5])):
        tensors = []
        for shape in ((5, 4, 2), (1,)):
            if rng.random() < 0.5:
                shape = rng.choice([(), (0,), (1,), (2**63 - 1,), (1,) * 40, (2**20, 2**20), shape])
            dtype = rng.choice([1, 1, 2, 3, 3, 7, 9, 10, 17, 19, 22, 23, 99])
            number = rng.choice([4, 4, 5, 6, 7, 10, 11, 13, 16, 17])
            value = rng.choice([b"", b"\1", bytes(4), b"\xff" * 9 + b"\1", bytes(160), b"\x7f" * 8])
            tensors.append(bombs.tensor(dtype, shape, bombs.field(number, value)))
        records.append(bombs.record(bombs.example(*tensors)))
    path.write_bytes(b"".join(records))


KINDS = {
    "model_configs": (mutated_json, "reference_data/tiny/model_configs.json"),
    "config": (mutated_json, "input_data/tiny/model_2/config.json"),
    "weights": (mutated_weights, "input_data/tiny/model_2/weights.hdf5"),
    "shard": (mutated_shard, "input_data/tiny/dataset_1/train/shard_0.tfrecord"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_errors_of_the_project_come_of_nonsense(zoo_path, kind):
    mutate, place = KINDS[kind]
    for id_ in ("1", "10", "33"):  # one model is quicker
        shutil.rmtree(zoo_path / "input_data" / "tiny" / f"model_{id_}")
    path = zoo_path / place
    good, refused = path.read_bytes(), 0
    for seed in range(CASES):
        path.write_bytes(good)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mutate(random.Random(f"{kind} {seed}"), path)
            try:
                table = zoo_info(zoo_path, deep=True)
                assert "2" in set(table.model.dropna())
                table.to_csv(zoo_path / "table.csv")
                refused += _open_all(zoo_path)
            except Exception as error:
                raise AssertionError(f"{kind}, case {seed}: {type(error).__name__}") from error
    assert refused >= CASES // 5  # else there is too little nonsense


def _open_all(root: Path) -> bool:
    """Whether anything of a zoo is refused."""
    try:
        task = load_zoo(root / "input_data" / "tiny")["tiny"]
        assert all(map(np.isfinite, task["2"].metrics.values()))
        assert isinstance(task["2"].hyperparameters, dict) and task.possible_values is not None
        task["2"].load()
        inputs, labels = task.dataset("train").tensors
        assert inputs.isfinite().all() and int(labels.min()) >= 0
    except SharpkitError:
        return True
    return False
