"""Damaged files of every kind that a zoo has: a case is made from its seed and tried on the reader.

Used by test_fuzzing.py and, for many more cases, by benchmarks/fuzz.py.
"""

from __future__ import annotations

import copy
import json
import random
import struct
import traceback
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import numpy as np
import torch

from sharpkit.errors import SharpkitError
from sharpkit.zoo import ZooWriter, build_model, load_weights, load_zoo, read_weights
from sharpkit.zoo.layout import find_tasks
from sharpkit.zoo.tfrecord import read_shards, write_shard

KINDS = ("config", "model_configs", "weights", "shard")

CONFIGS: list[dict[str, Any]] = [
    {
        "input_shape": [8, 6, 2],
        "model_config": [
            {"layer_name": "Conv2D", "filters": 3.0, "kernel_size": [3, 3], "padding": "same"},
            {"layer_name": "BatchNormalization", "axis": [-1], "epsilon": 0.001},
            {"layer_name": "Activation", "activation": "relu"},
            {"layer_name": "MaxPooling2D", "pool_size": [2, 2], "strides": 2.0},
            {"layer_name": "DepthwiseConv2D", "kernel_size": 3, "dilation_rate": 1},
            {"layer_name": "ZeroPadding2D", "padding": [[1, 0], [2, 1]]},
            {"layer_name": "PReLU", "shared_axes": [1, 2]},
            {"layer_name": "AveragePooling2D", "pool_size": 2, "padding": "same"},
            {"layer_name": "Flatten"},
            {"layer_name": "Dropout", "rate": 0.5},
            {"layer_name": "Dense", "units": 3.0, "activation": "softplus"},
        ],
    },
    {
        "input_shape": [4, 4, 1],
        "model_config": [
            {"layer_name": "SeparableConv2D", "filters": 4, "kernel_size": 2, "strides": [1, 1]},
            {"layer_name": "LayerNormalization"},
            {"layer_name": "LeakyReLU", "alpha": 0.1},
            {"layer_name": "Permute", "dims": [2, 1, 3]},
            {"layer_name": "Reshape", "target_shape": [-1, 4]},
            {"layer_name": "Flatten"},
            {"layer_name": "Dense", "units": 2, "use_bias": False},
        ],
    },
]
_ODD_VALUES = [None, True, -1, 0, 2**31, 2**63, 1e308, float("nan"), "", "x" * 1000, [], {}, [[]]]
_ODD_VALUES += [[2**40, 2**40], 0.5, -(2**70), "relu", [1, 2, 3, 4], {"a": {"b": []}}]
_ODD_NUMBERS = [
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63,
    2**64 - 1,
]


def write_seeds(folder: Path) -> None:
    """A zoo whose files are good: what the cases are made from."""
    writer = ZooWriter(folder, shard_size=3)
    torch.manual_seed(0)
    for task, config in enumerate(CONFIGS):
        model = build_model(config)
        inputs = torch.randn(5, *model.input_shape)
        writer.write_dataset(f"task{task}", "train", inputs, torch.arange(5) % 2)
        for id_, lr in enumerate((0.1, 0.2)):
            writer.write_model(
                f"task{task}",
                id_,
                model,
                initial=model,
                hyperparameters={"lr": lr, "kind": "a"},
                possible_values={"lr": [0.1, 0.2], "kind": ["a"]},
                metrics={"train_acc": 0.9, "test_acc": 0.7},
            )
    plain = folder / "input_data/task0/model_0/weights.hdf5"
    with h5py.File(folder / "packed.hdf5", "w") as packed, h5py.File(plain) as file:
        packed.attrs.update(file.attrs)  # chunks and compression
        for layer, group in file.items():
            packed.create_group(layer).attrs.update(group.attrs)
            group.visititems(lambda name, node, layer=layer: _pack(packed[layer], name, node))
    flat = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    write_shard(folder / "flat.tfrecord", flat, np.arange(4))


def _pack(group: h5py.Group, name: str, node: Any) -> None:
    if isinstance(node, h5py.Dataset):
        group.create_dataset(name, data=node[()], chunks=True, compression="gzip", shuffle=True)


@cache
def _seeds(folder: Path) -> dict[str, list[bytes]]:
    patterns = {
        "config": "input_data/*/model_0/config.json",
        "model_configs": "reference_data/*/model_configs.json",
        "weights": "**/*.hdf5",
        "shard": "**/*.tfrecord",
    }
    return {k: [p.read_bytes() for p in sorted(folder.glob(g))] for k, g in patterns.items()}


def try_case(folder: Path, kind: str, seed: int) -> str:
    """Make and read a damaged file: "loaded", the error's type, or the traceback of an escape."""
    rng = random.Random(f"{kind} {seed}")
    content = _damaged(rng, kind, _seeds(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _READERS[kind](folder, content)
    except SharpkitError as error:
        if isinstance(error.__cause__, MemoryError):
            return f"ESCAPED {kind} {seed}: it tried to allocate too much\n{error}"
        return type(error).__name__
    except Exception:
        return f"ESCAPED {kind} {seed}\n{traceback.format_exc()}"
    return "loaded"


def _damaged(rng: random.Random, kind: str, seeds: dict[str, list[bytes]]) -> bytes:
    content = bytearray(rng.choice(seeds[kind]))
    if kind in ("config", "model_configs") and rng.random() < 0.5:
        return _odd_json(rng, bytes(content))
    records = _records(bytes(content)) if kind == "shard" and rng.random() < 0.7 else None
    if records is not None:  # damage that the checksums do not catch
        victim = bytearray(rng.choice(records))
        _damage(rng, victim, seeds)
        records[rng.randrange(len(records))] = bytes(victim)
        return b"".join(map(_framed, records))
    _damage(rng, content, seeds)
    return bytes(content)


def _damage(rng: random.Random, content: bytearray, seeds: dict[str, list[bytes]]) -> None:
    """One to eight flips, truncations, splices and odd numbers."""
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        if not content:
            return
        at = rng.randrange(len(content))
        length = rng.choice([1, 2, 4, 8, 8, 16, 64, 512])
        kind = rng.choice(["flip", "flip", "number", "number", "splice", "cut", "truncate", "fill"])
        if kind == "flip":
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "number":
            size = rng.choice([1, 2, 4, 8])
            number = rng.choice(_ODD_NUMBERS) & (256**size - 1)
            content[at : at + size] = number.to_bytes(size, "little")
        elif kind == "splice":
            source = rng.choice(seeds[rng.choice(KINDS)])
            start = rng.randrange(len(source))
            end = at + (length if rng.random() < 0.7 else 0)  # over what was there, or between
            content[at:end] = source[start : start + length]
        elif kind == "cut":
            del content[at : at + length]
        elif kind == "fill":
            content[at : at + length] = bytes([rng.choice([0, 255])]) * length
        else:
            del content[at:]


def _odd_json(rng: random.Random, content: bytes) -> bytes:
    """Replace, remove or repeat values, so that the syntax stays right and the meaning does not."""
    tree = json.loads(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        places = list(_places(tree))
        if not places:
            break
        parent, key = rng.choice(places)
        action = rng.choice(["replace", "replace", "move", "remove", "nest"])
        if action == "replace":
            parent[key] = copy.deepcopy(rng.choice(_ODD_VALUES))
        elif action == "move":
            other, name = rng.choice(places)
            parent[key] = json.loads(json.dumps(other[name]))
        elif action == "nest":
            for _ in range(rng.choice([1, 50])):
                parent[key] = [parent[key]]
        else:
            del parent[key]
    text = json.dumps(tree)
    if rng.random() < 0.02:
        text = "[" * 100_000 + text
    return text.encode()


def _places(tree: Any) -> Any:
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _records(content: bytes) -> list[bytes]:
    records, offset = [], 0
    while offset < len(content):
        (length,) = struct.unpack_from("<Q", content, offset)
        records.append(content[offset + 12 : offset + 12 + length])
        offset += 16 + length
    return records


def _framed(record: bytes) -> bytes:
    length = struct.pack("<Q", len(record))
    return length + _crc(length) + record + _crc(record)


def _crc(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _read_config(folder: Path, content: bytes) -> None:
    error: SharpkitError | None = None
    for task in find_tasks(folder).values():  # the weights of one of them may fit
        (task["1"].path / "config.json").write_bytes(content)
        try:
            task["1"].load()
            return
        except SharpkitError as refused:
            error = refused
    assert error is not None
    raise error


def _read_model_configs(folder: Path, content: bytes) -> None:
    (folder / "reference_data/task1/model_configs.json").write_bytes(content)
    task = load_zoo(folder / "input_data/task1")["task1"]
    for entry in task.values():
        assert isinstance(entry.generalization_gap, float)
        assert isinstance(entry.hyperparameters, dict)
    assert isinstance(task.possible_values, dict)


def _read_weights(folder: Path, content: bytes) -> None:
    path = folder / "damaged.hdf5"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    model = build_model(CONFIGS[0], device="meta")
    try:
        for arrays in read_weights(path):
            assert all(np.isfinite(array).all() for array in arrays)
    finally:
        load_weights(model, path)
    with torch.no_grad():
        assert model(torch.zeros(1, *model.input_shape)).shape == (1, 3)


def _read_shard(folder: Path, content: bytes) -> None:
    path = folder / "damaged.tfrecord"
    path.write_bytes(content)
    inputs, labels = read_shards([path])
    assert len(inputs) == len(labels)
    assert np.isfinite(inputs).all()
    assert labels.min() >= 0


_READERS = {
    "config": _read_config,
    "model_configs": _read_model_configs,
    "weights": _read_weights,
    "shard": _read_shard,
}
