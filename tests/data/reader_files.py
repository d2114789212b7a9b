"""A good file of every format that is no zoo, and damages that know the format."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import struct
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.io import savemat
from small_cnns import SmallCnnFiles
from torch import nn
from trials import plain_weights, write_trial

import sharpkit as sk
from sharpkit import download as downloading
from sharpkit.data.idx import read_idx
from sharpkit.datasets import load_dataset
from sharpkit.errors import RunError, SharpkitError
from sharpkit.runs.checkpoints import load_arrays, load_checkpoint
from sharpkit.runs.figure3 import figure, plan as figure3_plan
from sharpkit.runs.saved_spectrum import read_spectrum
from sharpkit.runs.spectrum import spectrum as measure_spectra
from sharpkit.runs.trained import load_trained, same_examples, trained_data
from sharpkit.zoo.folder.columns import path_columns, read_columns
from sharpkit.zoo.folder.table import read_table
from sharpkit.zoo.formats import find_tasks
from sharpkit.zoo_training import grid_file as zoo_plans, zoo as training_of_zoos

RNG = np.random.default_rng(0)
NESTED = json.loads(60 * "[" + 60 * "]")
ODD = (  # values that no field of a JSON or TOML file has
    None, True, -1, 0, 2**31, 2**63, 10**250, 1.5, float("nan"), float("inf"), "", "\x00", "\ud800",
    "²", "../x", 5000 * "x", [], {}, [[]], NESTED, "resnet99999", "wrn-²-1", "~nobody/x",
)  # fmt: skip


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape).astype(np.uint8)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


# --- good files: each function writes one into a folder, and returns it with what reads it --------

Case = tuple[Path, Callable[[], object]]


def idx(folder: Path) -> Case:
    path = folder / "images.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 2, 0, 0, 0, 5, 0, 0, 0, 7]) + bytes(range(35))))
    return path, lambda: read_idx(path)


def plain_idx(folder: Path) -> Case:
    path = folder / "labels"
    path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 5]) + bytes(range(5)))
    return path, lambda: read_idx(path)


def cifar(folder: Path) -> Case:
    path = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"):
            member = tarfile.TarInfo(f"cifar/{name}")
            member.size = 3073
            tar.addfile(member, io.BytesIO(bytes([3]) + pixels(3072).tobytes()))
    return path, lambda: load_dataset("cifar10", root=folder)


def svhn(folder: Path, *, packed: bool = True) -> Case:
    for split in ("train", "test"):
        content = {"X": pixels(32, 32, 3, 4), "y": np.array([[1], [10], [3], [9]])}
        savemat(folder / f"{split}_32x32.mat", content, do_compression=packed)
    return folder / "train_32x32.mat", lambda: load_dataset("svhn", root=folder)


def plain_svhn(folder: Path) -> Case:
    return svhn(folder, packed=False)


def npz(folder: Path, *, packed: bool = True) -> Case:
    path = folder / "data.npz"
    arrays = {f"x_{split}": RNG.normal(size=(6, 4)) for split in ("train", "test")}
    labels = {f"y_{split}": np.arange(6) % 3 for split in ("train", "test")}
    (np.savez_compressed if packed else np.savez)(path, **arrays, **labels)

    def read() -> None:
        load_arrays(path)
        load_dataset(path)

    return path, read


def plain_npz(folder: Path) -> Case:
    return npz(folder, packed=False)


def images(folder: Path, kind: str = "png") -> Case:
    path = folder / "mine.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("train/cat/0", "train/dog/1", "test/cat/0"):
            content = io.BytesIO()
            Image.fromarray(pixels(8, 8, 3)).save(content, kind, **PROGRESSIVE.get(kind, {}))
            archive.writestr(f"{name}.{kind}", content.getvalue())
    return path, lambda: load_dataset(path)


PROGRESSIVE: dict[str, dict[str, Any]] = {"jpeg": {"progressive": True}}


def jpegs(folder: Path) -> Case:
    return images(folder, "jpeg")


def pt(folder: Path, *, new: bool = True) -> Case:
    path = folder / "model.pt"
    content = {"epoch": 3, "state_dict": small().state_dict(), "lr": [0.1, None], "name": "x"}
    torch.save(content, path, _use_new_zipfile_serialization=new)
    return path, lambda: load_checkpoint(path, small)


def legacy_pt(folder: Path) -> Case:
    return pt(folder, new=False)


def safetensors(folder: Path) -> Case:
    path = folder / "model.safetensors"
    save_file(small().state_dict(), path, {"format": "pt"})
    return path, lambda: load_checkpoint(path, small)


def table(folder: Path) -> Case:
    path = folder / "runs.csv"
    lines = [f"net{k}.pt,{0.1 * k},adam,1.0,{0.9 - 0.01 * k}" for k in range(6)]
    path.write_text("\n".join(["path,lr,params.optimizer,train_acc,test_acc", *lines]) + "\n")

    def read() -> None:
        found = read_table(path)
        read_columns(found, path_columns(found)[0])

    return path, read


def small_cnn_zoo(folder: Path, name: str) -> Case:
    """A file of a task of the Small CNN Zoo."""
    made = SmallCnnFiles(folder / "mnist", n=2, networks=1).write()
    return made / name, lambda: _load_all(made)


def layout(folder: Path) -> Case:
    return small_cnn_zoo(folder, "layout.csv")


def metrics(folder: Path) -> Case:
    return small_cnn_zoo(folder, "metrics.csv.gz")


def weights(folder: Path) -> Case:
    return small_cnn_zoo(folder, "weights.npy")


def ray_trial(folder: Path, name: str) -> Case:
    """A file in the folder of a network of a model zoo."""
    state = plain_weights("CNN", 0.0, RNG)
    params = {"model::type": "CNN", "model::nlin": "tanh", "model::dropout": 0.0}
    write_trial(folder / "zoo" / "a", params, {5: ({"train_acc": 1.0, "test_acc": 0.9}, state)})
    return folder / "zoo" / "a" / name, lambda: _load_all(folder / "zoo")


def _load_all(path: Path) -> None:
    (task,) = find_tasks(path).values()
    for model in task.values():
        model.load()


def trial_params(folder: Path) -> Case:
    return ray_trial(folder, "params.json")


def trial_result(folder: Path) -> Case:
    return ray_trial(folder, "result.json")


def trial_checkpoint(folder: Path) -> Case:
    return ray_trial(folder, "checkpoint_000005/checkpoints")


def training(folder: Path, name: str) -> Case:
    """A training of `sharpkit.fit` that goes on, as its config.json and checkpoint say."""
    out = folder / "run"

    def train() -> None:
        torch.manual_seed(0)
        data = torch.arange(32.0).reshape(8, 4) / 32, torch.arange(8) % 3
        sk.fit(
            small(), data, epochs=2, batch_size=4, lr=0.1, optimizer="sam", m=2, out=out,
            provenance={"a": [1]}, progress=False,
        )  # fmt: skip

    train()
    return out / name, train


def checkpoint(folder: Path) -> Case:
    return training(folder, "checkpoint.pt")


def fit_config(folder: Path) -> Case:
    return training(folder, "config.json")


def trained(folder: Path) -> Case:
    path = folder / "config.json"
    model = sk.training.build_architecture("nin-4x1", (1, 4, 4), 3, seed=0)
    save_file(model.state_dict(), folder / "model.safetensors")
    x = pixels(6, 4, 4)
    np.savez(
        folder / "d.npz", x_train=x, x_test=x, y_train=np.arange(6) % 3, y_test=np.arange(6) % 3
    )
    provenance = {
        "architecture": "nin-4x1", "input_shape": [1, 4, 4], "classes": 3,
        "data": str(folder / "d.npz"), "root": None,
    }  # fmt: skip
    path.write_text(json.dumps({"label_noise": 0.5, "seed": 1, "provenance": provenance}))

    def read() -> None:
        load_trained(folder)
        trained_data(folder)
        same_examples(folder, folder)

    return path, read


def spectrum(folder: Path, name: str = "models/a.npz") -> Case:
    data = torch.arange(20.0).reshape(5, 4) / 20, torch.arange(5) % 3

    def run() -> None:
        torch.manual_seed(0)
        out = folder / "out"
        measure_spectra({"a": lambda: model}, data, out, steps=2, probes=1, progress=False)

    torch.manual_seed(0)
    model = small()
    run()
    path = folder / "out" / name
    return path, run if name == "config.json" else lambda: usable(path)


def usable(path: Path) -> None:
    """A file that is read back gives a spectrum that can be drawn; others are computed anew."""
    found = read_spectrum(path)
    if found is None:
        raise RunError(f"{path}: is computed again")
    density, numbers, weights = found
    if bool(np.isfinite(density.nodes).all() and np.isfinite(density.weights).all()):
        density.on("linear")
    assert isinstance(numbers, dict)
    assert isinstance(weights, str)


def spectrum_config(folder: Path) -> Case:
    return spectrum(folder, "config.json")


def zoo_plan(folder: Path) -> Case:
    path = folder / "grid.toml"
    preset = Path(zoo_plans.__file__).parent / "presets" / "task2.toml"
    path.write_bytes(preset.read_bytes())
    return path, lambda: zoo_plans.read_plan(path)


def figure_plan(folder: Path) -> Case:
    path = folder / "figure.toml"
    preset = Path(figure3_plan.__file__).parent / "presets" / "cifar10.toml"
    path.write_bytes(preset.read_bytes())
    return path, lambda: figure3_plan.read_plan(path)


def figure_claim(folder: Path) -> Case:
    plan = figure3_plan.read_plan("mini")

    def claim() -> None:
        figure._claim(folder, plan, ["left", "middle", "right"])

    claim()
    return folder / "figure3.json", claim


def zoo_claim(folder: Path) -> Case:
    path = folder / "task.json"
    plan = {"grid": {"width": [4, 8]}, "recipe": {"lr": 0.1}, "seed": 0}
    training_of_zoos._claim(path, plan)
    return path, lambda: training_of_zoos._claim(path, plan)


def notes(folder: Path) -> Case:
    path = folder / "a.zip.part.json"
    path.write_text(json.dumps({"url": "http://x", "validator": '"1"', "size": None}))
    (folder / "a.zip.part").write_bytes(b"half")
    download = downloading._Download("http://x", folder / "a.zip", None, False)

    def read() -> None:
        found = download._read_note()
        if found is None:
            raise RunError(f"{path}: says nothing")
        assert isinstance(found.url + found.validator, str)
        assert found.size is None or isinstance(found.size, int)

    return path, read


FORMATS: dict[str, Callable[[Path], Case]] = {
    make.__name__: make
    for make in (
        idx, plain_idx, cifar, svhn, plain_svhn, npz, plain_npz, images, jpegs, pt, legacy_pt,
        table, safetensors, checkpoint, fit_config, trained, spectrum, spectrum_config, zoo_plan,
        figure_plan, figure_claim, zoo_claim, notes, layout, metrics, weights, trial_params,
        trial_result, trial_checkpoint,
    )
}  # fmt: skip


# --- damages ----------------------------------------------------------------------------------


def damaged(rng: random.Random, name: str, content: bytes) -> bytes:
    """The content with some bytes changed, inside what compresses it or outside."""
    if rng.random() < 0.4:
        return changed(rng, content)
    if content[:2] == b"\x1f\x8b":
        return gzip.compress(changed(rng, gzip.decompress(content)), 1)
    if content[:2] == b"PK":
        return _zip(rng, content)
    if name.endswith(".mat"):
        return _mat(rng, content)
    if name.endswith(".safetensors"):
        length = int.from_bytes(content[:8], "little")
        header = json.dumps(odd(rng, json.loads(content[8 : 8 + length]))).encode()
        return len(header).to_bytes(8, "little") + header + content[8 + length :]
    if name.endswith(".json"):
        return json.dumps(odd(rng, json.loads(content))).encode()
    if name.endswith(".toml"):
        return _toml(rng, content)
    return changed(rng, content)


def changed(rng: random.Random, content: bytes) -> bytes:
    """One to three changes: bits, extreme numbers, a part cut out, doubled or moved."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content) + 1) if rng.random() < 0.5 else rng.randrange(200)
        at = min(at, len(content))
        kind = rng.randrange(6)
        size = rng.choice((1, 2, 4, 8))
        if kind == 0 and at < len(content):
            byte = bytes([content[at] ^ (1 << rng.randrange(8))])
            content = content[:at] + byte + content[at + 1 :]
        elif kind == 1:
            number = rng.choice((0, 1, 2**31, 2**32 - 1, 2**30, 2**63, 2**64 - 1, 2**60))
            new = (number % 256**size).to_bytes(size, rng.choice(("little", "big")))
            content = content[:at] + new + content[at + size :]
        elif kind == 2:
            content = content[:at] + rng.randbytes(size) + content[at + size :]
        elif kind == 3:
            content = content[:at]
        elif kind == 4:
            content = content[:at] + content[at + rng.randrange(64) :]
        else:
            content = content[:at] + content[max(at - rng.randrange(64), 0) :]
    return content


def odd(rng: random.Random, document: Any) -> Any:
    """A JSON document with one value changed, left out, or under another name."""
    places = [(None, None)]
    for parent in (nodes := [document]):
        if isinstance(parent, dict | list):
            keys = list(parent) if isinstance(parent, dict) else range(len(parent))
            places += [(parent, key) for key in keys]
            nodes += [parent[key] for key in keys]
    parent, key = rng.choice(places)
    if parent is None:
        return rng.choice(ODD)
    what = rng.random()
    if what < 0.1:
        del parent[key]
    elif what < 0.2 and isinstance(parent, dict):
        parent[rng.choice(("", "\ud800", "x"))] = parent.pop(key)
    else:
        parent[key] = rng.choice(ODD)
    return document


def _zip(rng: random.Random, content: bytes) -> bytes:
    """The archive with one member changed or renamed, its checksums right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    chosen = rng.randrange(len(members))
    new = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(new, "w") as archive:
        warnings.simplefilter("ignore", UserWarning)  # of names that come twice
        for number, (info, data) in enumerate(members):
            name, method = info.filename, info.compress_type
            if number == chosen and rng.random() < 0.1:
                name = rng.choice((members[0][0].filename, "x", "x.npy", "train/²/x.png"))
            elif number == chosen:
                method = rng.choice((method, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
                data = _npy(rng, data) if name.endswith(".npy") else changed(rng, data)
            if number != chosen or rng.random() < 0.97:
                archive.writestr(name, data, method)
    return new.getvalue()


def _npy(rng: random.Random, content: bytes) -> bytes:
    """An array with another header, or with changed bytes."""
    odd_arrays = (
        np.array(3), np.zeros(0), np.array("x"), np.array(None, object), np.zeros((2, 0, 3)),
        np.zeros(3, ">f4"), np.array([2**64 - 1], np.uint64), np.zeros(2, "M8[s]"),
        np.zeros(2, [("a", "i4")]), np.zeros(6, complex), np.full(6, np.nan), np.zeros((6, 4), "O"),
        np.zeros((6, 4), np.longdouble), np.zeros((6, 8, 8), np.uint8), np.zeros((6, 4), bool),
    )  # fmt: skip
    if rng.random() < 0.5:
        new = io.BytesIO()
        np.save(new, rng.choice(odd_arrays), allow_pickle=True)
        return new.getvalue()
    return changed(rng, content)


def _mat(rng: random.Random, content: bytes) -> bytes:
    """A .mat file with one of its elements changed, compressed as before."""
    elements, at = [], 128
    while at < len(content):
        kind, size = struct.unpack("<II", content[at : at + 8])
        elements.append((kind, content[at + 8 : at + 8 + size]))
        at += 8 + size
    chosen = rng.randrange(len(elements))
    whole = content[:128]
    for number, (kind, data) in enumerate(elements):
        if number == chosen:
            data = (
                zlib.compress(changed(rng, zlib.decompress(data)), 1)
                if kind == 15
                else changed(rng, data)
            )
        whole += struct.pack("<II", kind, len(data)) + data
    return whole


def _toml(rng: random.Random, content: bytes) -> bytes:
    """A TOML file with another value somewhere."""
    text = content.decode()
    values = list(re.finditer(r"(?<== )[^#\n]+", text))
    place = rng.choice(values)
    new = rng.choice(
        (
            "0x" + 400 * "f", "1" + 400 * "0", 5000 * "9", "1" + 200 * "0", "-1", "0", "nan", "inf",
            "1e999", "true", '""', '"²"', "[]", "[[]]", "{}", "{a = 1}", "2000-01-01", "[nan]",
            "[1]", "[1, 1]", "[true]", '["x"]', 90 * "[" + 90 * "]", '"resnet²"', '"~nobody:x"',
            "1_0", "1" + 300 * "_0", "10000000", "9223372036854775808", "07:32:00", '"\\u0000"',
        )
    )  # fmt: skip
    return (text[: place.start()] + new + text[place.end() :]).encode()


def outcomes(
    rng: random.Random, make: Callable[[Path], Case], folder: Path, cases: int
) -> list[str]:
    """What damaged files of a format give: "" if they are read, else the type of the error."""
    path, read = make(folder)
    good = path.read_bytes()
    found = []
    for _ in range(cases):
        content = damaged(rng, path.name, good)
        path.write_bytes(content)
        try:
            read()
            found.append("")
        except SharpkitError as error:
            str(error).encode()  # can be shown
            found.append(type(error).__name__)
        except Exception as error:
            keep = Path(tempfile.gettempdir()) / f"escaped-{make.__name__}-{path.name}"
            keep.write_bytes(content)
            raise AssertionError(f"{keep}: {type(error).__name__}: {error}") from error
    path.write_bytes(good)
    read()
    return found
