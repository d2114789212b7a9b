"""Small files of every format of a zoo that would take much memory or time, and what reading costs.

`python bombs.py FOLDER` makes each in one process, reads it in another, and prints a JSON line
about it; used by test_bombs.py.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import numpy as np
import torch

from sharpkit.errors import SharpkitError
from sharpkit.zoo import build_model, load_zoo, read_weights
from sharpkit.zoo.archive import unpack_zip
from sharpkit.zoo.files import read_json
from sharpkit.zoo.shards.tfrecord import read_shards, write_shard

Maker = Callable[[Path], Any]


def sparse(size: int, start: bytes = b"") -> Maker:
    """A file of one hole after its beginning."""

    def make(path: Path) -> None:
        path.write_bytes(start)
        os.truncate(path, size)

    return make


# --- HDF5 ------------------------------------------------------------------------------------


def hdf5(make_array: Callable[[h5py.Group], None]) -> Maker:
    """A weight file of one layer with one array "k"."""

    def make(path: Path) -> None:
        with h5py.File(path, "w") as file:
            file.attrs["layer_names"] = [b"dense"]
            group = file.create_group("dense")
            group.attrs["weight_names"] = [b"k"]
            make_array(group)

    return make


def array(**settings: Any) -> Maker:
    """An array with these settings, into which nothing is written."""
    return hdf5(lambda group: group.create_dataset("k", dtype="f4", **settings) and None)


def stored(filters: str, content: Callable[[], bytes], chunk: int = 1024) -> Maker:
    """An array of four numbers or more in one chunk whose bytes in the file are given."""

    def write(group: h5py.Group) -> None:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((chunk,))
        for name in filters:
            {"s": plan.set_shuffle, "z": lambda: plan.set_deflate(1)}[name]()
        space = h5py.h5s.create_simple((min(chunk, 1024),), (h5py.h5s.UNLIMITED,))
        dataset = h5py.h5d.create(group.id, b"k", h5py.h5t.IEEE_F32LE, space, plan)
        dataset.write_direct_chunk((0,), content())

    return hdf5(write)


@cache
def zeros() -> bytes:
    return zlib.compress(bytes(2**29), 1)


def named(*names: bytes) -> Maker:
    """Layers of these names, all one group, and that with an array of two names."""

    def make(path: Path) -> None:
        with h5py.File(path, "w") as file:
            for part in range(-(-len(names) // 50)):
                pieces = names[50 * part : 50 * (part + 1)]
                file.attrs[f"layer_names{part}"] = np.array(pieces)
            group = file.create_group("d")
            for name in {*names[:20_000], b"d/d"} - {b"d"}:
                if b"/" not in name or name == b"d/d":
                    file[name] = group
            group.attrs["weight_names"] = np.array([b"k", b"k"])
            group["k"] = np.ones(3, "f4")

    return make


def one_text_for_all_names(path: Path) -> None:
    """2,000 references to a text of 4 MiB."""
    size = struct.pack("<I", 2**22)
    with h5py.File(path, "w") as file:
        names = ["a" * 2**22] + [""] * 2000
        file.attrs.create("layer_names", names, dtype=h5py.string_dtype())
    content = bytearray(path.read_bytes())
    at = content.find(size)
    while content[at + 16 : at + 20] != b"\0\0\0\0":  # the second reference, to an empty text
        at = content.find(size, at + 1)
    content[at : at + 16 * 2001] = content[at : at + 16] * 2001
    path.write_bytes(content)


def name_of_4_gib(path: Path) -> None:
    """A reference to a text that states 2^32 - 1 bytes."""
    with h5py.File(path, "w") as file:
        file.attrs.create("layer_names", ["twelve bytes"], dtype=h5py.string_dtype())
    content = bytearray(path.read_bytes())
    at = content.find(struct.pack("<I", 12), content.find(b"layer_names") + 12)
    while content[at + 12 : at + 16] != struct.pack("<I", 1):  # the first object of a heap
        at = content.find(struct.pack("<I", 12), at + 1)
    content[at : at + 4] = b"\xff" * 4
    path.write_bytes(content)


def object_without_room(path: Path) -> None:
    """An object in a global heap after which the next one begins at the same place."""
    with h5py.File(path, "w") as file:
        file.attrs.create("layer_names", ["dense"], dtype=h5py.string_dtype())
    content = bytearray(path.read_bytes())
    struct.pack_into("<HxxxxxxQ", content, content.find(b"GCOL") + 16, 0, 0)
    path.write_bytes(content)


def cyclic_heap(path: Path) -> None:
    """A free block after itself."""
    with h5py.File(path, "w", libver=("earliest", "v110")) as file:
        file.create_group("dense")
    content = bytearray(path.read_bytes())
    at = content.find(b"HEAP")
    size, _, address = struct.unpack_from("<QQQ", content, at + 8)
    struct.pack_into("<Q", content, at + 16, size - 16)
    struct.pack_into("<QQ", content, address + size - 16, size - 16, 16)
    path.write_bytes(content)


WEIGHTS: dict[str, Maker] = {
    "chunk of 2 GiB": stored("z", lambda: zlib.compress(bytes(16)), 2**29),
    "512 MiB in a chunk of 4 KiB": stored("z", zeros),
    "the same, shuffled": stored("sz", zeros),
    "deflated twice": stored("zz", lambda: zlib.compress(zeros(), 1)),
    "huge shape": array(shape=(2**40,), chunks=(2**10,), compression=1),
    "huge shape, one chunk": array(shape=(2**29,), chunks=(2**29,), compression=1),
    "huge shape without chunks": hdf5(lambda g: g.create_dataset("k", (2**34,), "f4")),
    "million chunks": array(shape=(2**20,), chunks=(1,)),
    "60,000 layers": named(*[b"d"] * 60_000),
    "array named 12,000 times": named(*[b"d%d" % i for i in range(6_000)]),
    "name of 30,000 parts": named(b"/".join([b"d"] * 30_000)),
    "name of 4 GiB": name_of_4_gib,
    "one text for all names": one_text_for_all_names,
    "cyclic heap": cyclic_heap,
    "object without room": object_without_room,
    "terabyte of holes": sparse(2**40, b"\x89HDF\r\n\x1a\n"),
}

# --- shards ----------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    content = b""
    while value > 0x7F:
        content += bytes([value & 0x7F | 0x80])
        value >>= 7
    return content + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensor(dtype: int, shape: tuple[int, ...], rest: bytes = b"") -> bytes:
    dims = b"".join(field(2, b"\x08" + varint(size)) for size in shape)
    return b"\x08" + varint(dtype) + field(2, dims) + rest


def example(inputs: bytes, output: bytes = tensor(3, (1,), field(7, b"\1"))) -> bytes:
    features = ((b"inputs", inputs), (b"output", output))
    pairs = (field(1, k) + field(2, field(1, field(1, content))) for k, content in features)
    return field(1, b"".join(field(1, pair) for pair in pairs))


def checksum(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def record(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return length + checksum(length) + content + checksum(content)


def shard(content: Callable[[], bytes]) -> Maker:
    return lambda path: path.write_bytes(content())


_MANY = 12 * 2**20
_LENGTH = struct.pack("<Q", 2**60)
SHARDS: dict[str, Maker] = {
    "record of an exbibyte": shard(lambda: _LENGTH + checksum(_LENGTH) + bytes(100)),
    "record of 64 MiB": shard(lambda: record(bytes(2**26))),
    "empty features": shard(lambda: record(field(1, b"\n\0" * _MANY))),
    "empty values": shard(
        lambda: record(
            field(1, field(1, field(1, b"inputs") + field(2, field(1, b"\n\0" * _MANY))))
        )
    ),
    "packed numbers": shard(lambda: record(example(tensor(9, (4,), field(10, b"\1" * 2 * _MANY))))),
    "single numbers": shard(lambda: record(example(tensor(3, (4,), b"\x38\1" * _MANY)))),
    "axes": shard(lambda: record(example(b"\x08\1" + field(2, b"\x12\0" * _MANY)))),
    "shape of 2^62": shard(lambda: record(example(tensor(1, (2**62, 2**62))))),
    "one number for 2^28": shard(lambda: record(example(tensor(1, (2**14, 2**14)))) * 3),
    "two numbers for 2^28": shard(lambda: record(example(tensor(1, (2**28,), field(5, bytes(8)))))),
    "terabyte of holes": sparse(2**40),
    "hole after an example": sparse(2**33 - 1, record(example(tensor(1, (2**14, 2**11))))),
}

# --- JSON ------------------------------------------------------------------------------------

_DENSE = {"layer_name": "Dense", "units": 2}


def config(*layers: dict[str, Any], input_shape: Any = (8, 8, 3)) -> Maker:
    content = {"input_shape": input_shape, "model_config": layers}
    return lambda path: path.write_text(json.dumps(content))


CONFIGS: dict[str, Maker] = {
    "600,000 layers": lambda path: config(*[_DENSE] * 600_000)(path),
    "100,000 layers": lambda path: config(*[_DENSE] * 100_000)(path),
    "units of 10^400": config({**_DENSE, "units": 10**400}),
    "units of 10^299": config({**_DENSE, "units": 10**299}),
    "units of 10^12": config({**_DENSE, "units": 10**12}),
    "kernel of 10^9": config(
        {"layer_name": "Conv2D", "filters": 1, "kernel_size": 10**9, "padding": "same"}
    ),
    "padding of 10^12": config({"layer_name": "ZeroPadding2D", "padding": 10**12}),
    "80,000 axes": config({"layer_name": "Reshape", "target_shape": [10**299] * 80_000}),
    "300,000 keywords": lambda path: config({**_DENSE, **{f"k{i}": 0 for i in range(300_000)}})(
        path
    ),
    "input of 10^299": config(_DENSE, input_shape=[10**299]),
    "64 MiB of lists": lambda path: path.write_bytes(b"[" + b"[]," * (2**26 // 3) + b"[]]"),
    "23 MiB of lists": lambda path: path.write_bytes(b"[" + b"[]," * (23 * 2**20 // 3) + b"[]]"),
    "10 million levels": lambda path: path.write_bytes(b"[" * 10**7),
    "million levels": lambda path: path.write_bytes(b"[" * 900_000),
    "text of four bytes each": lambda path: path.write_text('["\U0001f600' + "a" * 2**24 + '"]'),
    "terabyte of holes": sparse(2**40),
}


def model_configs(content: Any) -> Maker:
    return lambda path: path.write_text(json.dumps(content))


MODEL_CONFIGS: dict[str, Maker] = {
    "171 MiB": lambda path: path.write_bytes(b"{" + b" " * 171 * 2**20 + b"}"),
    "metric of 10^400": model_configs({"1": {"metrics": {"train_acc": 10**400}, "hparams": {}}}),
    "150,000 models": lambda path: model_configs({str(i): 0 for i in range(150_000)})(path),
    "wide text": lambda path: path.write_text('{"\U0001f600' + "a" * 2**24 + '": {}}'),
}

# --- archives --------------------------------------------------------------------------------


def archive(method: int, *contents: bytes) -> Maker:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", method, compresslevel=1) as file:
            for i, content in enumerate(contents):
                file.writestr(f"zoo/{i}", content)

    return make


def overlapping(count: int) -> Maker:
    """Members that are all the same bytes of the file."""

    def make(path: Path) -> None:
        archive(zipfile.ZIP_STORED, bytes(2**20))(path)
        content = path.read_bytes()
        begin, end = content.find(b"PK\1\2"), content.find(b"PK\5\6")
        entry = content[begin:end].replace(struct.pack("<H", 5), struct.pack("<H", 9))
        directory = b"".join(entry.replace(b"zoo/0", b"zoo%06d" % i) for i in range(count))
        sizes = struct.pack("<HHII", count % 2**16, count % 2**16, len(directory), begin)
        path.write_bytes(content[:begin] + directory + content[end : end + 8] + sizes + b"\0\0")

    return make


ZIPS: dict[str, Maker] = {
    "256 MiB of zeros": archive(zipfile.ZIP_DEFLATED, bytes(2**28)),
    "bzip2": archive(zipfile.ZIP_BZIP2, bytes(2**20)),
    "lzma": archive(zipfile.ZIP_LZMA, bytes(2**20)),
    "200,000 members": overlapping(200_000),
    "overlapping members": overlapping(60),
    "terabyte of holes": sparse(2**40, b"PK"),
}

# --- measuring -------------------------------------------------------------------------------


def _read_model_configs(path: Path) -> None:
    (path.parent / "model_1").mkdir()
    path.rename(path.parent / "model_configs.json")
    entry = load_zoo(path.parent)[path.parent.name]["1"]
    assert entry.metrics and entry.hyperparameters


KINDS: dict[str, tuple[dict[str, Maker], Callable[[Path], Any]]] = {
    "weights": (WEIGHTS, read_weights),
    "shard": (SHARDS, lambda path: read_shards([path])),
    "config": (CONFIGS, lambda path: build_model(read_json(path), device="meta")),
    "model_configs": (MODEL_CONFIGS, _read_model_configs),
    "zip": (ZIPS, lambda path: unpack_zip(path, path.parent / "unpacked", progress=False)),
}


def measure(read: Callable[[Path], Any], path: Path) -> dict[str, Any]:
    """What came of reading a file, the processor time in seconds and the memory in MiB."""
    before, began = _peak(), time.process_time()
    try:
        read(path)
        outcome = "loaded"
    except SharpkitError as error:
        outcome = f"refused: {error}"
    except BaseException as error:
        outcome = f"ESCAPED {type(error).__name__}: {error}"
    return {
        "outcome": outcome[:300],
        "seconds": time.process_time() - began,
        "memory": (_peak() - before) / 2**10,
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _apart(work: Callable[[], None]) -> int:
    """Do something in a process of its own, whose memory begins with this one's; its status."""
    process = os.fork()
    if process == 0:
        signal.alarm(60)
        work()
        os._exit(0)
    return os.waitpid(process, 0)[1]


def _warm_up(folder: Path) -> None:
    """Import and set up what any reader needs once."""
    write_shard(folder / "good", np.ones((2, 3), np.float32), np.array([0, 1]))
    read_shards([folder / "good"])
    model = build_model({"input_shape": [3], "model_config": [_DENSE]}, device="cpu")
    model(torch.ones(1, 3))
    archive(zipfile.ZIP_DEFLATED, b"good")(folder / "good.zip")
    unpack_zip(folder / "good.zip", folder / "unpacked", progress=False)


def main(folder: Path) -> None:
    """Print a line about each bomb."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    _warm_up(folder)
    for kind, (makers, read) in KINDS.items():
        for number, (name, make) in enumerate(makers.items()):
            path = folder / f"{kind}{number}" / "bomb"
            path.parent.mkdir()
            made = _apart(lambda make=make, path=path: make(path))

            def try_it(read=read, path=path) -> None:
                print(json.dumps(measure(read, path)), end="", flush=True)

            print(json.dumps([kind, name, made]), end="\t", flush=True)
            status = _apart(try_it)
            print(f"\t{status}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
