"""Dataset shards: TFRecord files of `tf.train.Example`, read and written without TensorFlow.

A record is an 8-byte little-endian length, the masked crc32c of those bytes, the payload and its
masked crc32c. Both checksums are always verified. The payload is an Example with two bytes
features, `inputs` and `output`, each a serialized TensorProto.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sharpkit.doors import MAX_RECORD_BYTES, allowed_expansion, reading, shown
from sharpkit.errors import DataError, ZooFormatError
from sharpkit.files import atomic_path, open_regular
from sharpkit.zoo.shards.protos import message_class
from sharpkit.zoo.shards.wire import check_message

# TensorFlow's DataType numbers -> numpy dtype and the TensorProto field with its typed values
_DTYPES: dict[int, tuple[str, str]] = {
    1: ("<f4", "float_val"),
    2: ("<f8", "double_val"),
    3: ("<i4", "int_val"),
    4: ("u1", "int_val"),
    5: ("<i2", "int_val"),
    6: ("i1", "int_val"),
    9: ("<i8", "int64_val"),
    10: ("?", "bool_val"),
    17: ("<u2", "int_val"),
    19: ("<f2", "half_val"),
    22: ("<u4", "uint32_val"),
    23: ("<u8", "uint64_val"),
}
_NUMBERS = {np.dtype(name): number for number, (name, _) in _DTYPES.items()}
_MAX_AXES = 8
_MAX_LABEL = 2**31 - 1
_SHORTEST = 32  # bytes; an example is longer


def read_records(path: str | Path) -> Iterator[bytes]:
    """The payloads of a TFRecord file in order, each with both checksums verified.

    Raises:
        ZooFormatError: The file is missing, truncated or corrupt; names the record and its offset.

    Source:
        The framing described in TensorFlow's `record_writer.h`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_records(Path(folder, "a.tfrecord"), [b"one", b"two"])
        ...     list(read_records(Path(folder, "a.tfrecord")))
        [b'one', b'two']
    """
    path = Path(path)
    with reading(path, ZooFormatError, "a TFRecord file"), open_regular(path) as file:
        size, offset, index = os.fstat(file.fileno()).st_size, 0, 0
        while offset < size:
            where = f"{path}: record {index} at byte {offset}"
            payload = _read_record(file, size - offset, where)
            yield payload
            offset, index = offset + 16 + len(payload), index + 1


def write_records(path: str | Path, payloads: Iterable[bytes]) -> None:
    """Write a TFRecord file, replaced in one step."""
    with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
        for payload in payloads:
            length = struct.pack("<Q", len(payload))
            file.write(length + struct.pack("<I", _masked_crc(length)))
            file.write(payload)
            file.write(struct.pack("<I", _masked_crc(payload)))


def read_shards(paths: Iterable[str | Path]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """All examples of some shards as arrays, in the order of the shards given.

    Returns:
        tuple: Inputs (n, *shape as stored, such as h, w, c) float32; labels (n,) int64.

    Raises:
        ZooFormatError: A shard is corrupt, examples differ in shape, an input is NaN or infinite,
            or a label is no integer from 0 to 2³¹ − 1; names the file and the record.
    """
    files = [Path(path) for path in paths]
    inputs, labels = np.empty((0,), np.float32), np.empty(0, np.int64)
    filled = 0
    for path in files:
        start = filled
        for index, record in enumerate(read_records(path)):
            where = f"{path}: record {index}"
            with reading(where, ZooFormatError, "a tf.train.Example"):
                x, label = _decode(record, where)
                if filled == 0:
                    inputs, labels = _allocate(files, x.shape, where)
                if x.shape != inputs.shape[1:]:
                    raise ZooFormatError(
                        f"{where} has inputs of shape {x.shape}, others have {inputs.shape[1:]}"
                    )
                with np.errstate(over="ignore"):  # what float32 does not hold is told below
                    inputs[filled] = x
                labels[filled] = label
            filled += 1
        _check_finite(inputs[start:filled], path)
    if filled == 0:
        raise ZooFormatError(f"{', '.join(map(str, files)) or 'no shard'}: no example found")
    return inputs, labels


def write_shard(path: str | Path, inputs: NDArray[Any], labels: NDArray[Any]) -> None:
    """Write examples as one shard.

    Args:
        path: The file.
        inputs: (n, ...) in the layout to store (h, w, c for images); float32 for a PGDL zoo.
        labels: (n,) non-negative integers.

    Raises:
        DataError: Lengths differ, inputs are not finite, or labels are not class indices.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     shard = Path(folder, "shard_0.tfrecord")
        ...     write_shard(shard, np.ones((2, 4), np.float32), np.array([0, 1]))
        ...     inputs, labels = read_shards([shard])
        >>> inputs.shape, labels
        ((2, 4), array([0, 1]))
    """
    if len(inputs) != len(labels) or labels.ndim != 1:
        raise DataError(f"{path}: {inputs.shape} inputs do not go with {labels.shape} labels")
    if labels.dtype.kind not in "iu" or (
        labels.size and not 0 <= labels.min() <= labels.max() <= _MAX_LABEL
    ):
        raise DataError(f"{path}: labels must be non-negative integers, got {labels.dtype}")
    if not np.isfinite(inputs).all():
        raise DataError(f"{path}: inputs have NaN or infinite entries")
    write_records(path, (_encode(x, y) for x, y in zip(inputs, labels.astype("<i4"), strict=True)))


def shard_bytes(count: int, shape: tuple[int, ...]) -> int:
    """How long a file `write_shard` makes of so many float32 examples.

    Args:
        count: Examples.
        shape: Of one, in the layout to store.

    Example:
        >>> shard_bytes(2, (4,))
        168
    """
    payload = _encode(np.zeros(shape, np.float32), np.asarray(0, "<i4"))
    return count * (16 + len(payload))


# --- decoding --------------------------------------------------------------------------------


def _read_record(file: BinaryIO, left: int, where: str) -> bytes:
    """The next payload of a file of which so many bytes are left."""
    header = file.read(12)
    if len(header) < 12:
        raise ZooFormatError(f"{where} is truncated: {len(header)} of 12 header bytes")
    length, length_crc = struct.unpack("<QI", header)
    if _masked_crc(header[:8]) != length_crc:
        raise ZooFormatError(f"{where} is corrupt: the checksum of its length is wrong")
    if 16 + length > left:
        raise ZooFormatError(
            f"{where} is truncated: it declares {length} bytes, "
            f"the file has {max(left - 16, 0)} left"
        )
    if length > MAX_RECORD_BYTES:
        raise ZooFormatError(
            f"{where} has {length:,} bytes; at most {MAX_RECORD_BYTES:,} are read as one example"
        )
    payload = file.read(length)
    if struct.pack("<I", _masked_crc(payload)) != file.read(4):
        raise ZooFormatError(f"{where} is corrupt: the checksum of its content is wrong")
    return payload


def _masked_crc(data: bytes) -> int:
    """TFRecord's rotated and shifted crc32c, so that checksums of checksums stay useful."""
    import google_crc32c

    crc = int(google_crc32c.value(data))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _decode(record: bytes, where: str) -> tuple[NDArray[Any], int]:
    """Inputs and label of one Example."""
    example = _parse("Example", record, where)
    return _tensor(example, "inputs", where), _label(_tensor(example, "output", where), where)


def _parse(name: str, data: bytes, where: str) -> Any:
    message = message_class(name)()
    check_message(message.DESCRIPTOR, data, where)
    message.ParseFromString(data)
    return message


def _tensor(example: Any, key: str, where: str) -> NDArray[Any]:
    """The tensor that a bytes feature holds, as a view of its bytes where possible."""
    features = example.features.feature
    values: Any = features[key].bytes_list.value if key in features else ()
    if len(values) != 1:
        found = shown(", ".join(sorted(features)))[1:-1] or "none"
        raise ZooFormatError(
            f"{where} needs one bytes value in feature {key!r}, has {len(values)} "
            f"(features: {found})"
        )
    where = f"{where}: tensor {key!r}"
    proto = _parse("Tensor", values[0], where)
    if proto.dtype not in _DTYPES:
        raise ZooFormatError(f"{where} has TensorFlow dtype number {proto.dtype}; not supported")
    dtype, values_field = _DTYPES[proto.dtype]
    shape = tuple(dim.size for dim in proto.tensor_shape.dim)
    if proto.tensor_shape.unknown_rank or min(shape, default=1) < 1:
        raise ZooFormatError(f"{where} has shape {shown(shape)}; expected positive sizes")
    if len(shape) > _MAX_AXES or 4 * math.prod(shape) > allowed_expansion(MAX_RECORD_BYTES):
        raise ZooFormatError(f"{where} has shape {shown(shape)}; too large for one example")
    if content := proto.tensor_content:
        if len(content) != math.prod(shape) * np.dtype(dtype).itemsize:
            raise ZooFormatError(f"{where} of shape {shape} has {len(content)} bytes of content")
        return np.frombuffer(content, dtype).reshape(shape)
    return _typed_values(getattr(proto, values_field), dtype, shape, where)


def _typed_values(values: Any, dtype: str, shape: tuple[int, ...], where: str) -> NDArray[Any]:
    """A tensor from its typed field; as in TensorFlow, the last value fills up, or 0 if none is."""
    size = math.prod(shape)
    if len(values) > size:
        raise ZooFormatError(f"{where} of shape {shape} has {len(values)} values")
    # half precision comes as bit patterns
    stored = np.array(values, dtype="<u2" if dtype == "<f2" else None)
    array = stored.view("<f2") if dtype == "<f2" else stored.astype(dtype)
    if np.dtype(dtype).kind in "iu" and not np.array_equal(array, stored):
        raise ZooFormatError(f"{where} has values outside the range of its type {dtype}")
    if len(array) <= 1:
        constant = array[0] if len(array) else np.zeros((), dtype)
        return np.broadcast_to(constant, shape)
    if size * array.itemsize > allowed_expansion(array.nbytes):
        raise ZooFormatError(f"{where} of shape {shape} has only {len(array)} values")
    filled = np.empty(size, dtype)
    filled[: len(array)], filled[len(array) :] = array, array[-1]
    return filled.reshape(shape)


def _label(tensor: NDArray[Any], where: str) -> int:
    if tensor.size != 1 or tensor.dtype.kind not in "iu":
        raise ZooFormatError(
            f"{where} has a label of dtype {tensor.dtype} and shape {tensor.shape}; "
            "expected one integer"
        )
    label = int(tensor.item())
    if not 0 <= label <= _MAX_LABEL:
        raise ZooFormatError(
            f"{where} has the label {label}; labels are non-negative, at most {_MAX_LABEL:,}"
        )
    return label


def _count_records(path: Path) -> tuple[int, int]:
    """How many records the lengths in a file declare, up to the first bad one, and their bytes."""
    count, offset = 0, 0
    with reading(path, ZooFormatError, "a TFRecord file"), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        while offset + 16 <= size:
            file.seek(offset)
            length = int.from_bytes(file.read(8), "little")
            if length < _SHORTEST or offset + 16 + length > size:
                return count + 1, offset
            offset, count = offset + 16 + length, count + 1
    return count, offset


def _allocate(
    files: list[Path], shape: tuple[int, ...], where: str
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Room for all examples, unless that is far more than the files can stand for."""
    if not shape:
        raise ZooFormatError(f"{where} has a scalar as inputs; expected at least one axis")
    counted = [_count_records(path) for path in files]
    count, stored = (sum(part) for part in zip(*counted, strict=True))
    wanted = 4 * count * math.prod(shape)
    if wanted > allowed_expansion(stored):
        raise ZooFormatError(
            f"{where} declares inputs of shape {shape}: {count} of them take {wanted:,} bytes, "
            f"but the files hold {stored:,}"
        )
    return np.empty((count, *shape), np.float32), np.empty(count, np.int64)


def _check_finite(inputs: NDArray[np.float32], path: Path) -> None:
    """Name the first record of a shard that has a NaN or infinite entry."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(inputs.sum()):  # needs no temporary; may overflow, hence the second test
            return
    bad = np.flatnonzero(~np.isfinite(inputs.reshape(len(inputs), -1)).all(axis=1))
    if bad.size:
        raise ZooFormatError(f"{path}: record {bad[0]} has NaN or infinite inputs")


# --- encoding --------------------------------------------------------------------------------


def _encode(x: NDArray[Any], label: NDArray[Any]) -> bytes:
    """One serialized Example."""
    example = message_class("Example")()
    for key, array in (("inputs", x), ("output", label)):
        example.features.feature[key].bytes_list.value.append(_encode_tensor(np.asarray(array)))
    data: bytes = example.SerializeToString(deterministic=True)
    return data


def _encode_tensor(array: NDArray[Any]) -> bytes:
    """One serialized TensorProto with `tensor_content`."""
    dtype = array.dtype.newbyteorder("<")
    if dtype not in _NUMBERS:
        raise DataError(f"arrays of {array.dtype} cannot be stored in a shard")
    proto = message_class("Tensor")(dtype=_NUMBERS[dtype])
    proto.tensor_content = array.astype(dtype, copy=False).tobytes()
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    data: bytes = proto.SerializeToString(deterministic=True)
    return data
