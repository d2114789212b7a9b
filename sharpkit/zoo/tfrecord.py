"""Dataset shards: TFRecord files of `tf.train.Example`, read and written without TensorFlow.

A record is an 8-byte little-endian length, the masked crc32c of those bytes, the payload and its
masked crc32c. Both checksums are always verified. The payload is an Example with two bytes
features, `inputs` and `output`, each a serialized TensorProto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharpkit.errors import DataError, ZooFormatError
from sharpkit.files import MAX_BYTES, atomic_path, read_regular
from sharpkit.zoo.protos import message_class

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
_MAX_ENTRIES = 2**28  # of one tensor
_FREE_BYTES = 2**28  # a shard may always decode to this much,
_MAX_EXPANSION = (
    100  # and else to so many times its size (constant tensors are stored as one value)
)


def read_records(path: str | Path) -> Iterator[bytes]:
    """The payloads of a TFRecord file in order, each with both checksums verified.

    Args:
        path: The file.

    Yields:
        bytes: One payload.

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
    content = _read_file(path)
    offset, index = 0, 0
    while offset < len(content):
        where = f"{path}: record {index} at byte {offset}"
        header = content[offset : offset + 12]
        if len(header) < 12:
            raise ZooFormatError(f"{where} is truncated: {len(header)} of 12 header bytes")
        length, length_crc = struct.unpack("<QI", header)
        if _masked_crc(header[:8]) != length_crc:
            raise ZooFormatError(f"{where} is corrupt: the checksum of its length is wrong")
        end = offset + 12 + length
        if end + 4 > len(content):
            raise ZooFormatError(
                f"{where} is truncated: it declares {length} bytes, "
                f"the file has {max(len(content) - offset - 16, 0)} left"
            )
        payload = content[offset + 12 : end]
        if _masked_crc(payload) != struct.unpack_from("<I", content, end)[0]:
            raise ZooFormatError(f"{where} is corrupt: the checksum of its content is wrong")
        yield payload
        offset, index = end + 4, index + 1


def write_records(path: str | Path, payloads: Iterable[bytes]) -> None:
    """Write a TFRecord file, replaced in one step.

    Args:
        path: The file.
        payloads: The records.
    """
    with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
        for payload in payloads:
            length = struct.pack("<Q", len(payload))
            file.write(length + struct.pack("<I", _masked_crc(length)))
            file.write(payload)
            file.write(struct.pack("<I", _masked_crc(payload)))


def read_shards(paths: Iterable[str | Path]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """All examples of some shards as arrays, in the order of the shards given.

    Args:
        paths: TFRecord files.

    Returns:
        tuple: Inputs (n, *shape as stored, such as h, w, c) float32; labels (n,) int64.

    Raises:
        ZooFormatError: A shard is corrupt, examples differ in shape, an input is NaN or infinite,
            or a label is not a non-negative integer; names the file and the record.
    """
    files = [Path(path) for path in paths]
    count = sum(map(_count_records, files))
    stored = sum(path.stat().st_size for path in files if path.is_file())
    inputs, labels = np.empty((0,), np.float32), np.empty(count, np.int64)
    filled = 0
    for path in files:
        start = filled
        for index, record in enumerate(read_records(path)):
            where = f"{path}: record {index}"
            example = _parse("Example", record, where)
            x = _tensor(example, "inputs", where)
            if filled == 0:
                inputs = _allocate(count, x.shape, stored, where)
            if x.shape != inputs.shape[1:]:
                raise ZooFormatError(
                    f"{where} has inputs of shape {x.shape}, others have {inputs.shape[1:]}"
                )
            inputs[filled] = x
            labels[filled] = _label(_tensor(example, "output", where), where)
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
        labels.size and not 0 <= labels.min() <= labels.max() < 2**31
    ):
        raise DataError(f"{path}: labels must be non-negative integers, got {labels.dtype}")
    if not np.isfinite(inputs).all():
        raise DataError(f"{path}: inputs have NaN or infinite entries")
    write_records(path, (_encode(x, y) for x, y in zip(inputs, labels.astype("<i4"), strict=True)))


# --- decoding --------------------------------------------------------------------------------


def _read_file(path: Path) -> bytes:
    try:
        return read_regular(path)
    except FileNotFoundError:
        raise ZooFormatError(f"{path}: shard is missing") from None
    except OSError as error:
        raise ZooFormatError(f"{path}: cannot be read ({error.strerror or error})") from error


def _masked_crc(data: bytes) -> int:
    """TFRecord's rotated and shifted crc32c, so that checksums of checksums stay useful."""
    import google_crc32c

    crc = int(google_crc32c.value(data))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _parse(name: str, data: bytes, where: str) -> Any:
    from google.protobuf.message import DecodeError

    message = message_class(name)()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise ZooFormatError(f"{where} is not a tf.train.Example ({error})") from error
    return message


def _tensor(example: Any, key: str, where: str) -> NDArray[Any]:
    """The tensor that a bytes feature holds, as a view of its bytes where possible."""
    features = example.features.feature
    values: Any = features[key].bytes_list.value if key in features else ()
    if len(values) != 1:
        found = ", ".join(sorted(features)) or "none"
        raise ZooFormatError(
            f"{where} needs one bytes value in feature {key!r}, has {len(values)} "
            f"(features: {found})"
        )
    proto = _parse("Tensor", values[0], where)
    where = f"{where}: tensor {key!r}"
    if proto.dtype not in _DTYPES:
        raise ZooFormatError(f"{where} has TensorFlow dtype number {proto.dtype}; not supported")
    dtype, values_field = _DTYPES[proto.dtype]
    shape = tuple(dim.size for dim in proto.tensor_shape.dim)
    size = _product(shape)
    if proto.tensor_shape.unknown_rank or min(shape, default=1) < 1:
        raise ZooFormatError(f"{where} has shape {shape}; expected positive sizes")
    if size > _MAX_ENTRIES or len(shape) > 8:
        raise ZooFormatError(f"{where} has shape {shape}; too large for one example")
    if proto.tensor_content:
        content = proto.tensor_content
        if len(content) != size * np.dtype(dtype).itemsize:
            raise ZooFormatError(f"{where} of shape {shape} has {len(content)} bytes of content")
        return np.frombuffer(content, dtype).reshape(shape)
    return _typed_values(getattr(proto, values_field), dtype, shape, size, where)


def _typed_values(
    values: Any, dtype: str, shape: tuple[int, ...], size: int, where: str
) -> NDArray[Any]:
    """A tensor from its typed field; as in TensorFlow, the last value fills up, or 0 if none is."""
    if len(values) > size:
        raise ZooFormatError(f"{where} of shape {shape} has {len(values)} values")
    if dtype == "<f2":  # half precision comes as bit patterns
        array = np.array(values, dtype="<u2").view("<f2")
    else:
        array = np.array(values).astype(dtype)
    if len(array) <= 1:
        constant = array[0] if len(array) else np.zeros((), dtype)
        return np.broadcast_to(constant, shape)
    if size > _MAX_EXPANSION * len(array) + 2**20:
        raise ZooFormatError(f"{where} of shape {shape} has only {len(array)} values")
    return np.concatenate([array, np.repeat(array[-1:], size - len(array))]).reshape(shape)


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _label(tensor: NDArray[Any], where: str) -> int:
    if tensor.size != 1 or tensor.dtype.kind not in "iu":
        raise ZooFormatError(
            f"{where} has a label of dtype {tensor.dtype} and shape {tensor.shape}; "
            "expected one integer"
        )
    label = int(tensor.item())
    if label < 0:
        raise ZooFormatError(f"{where} has the label {label}; labels are non-negative")
    return label


def _count_records(path: Path) -> int:
    """How many records the lengths of a file declare, up to the first that does not fit."""
    count, offset, size = 0, 0, path.stat().st_size if path.is_file() else 0
    if 0 < size <= MAX_BYTES:
        with path.open("rb") as file:
            while offset + 16 <= size:
                file.seek(offset)
                length = int.from_bytes(file.read(8), "little")
                if not length:  # no example is empty, but a hole in a file is billions of these
                    return count + 1
                offset += 16 + length
                count += offset <= size
    return count


def _allocate(count: int, shape: tuple[int, ...], stored: int, where: str) -> NDArray[np.float32]:
    """Room for all examples, unless that is far more than the files can stand for."""
    if not shape:
        raise ZooFormatError(f"{where} has a scalar as inputs; expected at least one axis")
    wanted = 4 * count * _product(shape)
    if wanted > _FREE_BYTES + _MAX_EXPANSION * stored:
        raise ZooFormatError(
            f"{where} declares inputs of shape {shape}: {count} of them take {wanted:,} bytes, "
            f"but the files hold {stored:,}"
        )
    return np.empty((count, *shape), dtype=np.float32)


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
