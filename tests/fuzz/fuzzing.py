"""Damaged files of every kind that is read: a case is made from its seed and tried on the reader.

Used by test_fuzzing.py and, for many more cases, by benchmarks/fuzz.py.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import damage
import h5py
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.io import savemat
from torch import nn
from torch.utils.data import TensorDataset
from zoos import write_small_zoo

import sharpkit as sk
from sharpkit.data.idx import read_idx
from sharpkit.datasets import load_dataset
from sharpkit.errors import SharpkitError
from sharpkit.runs.checkpoints import load_checkpoint
from sharpkit.runs.figure3 import read_plan as read_figure
from sharpkit.runs.spectrum import spectrum
from sharpkit.runs.trained import load_trained, trained_data
from sharpkit.training.run_files import RunFiles
from sharpkit.zoo import ZooWriter, build_model, load_weights, load_zoo, read_weights
from sharpkit.zoo.archive import unpack_zip
from sharpkit.zoo.formats import find_tasks
from sharpkit.zoo.info import zoo_info
from sharpkit.zoo.shards.tfrecord import read_shards, write_shard
from sharpkit.zoo_training.grid_file import read_plan as read_grid

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
GRID = """
task = "toy"
seed = 3

[data]
name = "embedded"
train_size = 50

[recipe]
dense_units = 8
batch_size = 8
stop_at_loss = 0.8
lr = 0.1

[grid]
width = [3, 5]
dropout = [0.0, 0.3]
"""
FIGURE = """
[data]
name = "embedded"
train_size = 96

[training]
architecture = "nin-4x1"
epochs = 2
batch_size = 32
lr = [0.02, 0.05]
m = [1, 32]
rho = [0.01, 0.05]
seeds = [0, 1]

[spectra]
epochs = [0, 2]
m = 32
rho = 0.05
n = 40
steps = 12
probes = 2

[power]
zoo = "embedded"
rho = 0.1
m = [1, 4]
"""
FIT = {"epochs": 2, "batch_size": 16, "lr": 0.05, "progress": False}
CIFAR = [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def examples() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(32, 3, 2, 2, generator=generator), torch.arange(32) % 3)


def write_seeds(folder: Path) -> None:
    """Good files of every kind: what the cases are made from."""
    _write_zoo(folder)
    _write_data(folder)
    _write_runs(folder)


def _write_zoo(folder: Path) -> None:
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
    shutil.make_archive(str(folder / "zoo"), "zip", folder, "input_data/task1")
    shutil.copytree(folder / "reference_data", folder / "good")  # the other is written to


def _pack(group: h5py.Group, name: str, node: Any) -> None:
    if isinstance(node, h5py.Dataset):
        group.create_dataset(name, data=node[()], chunks=True, compression="gzip", shuffle=True)


def _write_data(folder: Path) -> None:
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (6, 5, 5), dtype=np.uint8), np.arange(6) % 2
    floats = pixels.astype(np.float32)
    for name, x in (("bytes", pixels), ("floats", floats)):
        arrays = {"x_train": x, "y_train": labels, "x_test": x[:2], "y_test": labels[:2]}
        np.savez(folder / f"{name}.npz", **arrays)
        np.savez_compressed(folder / f"{name}-packed.npz", **arrays)
    idx = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in pixels.shape)
    (folder / "images.idx").write_bytes(idx + pixels.tobytes())
    (folder / "images.idx.gz").write_bytes(damage.gzip.compress(idx + pixels.tobytes()))
    digits = rng.integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    for packed in (True, False):
        content = {"X": digits, "y": np.arange(1, 5, dtype=np.uint8)[:, None]}
        savemat(folder / f"digits-{packed}.mat", content, do_compression=packed)
    for split in ("train", "test"):
        for k in range(4):
            name = folder / "images" / split / str(k % 2) / f"{k}.{'png' if k < 2 else 'jpg'}"
            name.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits[:6, :6, :, k]).save(name)
    shutil.make_archive(str(folder / "images"), "zip", folder / "images")
    cifar = folder / "cifar-10-batches-bin"
    cifar.mkdir()
    for k, name in enumerate(CIFAR):
        rows = rng.integers(0, 256, (2, 3073), dtype=np.uint8)
        rows[:, 0] = k
        (cifar / name).write_bytes(rows.tobytes())
    shutil.make_archive(str(folder / "cifar-10-binary"), "gztar", folder, cifar.name)


def _write_runs(folder: Path) -> None:
    state = network().state_dict()
    save_file(state, folder / "weights.safetensors")
    torch.save({"epoch": 3, "state_dict": state}, folder / "weights.pt")
    train, test = load_dataset("embedded")
    small = [TensorDataset(*(t[:32] for t in part.tensors)) for part in (train, test)]
    noted = {
        "architecture": "nin-4x1", "input_shape": [1, 14, 14], "classes": 10, "data": "embedded",
        "root": None,
    }  # fmt: skip
    nin = sk.training.build_architecture("nin-4x1", (1, 14, 14), 10, seed=0)
    sk.fit(nin, *small, out=folder / "trained", provenance=noted, **FIT)
    _keep_checkpoint(folder / "fitted")
    (folder / "grid.toml").write_text(GRID)
    (folder / "figure.toml").write_text(FIGURE)
    scores = sk.score_zoo(
        load_zoo(write_small_zoo(folder / "small"))["small"],
        [sk.MSharpness(m=[1, 4], rho=0.1), sk.measures.make_measure("frobenius_norms")],
        out=folder / "scored",
        progress=False,
    )
    scores.close()
    with sqlite3.connect(folder / "scored/results.sqlite") as db:
        db.execute("PRAGMA journal_mode=DELETE")
    db.close()
    spectrum({"a": network}, examples(), folder / "spectra", **SPECTRUM)


SPECTRUM: dict[str, Any] = {"steps": 8, "probes": 1, "progress": False}


class _Stopped(Exception):
    """In place of a kill."""


def _keep_checkpoint(folder: Path) -> None:
    """A training that ends after its first epoch, and leaves its checkpoint."""
    save = RunFiles.save

    def save_and_stop(self: RunFiles, *arguments: Any) -> None:
        save(self, *arguments)
        raise _Stopped

    RunFiles.save = save_and_stop  # type: ignore[method-assign]
    try:
        sk.fit(network(), examples(), out=folder, **FIT)
    except _Stopped:
        pass
    finally:
        RunFiles.save = save  # type: ignore[method-assign]


# --- readers ----------------------------------------------------------------------------------


def _read_config(folder: Path, path: Path) -> None:
    error: SharpkitError | None = None
    for task in find_tasks(folder).values():  # the weights of one of them may fit
        shutil.copyfile(path, task["1"].path / "config.json")
        try:
            task["1"].load()
            return
        except SharpkitError as refused:
            error = refused
    assert error is not None
    raise error


def _read_model_configs(folder: Path, path: Path) -> None:
    shutil.copyfile(path, folder / "reference_data/task1/model_configs.json")
    zoo_info(folder)
    task = load_zoo(folder / "input_data/task1")["task1"]
    for entry in task.values():
        assert isinstance(entry.generalization_gap, float)
        assert isinstance(entry.hyperparameters, dict)
    assert isinstance(task.possible_values, dict)


def _read_weights(folder: Path, path: Path) -> None:
    model = build_model(CONFIGS[0], device="meta")
    try:
        for arrays in read_weights(path):
            assert all(np.isfinite(array).all() for array in arrays)
    finally:
        load_weights(model, path)
    with torch.no_grad():
        assert model(torch.zeros(1, *model.input_shape)).shape == (1, 3)


def _read_shard(folder: Path, path: Path) -> None:
    inputs, labels = read_shards([path])
    assert len(inputs) == len(labels)
    assert np.isfinite(inputs).all()
    assert labels.min() >= 0


def _read_archive(folder: Path, path: Path) -> None:
    target = folder / "unpacked"
    shutil.rmtree(target, ignore_errors=True)
    before = {p.name for p in folder.iterdir()}
    try:
        unpack_zip(path, target)
    finally:  # all of it or nothing, and nothing beside it
        assert {p.name for p in folder.iterdir()} - before <= {"unpacked"}


def _read_examples(folder: Path, path: Path) -> None:
    for part in load_dataset(path):
        inputs, labels = part.tensors
        assert len(inputs) == len(labels) > 0
        assert torch.isfinite(inputs).all()


def _read_idx(folder: Path, path: Path) -> None:
    assert read_idx(path).dtype == np.uint8


def _read_digits(folder: Path, path: Path) -> None:
    root = folder / "svhn"
    root.mkdir(exist_ok=True)
    shutil.copyfile(folder / "digits-True.mat", root / "train_32x32.mat")
    shutil.copyfile(path, root / "test_32x32.mat")
    load_dataset("svhn", root=root)


def _read_image(folder: Path, path: Path) -> None:
    tree = folder / "tree"
    shutil.copytree(folder / "images", tree, dirs_exist_ok=True)
    shutil.copyfile(path, tree / "train/0/0.png")
    load_dataset(tree)


def _read_cifar(folder: Path, path: Path) -> None:
    root = folder / "cifar"
    root.mkdir(exist_ok=True)
    shutil.copyfile(path, root / "cifar-10-binary.tar.gz")
    load_dataset("cifar10", root=root)


def _read_checkpoint(folder: Path, path: Path) -> None:
    load_checkpoint(path, network)


def _read_trained(folder: Path, path: Path) -> None:
    run = folder / "run"
    shutil.copytree(folder / "trained", run, dirs_exist_ok=True)
    shutil.copyfile(path, run / "config.json")
    load_trained(run)
    trained_data(run)


def _resume(folder: Path, path: Path) -> None:
    run = folder / "resumed"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / "fitted", run)
    shutil.copyfile(path, run / "checkpoint.pt")
    sk.fit(network(), examples(), out=run, **FIT)


def _read_store(folder: Path, path: Path) -> None:
    run = folder / "read"
    run.mkdir(exist_ok=True)
    for old in run.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    shutil.copyfile(path, run / "results.sqlite")
    scores = sk.Scores.open(run)
    try:
        scores.frame(), scores.failures, scores.metrics(), scores.provenance()
        repr(scores)
        sk.evaluate(scores, resamples=3)
    finally:
        scores.close()


def _read_spectrum(folder: Path, path: Path) -> None:
    run = folder / "read-spectra"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / "spectra", run)
    shutil.copyfile(path, run / "models/a.npz")
    found = spectrum({"a": network}, examples(), run, **SPECTRUM)
    assert not found.failures


@dataclass(frozen=True)
class Kind:
    """A kind of file: which seeds there are, how else they are damaged, who reads them."""

    pattern: str
    ways: tuple[Callable[[random.Random, bytes, list[bytes]], bytes], ...]
    read: Callable[[Path, Path], None]


_IMAGES = (damage.png_chunks,)
KINDS = {
    "config": Kind("input_data/*/model_0/config.json", (damage.json_values,), _read_config),
    "model_configs": Kind("good/*/model_configs.json", (damage.json_values,), _read_model_configs),
    "weights": Kind("**/*.hdf5", (), _read_weights),
    "shard": Kind("**/*.tfrecord", (damage.tf_records, damage.tf_records), _read_shard),
    "archive": Kind("zoo.zip", (damage.zip_members,), _read_archive),
    "npz": Kind("*.npz", (damage.zip_members, damage.zip_members), _read_examples),
    "idx": Kind("*.idx", (), _read_idx),
    "idx_gz": Kind("*.idx.gz", (damage.gzip_content(damage.bytes_at_random),), _read_idx),
    "mat": Kind("*.mat", (damage.mat_elements, damage.mat_elements), _read_digits),
    "image": Kind("images/**/*.*g", _IMAGES, _read_image),
    "image_zip": Kind("images.zip", (damage.zip_members,), _read_examples),
    "cifar": Kind("*.tar.gz", (damage.gzip_content(damage.tar_members),), _read_cifar),
    "safetensors": Kind("*.safetensors", (damage.safetensors_header,), _read_checkpoint),
    "pt": Kind("*.pt", (damage.zip_members, damage.zip_members), _read_checkpoint),
    "trained": Kind("trained/config.json", (damage.json_values,), _read_trained),
    "checkpoint": Kind("fitted/checkpoint.pt", (damage.zip_members, damage.zip_members), _resume),
    "grid": Kind("grid.toml", (damage.toml_values, damage.toml_values), lambda _, p: read_grid(p)),
    "figure": Kind(
        "figure.toml", (damage.toml_values, damage.toml_values), lambda _, p: read_figure(p)
    ),
    "store": Kind("scored/results.sqlite", (damage.sqlite_values,), _read_store),
    "spectrum": Kind("spectra/models/a.npz", (damage.zip_members,), _read_spectrum),
}


@cache
def _seeds(folder: Path) -> dict[str, list[tuple[str, bytes]]]:
    return {
        name: [(p.name, p.read_bytes()) for p in sorted(folder.glob(kind.pattern))]
        for name, kind in KINDS.items()
    }


def try_case(folder: Path, name: str, seed: int) -> str:
    """Make and read a damaged file: "loaded", the error's type, or the traceback of an escape."""
    rng = random.Random(f"{name} {seed}")
    seeds = _seeds(folder)
    file, content = rng.choice(seeds[name])
    others = [content for some in seeds.values() for _, content in some]
    way = rng.choice([damage.bytes_at_random, *KINDS[name].ways])
    path = folder / f"damaged {file}"
    path.unlink(missing_ok=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path.write_bytes(way(rng, content, others))
            KINDS[name].read(folder, path)
    except SharpkitError as error:
        if isinstance(error.__cause__, MemoryError):
            return f"ESCAPED {name} {seed}: it tried to allocate too much\n{error}"
        return type(error).__name__
    except Exception:
        return f"ESCAPED {name} {seed}\n{traceback.format_exc()}"
    return "loaded"
