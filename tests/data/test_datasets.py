"""Data sets in every form that `load_dataset` reads, and what it says about broken ones."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from file_server import FileServer
from paths import SHARED, needs_shared
from PIL import Image
from scipy.io import savemat
from zoos import write_small_zoo

from sharpkit import datasets, download
from sharpkit.data import downloads
from sharpkit.datasets import load_dataset
from sharpkit.errors import ArgumentError, DataError, DownloadError
from sharpkit.zoo import embedded_zoo

RNG = np.random.default_rng(0)


def images(n, *shape):
    return RNG.integers(0, 256, (n, *shape)).astype(np.uint8)


def assert_normalised(data, train, test):
    """Against float64 arithmetic on the images, (n, c, h, w)."""
    mean = train.astype(np.float64).mean((0, 2, 3), keepdims=True)
    deviation = train.astype(np.float64).std((0, 2, 3), keepdims=True)
    for split, pixels in zip(data, (train, test), strict=True):
        assert split.tensors[0].dtype == torch.float32
        assert split.tensors[1].dtype == torch.int64
        expected = (pixels - mean) / deviation
        np.testing.assert_allclose(split.tensors[0].numpy(), expected, rtol=1e-6, atol=1e-6)


# --- files of the well-known sets -------------------------------------------------------------


def cifar_records(n, labels):
    rows = images(n, labels + 3072)
    rows[:, :labels] %= 10
    return rows


@pytest.fixture(scope="module")
def cifar():
    """Name -> records of CIFAR-10's binary files, with 4 images each."""
    names = [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]
    return {name: cifar_records(4, 1) for name in names}


def tarball(files, folder="cifar-10-batches-bin"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def assert_is_cifar(data, cifar):
    rows = np.concatenate([cifar[f"data_batch_{k}.bin"] for k in range(1, 6)])
    assert data[0].tensors[1].tolist() == rows[:, 0].tolist()
    test = cifar["test_batch.bin"]
    # red, then green, then blue, each in rows
    assert_normalised(data, rows[:, 1:].reshape(-1, 3, 32, 32), test[:, 1:].reshape(-1, 3, 32, 32))


@pytest.mark.parametrize("place", ["files", "folder", "archive"])
def test_cifar10_from_a_folder(cifar, tmp_path, place):
    files = {name: rows.tobytes() for name, rows in cifar.items()}
    if place == "archive":
        (tmp_path / "cifar-10-binary.tar.gz").write_bytes(tarball(files))
    else:
        folder = tmp_path / ("cifar-10-batches-bin" if place == "folder" else "")
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    assert_is_cifar(load_dataset("cifar10", root=tmp_path), cifar)


def test_cifar100_has_the_fine_labels(tmp_path):
    rows = {name: cifar_records(3, 2) for name in ("train.bin", "test.bin")}
    for name, content in rows.items():
        (tmp_path / name).write_bytes(content.tobytes())
    train, test = load_dataset("cifar100", root=tmp_path)
    assert train.tensors[1].tolist() == rows["train.bin"][:, 1].tolist()
    pixels = [rows[name][:, 2:].reshape(-1, 3, 32, 32) for name in ("train.bin", "test.bin")]
    assert_normalised((train, test), *pixels)


def test_svhn_labels_are_digits(tmp_path):
    pixels = {split: images(5, 32, 32, 3) for split in ("train", "test")}
    digits = np.array([[1], [10], [3], [9], [10]])
    for split, x in pixels.items():
        file = {"X": x.transpose(1, 2, 3, 0), "y": digits}
        savemat(tmp_path / f"{split}_32x32.mat", file)
    data = load_dataset("svhn", root=tmp_path)
    assert data[0].tensors[1].tolist() == [1, 0, 3, 9, 0]
    assert_normalised(data, *(x.transpose(0, 3, 1, 2) for x in pixels.values()))


def idx(array):
    shape = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.astype(np.uint8).tobytes()


def test_fashion_mnist_from_idx_files(tmp_path):
    pixels = {"train": images(6, 28, 28), "t10k": images(4, 28, 28)}
    for split, x in pixels.items():
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(x)))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(idx(np.arange(len(x))))
    data = load_dataset("fashion-mnist", root=tmp_path)
    assert data[1].tensors[1].tolist() == [0, 1, 2, 3]
    assert_normalised(data, *(x[:, None] for x in pixels.values()))


def test_fashion_mnist_tells_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "FASHION_MNIST", tmp_path / "absent")
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        load_dataset("fashion-mnist")


@pytest.mark.skipif(not datasets.FASHION_MNIST.is_dir(), reason="dataset-fashion-mnist is absent")
def test_fashion_mnist_of_debian():
    train, test = load_dataset("fashion-mnist")
    assert train.tensors[0].shape == (60_000, 1, 28, 28)
    assert torch.bincount(test.tensors[1]).tolist() == [1000] * 10
    assert abs(float(train.tensors[0].double().mean())) < 1e-6


# --- downloads --------------------------------------------------------------------------------


@pytest.fixture
def server(cifar, monkeypatch, tmp_path):
    """CIFAR-10 as a file of a local server, and an empty cache."""
    content = tarball({name: rows.tobytes() for name, rows in cifar.items()})
    monkeypatch.setattr(download, "_FIRST_PAUSE", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("SHARPKIT_CACHE", str(tmp_path / "cache"))
    with FileServer(content).running() as running:
        yield running


def serve(monkeypatch, server, **changes):
    url = server.url.replace("data.zip", "cifar-10-binary.tar.gz")
    digest = hashlib.sha256(server.content).hexdigest()
    known = {"url": url, "size": len(server.content), "sha256": digest, **changes}
    monkeypatch.setattr(downloads, "_CIFAR10", downloads._Remote(**known))


def test_cifar10_is_downloaded_once(cifar, server, monkeypatch):
    serve(monkeypatch, server)
    server.breaks = [1000]
    assert_is_cifar(load_dataset("cifar10"), cifar)
    assert len(server.requests) == 2
    assert_is_cifar(load_dataset("cifar10"), cifar)
    assert len(server.requests) == 2


def test_another_file_is_not_accepted(server, monkeypatch, tmp_path):
    serve(monkeypatch, server, sha256="0" * 64)
    with pytest.raises(DownloadError, match="expected 0000"):
        load_dataset("cifar10")
    serve(monkeypatch, server, size=7)
    with pytest.raises(DownloadError, match="expected 7"):
        load_dataset("cifar10")
    assert not [p for p in (tmp_path / "cache").rglob("*.tar.gz*") if p.is_file()]


def test_an_unreachable_server_says_what_else_would_do(server, monkeypatch):
    serve(monkeypatch, server)
    server.statuses = [404]
    with pytest.raises(DownloadError, match=r"404.*give root= a folder that has cifar-10-binary"):
        load_dataset("cifar10")


# --- files of one's own -----------------------------------------------------------------------


def write_npz(path, x_train, x_test, labels=None):
    y = [np.arange(len(x)) % 3 if labels is None else labels for x in (x_train, x_test)]
    np.savez(path, x_train=x_train, x_test=x_test, y_train=y[0], y_test=y[1])
    return path


@pytest.mark.parametrize("layout", ["nhw", "nhwc", "nchw"])
def test_npz_of_bytes_is_images_in_any_layout(tmp_path, layout):
    channels = 1 if layout == "nhw" else 3
    pixels = [images(n, channels, 6, 5) for n in (7, 4)]
    stored = {
        "nhw": [x[:, 0] for x in pixels],
        "nhwc": [x.transpose(0, 2, 3, 1) for x in pixels],
        "nchw": pixels,
    }[layout]
    data = load_dataset(write_npz(tmp_path / "data.npz", *stored))
    assert_normalised(data, *pixels)
    assert data[0].tensors[1].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_npz_of_floats_is_taken_as_it_is(tmp_path):
    x = RNG.normal(size=(5, 4))
    train, test = load_dataset(write_npz(tmp_path / "data.npz", x, x[:2]))
    assert torch.equal(train.tensors[0], torch.from_numpy(x.astype(np.float32)))
    assert test.tensors[0].shape == (2, 4)


def bad_npz(path, case):
    x = RNG.normal(size=(5, 4))
    y = np.arange(5) % 2
    arrays = {"x_train": x, "y_train": y, "x_test": x, "y_test": y}
    arrays |= {
        "missing": {},
        "pickled": {"x_train": np.array([{}] * 5, object)},
        "nan": {"x_test": np.full((5, 4), np.nan)},
        "float labels": {"y_train": y / 2},
        "lengths": {"y_test": y[:3]},
        "shapes": {"x_test": x[:, :3]},
        "negative": {"y_train": -y},
        "ambiguous": {"x_train": images(5, 3, 4, 3), "x_test": images(5, 3, 4, 3)},
        "integers": {"x_train": np.ones((5, 4), int), "x_test": np.ones((5, 4), int)},
        "empty": {"x_test": x[:0], "y_test": y[:0]},
    }[case]
    if case == "missing":
        del arrays["y_test"]
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "y_test is missing"),
        ("pickled", "not a readable .npz"),
        ("nan", "test inputs have NaN"),
        ("float labels", "y_train is float64"),
        ("lengths", r"y_test is int64 of shape \(3,\)"),
        ("shapes", "x_test float64"),
        ("negative", "label -1 is negative"),
        ("ambiguous", "no doubt which"),
        ("integers", "x_train is int64"),
        ("empty", "no test examples"),
    ],
)
def test_bad_npz_files_are_named(tmp_path, case, message):
    bad_npz(tmp_path / "mine.npz", case)
    with pytest.raises(DataError, match=f"mine.npz: .*{message}"):
        load_dataset(tmp_path / "mine.npz")


def encoded(pixels, kind="png"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def image_files(channels=3):
    """Path -> encoded image of two classes, and the pixels by split in the order of the paths."""
    files, pixels = {}, {"train": [], "test": []}
    for split, count in (("train", 2), ("test", 1)):
        for label in ("cat", "dog"):
            for k in range(count):
                x = images(8, 8, 3) if channels == 3 else images(8, 8)
                files[f"{split}/{label}/{k}.png"] = encoded(x)
                pixels[split].append(x.transpose(2, 0, 1) if channels == 3 else x[None])
    return files, [np.stack(x) for x in pixels.values()]


def write_tree(path, files, form):
    if form == "zip":
        with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path.with_suffix(".zip")
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("form", ["zip", "folder"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_a_folder_or_archive(tmp_path, form, channels):
    files, pixels = image_files(channels)
    litter = {"__MACOSX/train/cat/._0.png": b"", "train/cat/.DS_Store": b"", "notes.txt": b"hi"}
    data = load_dataset(write_tree(tmp_path / "mine", {**files, **litter}, form))
    assert data[0].tensors[1].tolist() == [0, 0, 1, 1]
    assert data[1].tensors[1].tolist() == [0, 1]
    assert_normalised(data, *pixels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train/cat/0.png": b"GIF"}, "train/cat/0.png is not a readable image"),
        ({"train/dog/1.png": encoded(images(9, 8, 3))}, r"train/dog/1.png has .* \(3, 9, 8\)"),
        ({"train/dog/1.png": encoded(images(8, 8))}, r"train/dog/1.png has .* \(1, 8, 8\)"),
        ({"test/cow/0.png": encoded(images(8, 8, 3))}, "test has the class 'cow'"),
    ],
)
@pytest.mark.parametrize("form", ["zip", "folder"])
def test_bad_images_are_named(tmp_path, form, change, message):
    files, _ = image_files()
    path = write_tree(tmp_path / "mine", {**files, **change}, form)
    with pytest.raises(DataError, match=f"mine.*{message}"):
        load_dataset(path)


def test_images_without_a_test_split_or_in_a_broken_archive(tmp_path):
    files, _ = image_files()
    part = {name: content for name, content in files.items() if name.startswith("train")}
    with pytest.raises(DataError, match="no images of test"):
        load_dataset(write_tree(tmp_path / "mine", part, "folder"))
    (tmp_path / "broken.zip").write_bytes(b"PK nothing")
    with pytest.raises(DataError, match=r"broken.zip: cannot be read as a zip"):
        load_dataset(tmp_path / "broken.zip")


@needs_shared
def test_cifar10_subset_of_jpegs():
    train, test = load_dataset(SHARED / "cifar10_subset.zip")
    assert train.tensors[0].shape == (12_000, 3, 32, 32)
    assert torch.bincount(train.tensors[1]).tolist() == [1200] * 10
    assert torch.bincount(test.tensors[1]).tolist() == [400] * 10


# --- zoos and names ---------------------------------------------------------------------------


def test_the_data_of_a_task_are_as_stored(tmp_path):
    zoo = write_small_zoo(tmp_path / "zoo", tasks=("first", "second"))
    train, test = load_dataset(f"{zoo}:second")
    assert train.tensors[0].shape == (24, 5)
    assert len(test) == 24
    with pytest.raises(ArgumentError, match=r"no task 'third' in .*first, second"):
        load_dataset(f"{zoo}:third")


def test_embedded_data():
    train, _ = load_dataset("embedded")
    stored = embedded_zoo()["fashion_mnist_14x14"].dataset("train")
    assert torch.equal(train.tensors[0], stored.tensors[0])
    again, _ = load_dataset("embedded:fashion_mnist_14x14")
    assert torch.equal(train.tensors[0], again.tensors[0])


@pytest.mark.parametrize("name", ["cifar11", "", "/nowhere/data", "/nowhere:task"])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(ArgumentError, match="fashion-mnist"):
        load_dataset(name)


def test_root_is_for_the_sets_that_have_files(tmp_path):
    with pytest.raises(ArgumentError, match="root is for fashion-mnist"):
        load_dataset("embedded", root=tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        load_dataset("cifar10", root=tmp_path / "absent")
    with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz is missing"):
        load_dataset("cifar10", root=tmp_path)


def test_damaged_files_of_known_sets_are_named(cifar, tmp_path):
    for name, rows in cifar.items():
        (tmp_path / name).write_bytes(rows.tobytes())
    (tmp_path / "data_batch_3.bin").write_bytes(b"short")
    with pytest.raises(DataError, match=r"data_batch_3.bin has 5 bytes"):
        load_dataset("cifar10", root=tmp_path)
    (tmp_path / "train_32x32.mat").write_bytes(b"no matrix")
    with pytest.raises(DataError, match=r"train_32x32.mat: cannot be read"):
        load_dataset("svhn", root=tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "cifar-10-binary.tar.gz").write_bytes(tarball({"data_batch_1.bin": b""}))
    with pytest.raises(DataError, match=r"data_batch_2.bin is not in it"):
        load_dataset("cifar10", root=other)
    (other / "cifar-10-binary.tar.gz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"cannot be read as .tar.gz"):
        load_dataset("cifar10", root=other)
