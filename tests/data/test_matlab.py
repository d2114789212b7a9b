"""The reader of .mat files against scipy's, on files that scipy writes and on big-endian ones."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from scipy.io import loadmat, savemat
from scipy.sparse import eye_array

from sharpkit.data.matlab import read_matlab
from sharpkit.errors import DataError

TYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")
SHAPES = ((), (1,), (5,), (3, 4), (32, 32, 3, 7), (0, 3), (2, 1, 1, 4))


def same(found, expected):
    return found.dtype == expected.dtype and np.array_equal(found, expected)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", TYPES)
def test_numbers_are_those_that_scipy_reads(tmp_path, kind, packed):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.mat"
    for shape in SHAPES:
        array = rng.integers(-100, 100, shape).astype(kind)
        savemat(path, {"other": 1, "X": array, "y": array.T}, do_compression=packed)
        found, expected = read_matlab(path, ["X", "y", "z"], DataError), loadmat(path)
        assert set(found) == {"X", "y"}
        assert all(same(found[name], expected[name]) for name in found)


def test_what_is_no_array_of_numbers_is_passed_over_or_refused(tmp_path):
    path = tmp_path / "a.mat"
    others = {
        "text": "abc", "cell": np.array([1, "a"], object), "struct": {"a": 1, "b": {"c": 2}},
        "complex": np.array([1j]), "sparse": eye_array(3).tocsc(),
    }  # fmt: skip
    savemat(path, {**others, "y": np.arange(3)})
    assert same(read_matlab(path, ["y"], DataError)["y"], loadmat(path)["y"])
    for name in others:
        with pytest.raises(DataError, match=rf"a.mat, {name}: expected a matrix of real numbers"):
            read_matlab(path, [name], DataError)


@pytest.mark.parametrize("order", ["<", ">"])
def test_both_byte_orders_and_small_stored_types(tmp_path, order):
    """Doubles 1, 2, 300 stored as uint16, as MATLAB does."""
    values = np.array([1, 2, 300], f"{order}u2").tobytes().ljust(8, b"\0")
    matrix = (
        struct.pack(f"{order}IIBBBBI", 6, 8, *((6, 0, 0, 0) if order == "<" else (0, 0, 0, 6)), 0)
        + struct.pack(f"{order}IIii", 5, 8, 1, 3)
        + (struct.pack("<HH", 1, 1) if order == "<" else struct.pack(">HH", 1, 1))
        + b"y\0\0\0"
        + struct.pack(f"{order}II", 4, 6)
        + values
    )
    mark = b"\x00\x01IM" if order == "<" else b"\x01\x00MI"
    path = tmp_path / "a.mat"
    path.write_bytes(
        b"MATLAB 5.0 MAT-file".ljust(124)
        + mark
        + struct.pack(f"{order}II", 14, len(matrix))
        + matrix
    )
    found = read_matlab(path, ["y"], DataError)["y"]
    assert same(found, np.array([[1.0, 2.0, 300.0]]))
    assert np.array_equal(found, loadmat(path)["y"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its header is not that of MATLAB"),
        (bytes(128), "its header is not that of MATLAB"),
        (bytes(124) + b"\x00\x01IM" + struct.pack("<II", 14, 2**30), "goes beyond the end"),
        (bytes(124) + b"\x00\x01IM" + struct.pack("<II", 15, 2) + b"xx", "incorrect header check"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, content, message):
    (tmp_path / "a.mat").write_bytes(content)
    with pytest.raises(DataError, match=rf"a.mat: cannot be read.*{message}"):
        read_matlab(tmp_path / "a.mat", ["X"], DataError)


def test_a_flipped_bit_of_compressed_data_changes_no_value(tmp_path):
    path = tmp_path / "a.mat"
    array = np.random.default_rng(0).integers(0, 256, (50, 50))
    savemat(path, {"X": array}, do_compression=True)
    content = path.read_bytes()
    refused = 0
    for at in range(150, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:  # another way to write the same bytes is no damage
            assert np.array_equal(read_matlab(path, ["X"], DataError)["X"], array)
        except DataError:
            refused += 1
    assert refused > 600
