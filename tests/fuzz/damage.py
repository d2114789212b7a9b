"""How files are damaged: bytes at random, and parts of a format behind checksums that are right."""

from __future__ import annotations

import copy
import gzip
import io
import json
import random
import re
import sqlite3
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import google_crc32c

Rng = random.Random
ODD_VALUES = [None, True, -1, 0, 2**31, 2**63, 1e308, float("nan"), "", "x" * 1000, [], {}, [[]]]
ODD_VALUES += [[2**40, 2**40], 0.5, -(2**70), "relu", [1, 2, 3, 4], {"a": {"b": []}}, 10**400]
ODD_VALUES += ["\ud800", "²", "../x", "a:b", "=1+1", "\x1b[2J", 1e400, "NaN", "1e999", "\x00"]
_ODD_NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63]
_ODD_NUMBERS += [2**64 - 1]
_ODD_TOML = ["-1", "0", "1e400", "nan", '""', '"²"', "[]", "[[]]", "{}", "true", "1979-05-27"]
_ODD_TOML += ["9" * 400, '"os:system"', "[1, [2, [3]]]", '"\\u0000"', "0.5", '"x"', "2" * 18]
_ODD_NAMES = [
    "../x",
    "/x",
    "x\\y",
    "",
    "data.pkl",
    "x" * 5000,
    "train/0",
    "²",
    "a\nb",
    "train/0/y.png",
]


def bytes_at_random(rng: Rng, content: bytes, others: list[bytes]) -> bytes:
    """One to eight flips, truncations, splices and odd numbers."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        if not data:
            break
        at = rng.randrange(len(data))
        length = rng.choice([1, 2, 4, 8, 8, 16, 64, 512])
        kind = rng.choice(["flip", "flip", "number", "number", "splice", "cut", "truncate", "fill"])
        if kind == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "number":
            size = rng.choice([1, 2, 4, 8])
            number = rng.choice(_ODD_NUMBERS) & (256**size - 1)
            data[at : at + size] = number.to_bytes(size, rng.choice(["little", "big"]))
        elif kind == "splice":
            source = rng.choice(others)
            start = rng.randrange(max(1, len(source)))
            end = at + (length if rng.random() < 0.7 else 0)  # over what was there, or between
            data[at:end] = source[start : start + length]
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "fill":
            data[at : at + length] = bytes([rng.choice([0, 255])]) * length
        else:
            del data[at:]
    return bytes(data)


def json_values(rng: Rng, content: bytes, others: list[bytes]) -> bytes:
    """Values replaced, moved, removed or nested: right syntax, wrong meaning."""
    tree = json.loads(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        places = list(_places(tree))
        if not places:
            break
        parent, key = rng.choice(places)
        action = rng.choice(["replace", "replace", "move", "remove", "nest", "rename"])
        if action == "replace":
            parent[key] = copy.deepcopy(rng.choice(ODD_VALUES))
        elif action == "move":
            other, name = rng.choice(places)
            parent[key] = json.loads(json.dumps(other[name]))
        elif action == "nest":
            for _ in range(rng.choice([1, 50])):
                parent[key] = [parent[key]]
        elif action == "rename" and isinstance(parent, dict):
            parent[str(rng.choice(ODD_VALUES))] = parent.pop(key)
        else:
            del parent[key]
    text = json.dumps(tree)
    if rng.random() < 0.02:
        text = "[" * 100_000 + text
    return text.encode()


def toml_values(rng: Rng, content: bytes, others: list[bytes]) -> bytes:
    """A value or a line replaced, removed or repeated."""
    lines = content.decode().splitlines()
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(len(lines))
        action = rng.choice(["value", "value", "value", "remove", "repeat", "rename", "deep"])
        if action == "value" and "=" in lines[at]:
            lines[at] = f"{lines[at].partition('=')[0]}= {rng.choice(_ODD_TOML)}"
        elif action == "remove":
            lines[at] = ""
        elif action == "repeat":
            lines.insert(at, rng.choice(lines))
        elif action == "rename":
            lines[at] = re.sub(r"\w", rng.choice("abz"), lines[at], count=1)
        elif action == "deep":
            depth = rng.choice([10, 2000])
            lines[at] = f"a{'.a' * depth} = 1" if rng.random() < 0.5 else f"a = {'[' * depth}"
    return "\n".join(lines).encode()


def tf_records(rng: Rng, content: bytes, others: list[bytes]) -> bytes:
    """One record damaged, its checksum right."""
    records, offset = [], 0
    while offset < len(content):
        (length,) = struct.unpack_from("<Q", content, offset)
        records.append(content[offset + 12 : offset + 12 + length])
        offset += 16 + length
    at = rng.randrange(len(records))
    records[at] = bytes_at_random(rng, records[at], others)
    return b"".join(map(_framed, records))


def zip_members(rng: Rng, content: bytes, others: list[bytes]) -> bytes:
    """One member damaged, renamed, doubled or lost; every checksum right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = rng.randrange(len(members))
    name, data = members[at]
    action = rng.choice(["damage", "damage", "damage", "npy", "npy", "rename", "double", "lose"])
    if action == "npy" and data[:6] == b"\x93NUMPY":
        data = _npy_header(rng, data)
    elif action == "rename":
        name = rng.choice(_ODD_NAMES)
    elif action == "double":
        members.append(members[at])
    elif action == "lose":
        del members[at]
    else:
        data = bytes_at_random(rng, data, others)
    if action != "lose":
        members[at] = name, data
    out = io.BytesIO()
    method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name or "x"), data, method)
    return out.getvalue()


def gzip_content(inner: Callable[[Rng, bytes, list[bytes]], bytes]) -> Callable[..., bytes]:
    """What is compressed, damaged in a way of its own."""

    def damage(rng: Rng, content: bytes, others: list[bytes]) -> bytes:
        return gzip.compress(inner(rng, gzip.decompress(content), others), 1)

    return damage


def tar_members(rng: Rng, content: bytes, others: list[bytes]) -> bytes:
    """One member damaged, of another kind, renamed, doubled or lost."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = [(m, tar.extractfile(m).read() if m.isreg() else b"") for m in tar]
    at = rng.randrange(len(members))
    info, data = members[at]
    action = rng.choice(["damage", "damage", "size", "kind", "rename", "double", "lose"])
    if action == "damage":
        data = bytes_at_random(rng, data, others)
        info.size = len(data)
    elif action == "size":
        info.size = rng.choice([0, min(1, len(data)), len(data) // 2])
    elif action == "kind":
        info.type = rng.choice(
            [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
        )
        info.linkname, info.size = "/etc/passwd", 0
    elif action == "rename":
        info.name = rng.choice(_ODD_NAMES) or "x"
    if action == "double":
        members.append(members[at])
    members[at] = info, data
    if action == "lose":
        del members[at]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def safetensors_header(rng: Rng, content: bytes, others: list[bytes]) -> bytes:
    """The header's values, its length right."""
    (size,) = struct.unpack_from("<Q", content)
    header = json_values(rng, content[8 : 8 + size], others)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def mat_elements(rng: Rng, content: bytes, others: list[bytes]) -> bytes:
    """A compressed element of a MATLAB file, damaged before it is compressed."""
    kind, size = struct.unpack_from("<II", content, 128)
    if kind != 15:
        return content[:128] + bytes_at_random(rng, content[128:], others)
    element = zlib.decompress(content[136 : 136 + size])
    head = bytes_at_random(rng, element[:128], others)
    packed = zlib.compress(head + element[128:], 1)
    return content[:128] + struct.pack("<II", 15, len(packed)) + packed + content[136 + size :]


def png_chunks(rng: Rng, content: bytes, others: list[bytes]) -> bytes:
    """A chunk of a PNG file, its checksum right; other images as any bytes."""
    if content[:4] != b"\x89PNG":
        return bytes_at_random(rng, content, others)
    chunks, offset = [], 8
    while offset < len(content):
        (size,) = struct.unpack_from(">I", content, offset)
        chunks.append((content[offset + 4 : offset + 8], content[offset + 8 : offset + 8 + size]))
        offset += 12 + size
    at = rng.randrange(len(chunks))
    kind, data = chunks[at]
    chunks[at] = kind, bytes_at_random(rng, data or b"\0", others)
    framed = [
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    ]
    return content[:8] + b"".join(framed)


def sqlite_values(rng: Rng, content: bytes, others: list[bytes]) -> bytes:
    """Odd values in a column of a database."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "db")
        path.write_bytes(content)
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            tables = [
                name
                for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            ]
            table = rng.choice(tables)
            column = rng.choice([row[1] for row in db.execute(f"PRAGMA table_info({table})")])
            value = rng.choice([v for v in ODD_VALUES if not isinstance(v, list | dict)])
            if isinstance(value, int) and abs(value) >= 2**63:
                value = float(value) if abs(value) < 2**1000 else "9" * 400
            if isinstance(value, str):
                value = value.encode("utf-8", "surrogatepass")
                cast = "CAST(? AS TEXT)"
            else:
                cast = "?"
            what = rng.choice(["set", "set", "set", "drop", "delete"])
            try:
                if what == "drop":
                    db.execute(f"DROP TABLE {table}")
                elif what == "delete":
                    db.execute(f"DELETE FROM {table}")
                else:
                    db.execute(f"UPDATE OR IGNORE {table} SET {column} = {cast}", (value,))
            except sqlite3.Error:
                return bytes_at_random(rng, content, others)
        return path.read_bytes()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(tree, dict | list):
        return
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _npy_header(rng: Rng, data: bytes) -> bytes:
    """Another shape, type or order in the header of an .npy file."""
    (size,) = struct.unpack_from("<H", data, 8)
    header = data[10 : 10 + size].decode("latin-1").rstrip()
    shape = rng.choice(["()", "(-1,)", "(4294967296, 4294967296)", "(1,)", "(2, 3)", "3", "None"])
    descr = rng.choice(["'|O'", "'<f8'", "'<M8[s]'", "[('a', '<i4')]", "'<U9'", "'|V7'", "'<c16'"])
    if rng.random() < 0.5:
        header = re.sub(r"'shape': \([^)]*\)", f"'shape': {shape}", header)
    else:
        header = re.sub(r"'descr': [^,]*,", f"'descr': {descr},", header)
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return data[:8] + struct.pack("<H", len(text)) + text + data[10 + size :]


def _framed(record: bytes) -> bytes:
    length = struct.pack("<Q", len(record))
    return length + _crc(length) + record + _crc(record)


def _crc(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
