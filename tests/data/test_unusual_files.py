"""Files that others write in other ways than the usual: read all the same, or refused by name."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from reader_files import pixels
from scipy.io import savemat

from sharpkit.data.images import read_image_tree
from sharpkit.data.npz import has_arrays, read_npz
from sharpkit.datasets import load_dataset
from sharpkit.errors import ArgumentError, DataError

# --- arrays -------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(24.0).reshape(2, 3, 4),
        np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
        np.arange(24, dtype=">i4").reshape(4, 6)[:, ::2],
        np.array(5.0),
        np.zeros((0, 3), "f2"),
        np.array(["a", "²"]),
        np.array([True, False]),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_are_those_that_numpy_reads(tmp_path, save, array):
    path = tmp_path / "a.npz"
    save(path, x=array, y=1)
    found = read_npz(path, ["x", "z"], DataError)
    with np.load(path) as expected:
        assert np.array_equal(found["x"], expected["x"])
        assert found["x"].dtype == expected["x"].dtype.newbyteorder("=")
    assert list(found) == ["x"]
    assert has_arrays(path, ["x", "y"], DataError)
    assert not has_arrays(path, ["x", "z"], DataError)


def test_headers_of_the_second_version_are_read(tmp_path):
    content = io.BytesIO()
    np.lib.format.write_array(content, np.arange(3), version=(2, 0))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", content.getvalue())
    assert read_npz(tmp_path / "a.npz", ["x"], DataError)["x"].tolist() == [0, 1, 2]


def test_other_compressions_of_archives_are_refused_by_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", b"x")
    with pytest.raises(DataError, match=r"a.npz: x.npy is compressed by method 14, expected"):
        read_npz(tmp_path / "a.npz", ["x"], DataError)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 2**64 - 1], np.uint64), "y_train has the label 18446744073709551615"),
        (np.array([0, 2**40]), "training label 1099511627776; classes are numbered from 0"),
    ],
)
def test_labels_that_number_no_classes(tmp_path, labels, message):
    x = np.zeros((2, 3))
    np.savez(tmp_path / "a.npz", x_train=x, x_test=x, y_train=labels, y_test=labels % 2)
    with pytest.raises(DataError, match=message):
        load_dataset(tmp_path / "a.npz")


@pytest.mark.parametrize("name", [5000 * "x", "~nobody-of-this-name/x", "~nobody-of-this-name:x"])
def test_names_that_can_be_no_path(name):
    with pytest.raises(ArgumentError, match=r"nobody|xxx"):
        load_dataset(name)


# --- images -------------------------------------------------------------------------------------


def write_images(path, content, suffix="png"):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("train/a/0", "train/a/1", "test/a/0"):
            archive.writestr(f"{name}.{suffix}", content)
    return path


def encoded(image, kind="png", **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def picture(mode):
    rgb = Image.fromarray(pixels(6, 5, 3))
    return rgb.quantize(8) if mode == "P" else rgb.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1"])
def test_pixels_of_png_do_not_depend_on_what_else_it_holds(tmp_path, mode):
    image, notes = picture(mode), PngInfo()
    notes.add_text("comment", 10_000 * "x", zip=True)
    notes.add_itxt("title", "²")
    more = {"pnginfo": notes, "icc_profile": bytes(3000), "dpi": (300, 300)}
    if mode == "P":
        more["transparency"] = 3
    read = read_image_tree(write_images(tmp_path / "a.zip", encoded(image, **more)))
    wanted = np.asarray(image.convert("L" if mode in ("1", "L") else "RGB"))
    wanted = wanted[None] if wanted.ndim == 2 else wanted.transpose(2, 0, 1)
    assert np.array_equal(read[0][0], np.stack([wanted, wanted]))


@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_are_those_that_pillow_reads(tmp_path, progressive):
    content = encoded(picture("RGB"), "jpeg", progressive=progressive, exif=b"Exif\0\0" + bytes(99))
    read = read_image_tree(write_images(tmp_path / "a.zip", content, "jpg"))
    with Image.open(io.BytesIO(content)) as image:
        assert np.array_equal(read[1][0][0], np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (encoded(Image.fromarray(pixels(4, 4).astype(np.uint16) * 200)), "pixels are no bytes"),
        (encoded(picture("RGB"), "gif"), "is not a readable image"),
        (encoded(picture("RGB"))[:-30], "is not a readable image"),
        (b"", "is not a readable image"),
    ],
)
def test_other_images_are_refused_by_name(tmp_path, content, message):
    with pytest.raises(DataError, match=rf"train/a/0.png .*{message}"):
        read_image_tree(write_images(tmp_path / "a.zip", content))


# --- the known sets -----------------------------------------------------------------------------


def write_cifar(path, label=3, form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w:gz", format=form) as tar:
        for name in (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = 3073
            member.pax_headers = {"comment": "²"}
            tar.addfile(member, io.BytesIO(bytes([label]) + pixels(3072).tobytes()))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_of_every_tar_program(tmp_path, form):
    path = tmp_path / "cifar-10-binary.tar.gz"
    write_cifar(path, form=form)
    # what a program notes of a file comes in a member of its own before it
    assert (b"PaxHeader" in gzip.decompress(path.read_bytes())) == (form == tarfile.PAX_FORMAT)
    assert load_dataset("cifar10", root=tmp_path)[0].tensors[1].tolist() == [3] * 5


def test_damage_at_the_end_of_an_archive_is_noticed(tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    write_cifar(path, form=tarfile.USTAR_FORMAT)
    content = path.read_bytes()
    path.write_bytes(content[:-6] + bytes([content[-6] ^ 1]) + content[-5:])
    with pytest.raises(DataError, match=r"cannot be read as .tar.gz.*CRC"):
        load_dataset("cifar10", root=tmp_path)
    path.write_bytes(gzip.compress(bytes([1]) * 512))
    with pytest.raises(DataError, match=r"cannot be read as .tar.gz"):
        load_dataset("cifar10", root=tmp_path)


def test_labels_that_the_known_sets_do_not_have(tmp_path):
    write_cifar(tmp_path / "cifar-10-binary.tar.gz", label=10, form=tarfile.USTAR_FORMAT)
    with pytest.raises(DataError, match="has the label 10; expected 0 to 9"):
        load_dataset("cifar10", root=tmp_path)
    for split in ("train", "test"):
        content = {"X": pixels(32, 32, 3, 2), "y": np.array([[1.5], [2.0]])}
        savemat(tmp_path / f"{split}_32x32.mat", content)
    with pytest.raises(DataError, match="y has labels other than the digits"):
        load_dataset("svhn", root=tmp_path)
