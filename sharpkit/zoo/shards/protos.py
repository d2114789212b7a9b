"""The two protocol buffer messages of a dataset shard, described here instead of in .proto files.

Field numbers are those of TensorFlow's public `example.proto`, `feature.proto`, `tensor.proto` and
`tensor_shape.proto`; only the fields that a shard can use are declared, others are skipped.
"""

from __future__ import annotations

from functools import cache
from typing import Any

# (name, number, kind) or (name, number, kind, message type); "*" marks a repeated field
_MESSAGES: dict[str, list[tuple[str, ...]]] = {
    "BytesList": [("value*", "1", "bytes")],
    "Feature": [("bytes_list", "1", "message", "BytesList")],
    "Features": [("feature*", "1", "message", "Features.FeatureEntry")],
    "Example": [("features", "1", "message", "Features")],
    "Dim": [("size", "1", "int64")],
    "TensorShape": [("dim*", "2", "message", "Dim"), ("unknown_rank", "3", "bool")],
    "Tensor": [
        ("dtype", "1", "int32"),
        ("tensor_shape", "2", "message", "TensorShape"),
        ("tensor_content", "4", "bytes"),
        ("float_val*", "5", "float"),
        ("double_val*", "6", "double"),
        ("int_val*", "7", "int32"),
        ("int64_val*", "10", "int64"),
        ("bool_val*", "11", "bool"),
        ("half_val*", "13", "int32"),
        ("uint32_val*", "16", "uint32"),
        ("uint64_val*", "17", "uint64"),
    ],
}


@cache
def message_class(name: str) -> Any:
    """The message class `Example` or `Tensor`, for the installed protobuf runtime."""
    from google.protobuf import message_factory

    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"sharpkit.{name}"))


@cache
def _pool() -> Any:
    """A descriptor pool of our own, so that an imported TensorFlow is no conflict."""
    from google.protobuf import descriptor_pb2, descriptor_pool

    file = descriptor_pb2.FileDescriptorProto(
        name="sharpkit/tensors.proto", package="sharpkit", syntax="proto3"
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields:
            _add_field(message, *field)
        if name == "Features":  # a map is a repeated message of key and value
            entry = message.nested_type.add(name="FeatureEntry")
            entry.options.map_entry = True
            _add_field(entry, "key", "1", "string")
            _add_field(entry, "value", "2", "message", "Feature")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


def _add_field(message: Any, name: str, number: str, kind: str, of: str = "") -> None:
    field = message.field.add(name=name.rstrip("*"), number=int(number))
    field.label = field.LABEL_REPEATED if name.endswith("*") else field.LABEL_OPTIONAL
    field.type = getattr(field, f"TYPE_{kind.upper()}")
    if of:
        field.type_name = f".sharpkit.{of}"
