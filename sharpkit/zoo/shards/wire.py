"""A look at the bytes of a protocol buffer message before protobuf takes memory for its fields.

An empty field takes two bytes in the file and a hundred in memory, so 32 MiB could become 1.6 GiB.
"""

from __future__ import annotations

from typing import Any

from sharpkit.errors import ZooFormatError

_HARMLESS = 2**16  # bytes of a message that may have any number of fields
_MAX_FIELDS = 10_000
_MAX_NUMBERS = 2**20  # of those that are not written as one string of bytes


def check_message(descriptor: Any, data: bytes, where: str) -> None:
    """Refuse a message with more fields or single numbers than an example of a zoo can have.

    Damage is left to protobuf, which reports it.

    Source:
        Protocol buffers' encoding: tags, varints and lengths.

    Example:
        >>> from sharpkit.zoo.shards.protos import message_class
        >>> check_message(message_class("Example").DESCRIPTOR, b"\\n\\0" * 50_000, "a.tfrecord")
        Traceback (most recent call last):
        sharpkit.errors.ZooFormatError: a.tfrecord has more than 10,000 fields
    """
    if len(data) <= _HARMLESS:
        return
    todo, fields, numbers = [(descriptor, memoryview(data))], 0, 0
    while todo:
        message, view = todo.pop()
        at, end = 0, len(view)
        while at < end:
            tag, at = _varint(view, at)
            number, wire_type = tag >> 3, tag & 7
            fields += 1
            if wire_type == 0:
                at = _varint(view, at)[1]
            elif wire_type in (1, 5):
                at += 8 if wire_type == 1 else 4
            elif wire_type == 2:
                length, at = _varint(view, at)
                field = message.fields_by_number.get(number)
                if field is not None and field.message_type is not None:
                    todo.append((field.message_type, view[at : at + length]))
                elif field is not None and field.type not in (field.TYPE_BYTES, field.TYPE_STRING):
                    numbers += _count(field, view[at : at + length])
                at += length
            else:
                raise ZooFormatError(f"{where} has a field of wire type {wire_type}")
            if fields > _MAX_FIELDS:
                raise ZooFormatError(f"{where} has more than {_MAX_FIELDS:,} fields")
            if numbers > _MAX_NUMBERS:
                raise ZooFormatError(
                    f"{where} has {numbers:,} single numbers, at most {_MAX_NUMBERS:,} are read: "
                    "larger tensors are written as tensor_content"
                )


def _count(field: Any, packed: memoryview) -> int:
    """How many numbers a packed field can have."""
    smallest = {field.TYPE_FLOAT: 4, field.TYPE_DOUBLE: 8}
    return len(packed) // smallest.get(field.type, 1)


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """A number and where it ends; 0 at the end of the bytes."""
    value = shift = 0
    while at < len(view):
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80 or shift >= 70:  # ten bytes at most
            break
    return value, at
