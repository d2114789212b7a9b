"""Shards: what TensorFlow wrote reads right, and any damage is found and named."""

import struct

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from sharpkit.errors import DataError, ZooFormatError
from sharpkit.zoo.shards.protos import message_class
from sharpkit.zoo.shards.tfrecord import read_records, read_shards, write_records, write_shard


def shape_of(dims):
    proto = message_class("TensorShape")()
    for size in dims:
        proto.dim.add(size=size)
    return proto


def tensor(dtype, dims, **values):
    return message_class("Tensor")(dtype=dtype, tensor_shape=shape_of(dims), **values)


def example(inputs=None, output=None, **others):
    message = message_class("Example")()
    inputs = tensor(1, (2,), float_val=[1, 2]) if inputs is None else inputs
    output = tensor(3, (), int_val=[1]) if output is None else output
    for key, proto in {"inputs": inputs, "output": output, **others}.items():
        if proto != "absent":
            data = proto.SerializeToString()
            message.features.feature[key].bytes_list.value.append(data)
    return message.SerializeToString()


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "shard_0.tfrecord"
    write_shard(path, np.arange(24, dtype=np.float32).reshape(3, 2, 2, 2), np.array([2, 0, 1]))
    return path


def test_a_shard_written_by_tensorflow_reads_as_tensorflow_reads_it(tmp_path, reference):
    path = tmp_path / "shard_0.tfrecord"
    path.write_bytes(reference["shard"].tobytes())
    inputs, labels = read_shards([path])
    np.testing.assert_array_equal(inputs, reference["shard/inputs"])
    np.testing.assert_array_equal(labels, reference["shard/labels"])


def test_what_is_written_reads_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 2**32, (4, 3, 2), dtype=np.uint32).view(np.float32)
    inputs[~np.isfinite(inputs)] = 1e-42  # denormals included
    write_shard(tmp_path / "a", inputs, np.array([0, 2**31 - 1, 5, 0], np.uint32))
    back, labels = read_shards([tmp_path / "a"])
    np.testing.assert_array_equal(back.view(np.uint32), inputs.view(np.uint32))
    assert labels.tolist() == [0, 2**31 - 1, 5, 0] and labels.dtype == np.int64


@settings(deadline=None)
@given(payloads=st.lists(st.binary(max_size=50), max_size=5))
def test_any_payloads_survive_the_framing(tmp_path_factory, payloads):
    path = tmp_path_factory.mktemp("records") / "a"
    write_records(path, payloads)
    assert list(read_records(path)) == payloads


def test_every_flipped_bit_is_found(shard):
    good = shard.read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        shard.write_bytes(bad)
        with pytest.raises(ZooFormatError, match=r"corrupt|truncated") as caught:
            read_shards([shard])
        assert str(shard) in str(caught.value)


def test_every_truncation_inside_a_record_is_found(shard):
    good = shard.read_bytes()
    record = len(good) // 3
    for keep in range(1, len(good)):
        shard.write_bytes(good[:keep])
        if keep % record:
            with pytest.raises(ZooFormatError, match="truncated"):
                read_shards([shard])


def test_an_absurd_length_is_refused_before_memory_is_taken(tmp_path):
    length = struct.pack("<Q", 2**62)
    crc = google_crc32c.value(length)
    masked = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    path = tmp_path / "a"
    path.write_bytes(length + struct.pack("<I", masked) + bytes(100))
    with pytest.raises(ZooFormatError, match="record 0 at byte 0 is truncated: it declares 46116"):
        read_shards([path])


BIG = (30_000, 30_000, 3)

BAD_RECORDS = {
    "expected a tf.train.Example": b"\xff\xff\xff",
    "feature 'inputs', has 0": example(inputs="absent", other=tensor(1, ())),
    "feature 'output', has 0": example(output="absent"),
    "dtype number 7": example(inputs=tensor(7, (2,))),
    "has 7 bytes of content": example(inputs=tensor(1, (2,), tensor_content=b"1234567")),
    "has 3 values": example(inputs=tensor(1, (2,), float_val=[1, 2, 3])),
    "has shape .*too large": example(inputs=tensor(1, BIG, float_val=[1])),
    "expected positive sizes": example(inputs=tensor(1, (2, -1), float_val=[1])),
    "has only 2 values": example(inputs=tensor(1, (5000, 5000), float_val=[1, 2])),
    "declares inputs of shape": example(inputs=tensor(1, (10_000, 10_000), float_val=[1])),
    "scalar as inputs": example(inputs=tensor(1, (), float_val=[1])),
    "has the label -1": example(output=tensor(3, (), int_val=[-1])),
    "label of dtype float32": example(output=tensor(1, (), float_val=[1])),
    r"label of dtype int32 and shape \(2,\)": example(output=tensor(3, (2,), int_val=[1])),
    "NaN or infinite inputs": example(inputs=tensor(1, (2,), float_val=[1, np.inf])),
}


@pytest.mark.parametrize("message", BAD_RECORDS)
def test_a_record_that_is_not_an_example_is_named(tmp_path, message):
    path = tmp_path / "a"
    write_records(path, [BAD_RECORDS[message]])
    with pytest.raises(ZooFormatError, match=message) as caught:
        read_shards([path])
    assert f"{path}: record 0" in str(caught.value)


def test_examples_of_different_shapes_are_refused(tmp_path):
    other = example(inputs=tensor(1, (3,), float_val=[1]))
    write_records(tmp_path / "a", [example(), other])
    with pytest.raises(ZooFormatError, match=r"record 1 has inputs of shape \(3,\)"):
        read_shards([tmp_path / "a"])


TYPES = {
    1: {"float_val": [0.5, 2]},
    2: {"double_val": [0.5, 2]},
    3: {"int_val": [3, -4]},
    4: {"int_val": [3, 255]},
    5: {"int_val": [3, -4]},
    9: {"int64_val": [3, 2**20]},
    10: {"bool_val": [True, False]},
    19: {"half_val": [0x3C00, 0xC000]},  # 1, -2
    22: {"uint32_val": [3, 4]},
}


@pytest.mark.parametrize("dtype", TYPES)
def test_typed_fields_of_every_dtype_are_read(tmp_path, dtype):
    write_records(tmp_path / "a", [example(inputs=tensor(dtype, (2,), **TYPES[dtype]))])
    inputs, _ = read_shards([tmp_path / "a"])
    values = [1, -2] if dtype == 19 else list(*TYPES[dtype].values())
    np.testing.assert_array_equal(inputs, [values])


def test_the_last_typed_value_fills_the_tensor(tmp_path):
    values = [[1], [1, 2], []]
    records = [example(inputs=tensor(1, (4,), float_val=v)) for v in values]
    write_records(tmp_path / "a", records)
    inputs, _ = read_shards([tmp_path / "a"])
    np.testing.assert_array_equal(inputs, [[1, 1, 1, 1], [1, 2, 2, 2], [0, 0, 0, 0]])


def test_an_empty_shard_is_refused(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(ZooFormatError, match="no example found"):
        read_shards([tmp_path / "a"])


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(ZooFormatError, match="file is missing"):
        read_shards([tmp_path / "a"])


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (np.ones((2, 3), "f4"), np.array([0]), "do not go with"),
        (np.ones((1, 3), "f4"), np.array([-1]), "non-negative"),
        (np.ones((1, 3), "f4"), np.array([0.0]), "non-negative integers"),
        (np.full((1, 3), np.nan, "f4"), np.array([0]), "NaN or infinite"),
        (np.ones((1, 3), "c8"), np.array([0]), "cannot be stored"),
    ],
)
def test_what_cannot_be_read_back_is_not_written(tmp_path, inputs, labels, message):
    with pytest.raises(DataError, match=message):
        write_shard(tmp_path / "a", inputs, labels)
    assert list(tmp_path.iterdir()) == []
