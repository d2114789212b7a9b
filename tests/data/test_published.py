"""Published images are found by their files and read as they are, not normalised."""

import gzip
import pickle
import struct

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from sharpkit.data import published
from sharpkit.data.published import images_in, known_place
from sharpkit.errors import DataError

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (5, 28, 28), dtype=np.uint8)
COLOUR = RANDOM.integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
LAST = COLOUR.transpose(0, 2, 3, 1)  # channels last
LABELS = np.array([3, 1, 9, 0, 2], np.uint8)


def idx(folder, packed=False):
    for split, count in (("train", 5), ("t10k", 2)):
        for kind, array in (("images-idx3", GREY[:count]), ("labels-idx1", LABELS[:count])):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            content = head + array.tobytes()
            name = f"{split}-{kind}-ubyte"
            (folder / (f"{name}.gz" if packed else name)).write_bytes(
                gzip.compress(content) if packed else content
            )


def cifar10(folder):
    rows = np.concatenate([LABELS[:, None], COLOUR.reshape(5, -1)], axis=1)
    for k in range(5):
        (folder / f"data_batch_{k + 1}.bin").write_bytes(rows[k : k + 1].tobytes())
    (folder / "test_batch.bin").write_bytes(rows[:2].tobytes())


def svhn(folder):
    for split, count in (("train", 5), ("test", 2)):
        labels = np.where(LABELS[:count] == 0, 10, LABELS[:count])  # as published
        pixels = COLOUR[:count].transpose(2, 3, 1, 0)
        savemat(folder / f"{split}_32x32.mat", {"X": pixels, "y": labels[:, None]})


def npz(folder, images=LAST, labels=LABELS):
    arrays = {"x_train": images, "x_test": images[:2], "y_train": labels, "y_test": labels[:2]}
    np.savez(folder / "any.npz", **arrays)


def tree(folder):
    for split, count in (("train", 5), ("test", 2)):
        for k in range(count):
            path = folder / split / f"class{LABELS[k]}" / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(COLOUR[k].transpose(1, 2, 0)).save(path)


@pytest.mark.parametrize("write", [idx, cifar10, svhn, npz, tree], ids=lambda w: w.__name__)
def test_every_form_is_found_and_read_as_it_is(tmp_path, write):
    assert images_in(tmp_path) is None
    write(tmp_path)
    found = pickle.loads(pickle.dumps(images_in(tmp_path)))  # as a worker gets it
    assert found.files and all(file.is_file() for file in found.files)
    (train, y_train), (test, y_test) = found.read()
    expected = GREY[:, None] if write is idx else COLOUR
    order, first = np.arange(5), np.arange(2)
    labels = LABELS.astype(np.int64)
    if write is tree:  # by class, which are numbered in alphabetical order
        order, first = np.argsort(LABELS), np.argsort(LABELS[:2])
        labels = np.searchsorted(np.sort(LABELS), LABELS)
    assert train.dtype == np.uint8 and y_train.dtype.kind in "iu"
    np.testing.assert_array_equal(train, expected[order])
    np.testing.assert_array_equal(test, expected[:2][first])
    assert (
        y_train.tolist() == labels[order].tolist() and y_test.tolist() == labels[:2][first].tolist()
    )


def test_packed_files_and_folders_within_are_found_too(tmp_path):
    idx(tmp_path, packed=True)
    assert images_in(tmp_path).files[0].name == "train-images-idx3-ubyte.gz"
    inner = tmp_path / "cifar" / "cifar-10-batches-bin"
    inner.mkdir(parents=True)
    cifar10(inner)
    assert images_in(tmp_path / "cifar").read()[0][0].shape == (5, 3, 32, 32)


def test_floats_are_taken_as_they_are(tmp_path):
    x = RANDOM.normal(size=(5, 1, 6, 7))
    npz(tmp_path, x)
    train, _ = images_in(tmp_path).read()
    assert train[0].dtype == np.float32
    np.testing.assert_allclose(train[0], x, rtol=1e-6)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (COLOUR.astype(np.int64), LABELS, "expected images of uint8, or of floats"),
        (RANDOM.normal(size=(5, 6)), LABELS, "expected images of uint8, or of floats"),
        (np.full((5, 1, 2, 2), np.nan), LABELS, "NaN or infinite"),
        (COLOUR, LABELS[:4], "an integer label for each image"),
        (COLOUR, LABELS / 2, "an integer label for each image"),
        (COLOUR, LABELS.astype(int) - 1, "labels from -1 to 8"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, images, labels, message):
    npz(tmp_path, images, labels)
    with pytest.raises(DataError, match=message):
        images_in(tmp_path).read()


def test_two_files_of_arrays_leave_a_doubt(tmp_path):
    npz(tmp_path)
    np.savez(tmp_path / "other.npz", x=1)
    with pytest.raises(DataError, match=r"has 2 .npz files; expected one"):
        images_in(tmp_path)


def test_data_sets_are_found_where_they_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARPKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(published, "FASHION_MNIST", tmp_path / "debian")
    names = ("fashion_mnist", "svhn", "cifar10", "mnist")
    assert [known_place(name) for name in names] == [None] * 4
    for folder, write in (("debian", idx), ("datasets", svhn)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder)
    assert known_place("fashion_mnist").files[0].parent == tmp_path / "debian"
    assert known_place("svhn").read()[1][1].tolist() == LABELS[:2].tolist()
    assert known_place("mnist") is None and known_place("cifar10") is None
