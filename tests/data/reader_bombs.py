"""Files that ask for far more time or memory than they are long; run as a script, it reads them.

Each function writes one and returns what reads it. The script prints, for every one, a JSON line
with the error, the processor time and the memory above what there was before. What is freed must
go back to the system for that: MALLOC_MMAP_THRESHOLD_=65536 in the environment.
"""

from __future__ import annotations

import gc
import gzip
import io
import json
import os
import pickle
import resource
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from reader_files import FORMATS, small
from safetensors.torch import save_file

from sharpkit.data.idx import read_idx
from sharpkit.datasets import load_dataset
from sharpkit.doors import MAX_DIRECTORY_BYTES
from sharpkit.errors import RunError, SharpkitError
from sharpkit.run_directory import read_claim
from sharpkit.runs.checkpoints import load_arrays, load_checkpoint
from sharpkit.runs.saved_spectrum import read_spectrum
from sharpkit.runs.trained import load_trained
from sharpkit.training.run_files import RunFiles
from sharpkit.zoo_training.grid_file import read_plan

MIB = 2**20
Read = Callable[[], object]


@cache
def block() -> bytes:
    """16 MiB of zeros, deflated such that it may stand anywhere."""
    packer = zlib.compressobj(9, wbits=-15)
    return packer.compress(bytes(16 * MIB)) + packer.flush(zlib.Z_FULL_FLUSH)


def deflated(start: bytes, size: int) -> bytes:
    """A start and then zeros, `size` of them."""
    packer = zlib.compressobj(9, wbits=-15)
    return packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH) + block() * (size // 16 // MIB)


@cache
def _gzip_member() -> bytes:
    return gzip.compress(bytes(16 * MIB))


def gzipped(start: bytes, size: int) -> bytes:
    """The same as gzip, 16 MiB in each member of the file."""
    return gzip.compress(start) + _gzip_member() * (size // 16 // MIB)


def archive(path: Path, members: dict[str, tuple[bytes, int]]) -> None:
    """A zip archive of deflated members, each a start and then as many zeros."""
    with zipfile.ZipFile(path, "w") as file:
        for name, (start, size) in members.items():
            file.writestr(name, deflated(start, size) + b"\x03\0")
            info = file.getinfo(name)  # which is written at the end
            info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, len(start) + size


def header(shape: str, descr: str = "'|u1'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


# --- data -----------------------------------------------------------------------------------------


def idx_of_zeros(path: Path) -> Read:
    path.write_bytes(
        gzipped(bytes([0, 0, 8, 3, 0, 0, 255, 255, 0, 0, 128, 0, 0, 0, 0, 1]), 1536 * MIB)
    )
    return lambda: read_idx(path)


def idx_longer_than_stated(path: Path) -> Read:
    path.write_bytes(gzipped(bytes([0, 0, 8, 1, 0, 0, 0, 5]), 1536 * MIB))
    return lambda: read_idx(path)


def idx_of_something_else(path: Path) -> Read:
    path.write_bytes(gzipped(b"no IDX", 1536 * MIB))
    return lambda: read_idx(path)


def npz_of_zeros(path: Path) -> Read:
    array = header(f"({512 * MIB},)"), 512 * MIB
    archive(path, {"x_train.npy": array, "y_train.npy": array})
    return lambda: load_arrays(path)


def npz_with_a_long_header(path: Path) -> Read:
    start = b"\x93NUMPY\x02\x00" + (2**30).to_bytes(4, "little")
    archive(path, {"x_train.npy": (start, 112 * MIB), "y_train.npy": (start, 0)})
    return lambda: load_arrays(path)


def npz_that_states_too_much(path: Path) -> Read:
    archive(path, {"x_train.npy": (header(f"({2**59},)"), 0), "y_train.npy": (header("()"), 0)})
    return lambda: load_arrays(path)


def npz_of_spectra(path: Path) -> Read:
    archive(path, {"nodes.npy": (b"", 512 * MIB), "weights.npy": (b"", 0)})

    def read() -> None:
        if read_spectrum(path) is None:
            raise RunError(f"{path}: is computed again")

    return read


def mat_of_zeros(path: Path) -> Read:
    return mat(path, b"\x78\x9c" + deflated(_matrix(2**30 - 200), 1024 * MIB))


def mat_that_states_too_much(path: Path) -> Read:
    return mat(path, zlib.compress(_matrix(2**32 - 1000)))


def mat(path: Path, packed: bytes) -> Read:
    start = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
    element = struct.pack("<II", 15, len(packed)) + packed
    for split in ("train", "test"):
        (path.parent / f"{split}_32x32.mat").write_bytes(start + element)
    return lambda: load_dataset("svhn", root=path.parent)


def _matrix(size: int) -> bytes:
    """The start of the matrix X of so many bytes."""
    return struct.pack(
        "<IIIIIIIIIIIIHH4sII",
        14, size, 6, 8, 9, 0, 5, 16, 32, 32, 3, size // 3072, 1, 1, b"X", 2, size,
    )  # fmt: skip


def tar_without_end(path: Path) -> Read:
    path = path.with_name("cifar-10-binary.tar.gz")
    path.write_bytes(gzipped(_member("other", 2**33 - 1), 1536 * MIB))
    return lambda: load_dataset("cifar10", root=path.parent)


def tar_with_a_long_name(path: Path) -> Read:
    path = path.with_name("cifar-10-binary.tar.gz")
    path.write_bytes(gzipped(_member("././@LongLink", 150 * MIB, b"L"), 1536 * MIB))
    return lambda: load_dataset("cifar10", root=path.parent)


def _member(name: str, size: int, kind: bytes = b"0") -> bytes:
    head = (
        name.encode().ljust(100, b"\0") + b"0000644\0" * 3 + f"{size:011o}\0".encode() + bytes(12)
    )
    tail = kind + bytes(100) + b"ustar\x0000" + bytes(247)
    total = sum(head) + 8 * 32 + sum(tail)
    return head + f"{total:06o}\0 ".encode() + tail


# --- images ---------------------------------------------------------------------------------------


def images(path: Path, content: bytes, count: int = 1, name: str = "png") -> Read:
    path = path.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for k in range(count):
            file.writestr(f"train/cat/{k}.{name}", content)
        file.writestr(f"test/cat/0.{name}", content)
    return lambda: load_dataset(path)


def large_images(path: Path) -> Read:
    content = io.BytesIO()
    Image.new("L", (12_000, 12_000)).save(content, "png")
    return images(path, content.getvalue(), 5)


def images_of_text(path: Path) -> Read:
    """PNGs whose text expands to 64 MiB each, stored as nothing."""
    content = io.BytesIO()
    Image.new("L", (2, 2)).save(content, "png")
    png = content.getvalue()
    text = b"".join(
        _chunk(b"zTXt", b"a%d\0\0" % k + zlib.compress(bytes(MIB - 9))) for k in range(60)
    )
    spoiled = _chunk(b"IDAT", b"no pixels")  # so that it ends in an error
    return images(path, png[:33] + text + spoiled + _chunk(b"IEND", b""), 100)


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def images_of_many_scans(path: Path) -> Read:
    content = io.BytesIO()
    Image.new("L", (4000, 4000)).save(content, "jpeg", progressive=True)
    jpeg = content.getvalue()
    last = jpeg.rfind(b"\xff\xda")
    return images(path, jpeg[:last] + jpeg[last:-2] * 2000 + jpeg[-2:], name="jpg")


def images_without_number(path: Path) -> Read:
    return named(path, 30 * MIB)


def images_of_many_names(path: Path) -> Read:
    """As many members as are read at all, none of which is an image."""
    return named(path, MAX_DIRECTORY_BYTES)


def named(path: Path, size: int) -> Read:
    """An archive with a list of so many bytes that names one member again and again."""
    path = path.with_suffix(".zip")
    archive(path, {"x": (b"", 0)})
    content = path.read_bytes()
    start, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    names = content[start:end] * (size // (end - start))
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 65535, 65535, len(names), start, 0)
    path.write_bytes(content[:start] + names + tail)
    return lambda: load_dataset(path)


# --- weights --------------------------------------------------------------------------------------


def saved(path: Path, data: bytes, records: dict[str, bytes] | None = None) -> Read:
    """A file of torch.save with this pickle."""
    path = path.with_suffix(".pt")
    with zipfile.ZipFile(path, "w") as file:
        parts = {"data.pkl": data, "byteorder": b"little", "version": b"3\n", **(records or {})}
        for name, content in parts.items():
            file.writestr(f"archive/{name}", content)
    return lambda: load_checkpoint(path, small)


def called(name: str, *arguments: object) -> bytes:
    """A pickle of what a function returns, as `torch.load` reads it."""
    module, _, function = name.rpartition(".")
    pickled = pickle.dumps(tuple(arguments), 2)[2:-1]
    return b"\x80\x02c" + f"{module}\n{function}\n".encode() + pickled + b"R."


def pt_of_deflated_records(path: Path) -> Read:
    torch.save({"w": torch.zeros(10**6)}, path)
    with zipfile.ZipFile(path) as file:
        parts = {name: (file.read(name), 0) for name in file.namelist()}
    name = next(name for name in parts if name.endswith("data/0"))
    archive(path, {**parts, name: (b"", 512 * MIB)})
    return lambda: load_checkpoint(path, small)


def pt_with_a_deflated_pickle(path: Path) -> Read:
    archive(path, {"archive/data.pkl": (b"", 512 * MIB), "archive/version": (b"3\n", 0)})
    return lambda: load_checkpoint(path, small)


def pt_of_a_bytearray(path: Path) -> Read:
    return saved(path, called("builtins.bytearray", 2**33))


def pt_of_growing_text(path: Path) -> Read:
    text = b"X\x10\x00\x00\x00" + b"a" * 16
    return saved(
        path, b"\x80\x02" + 30 * b"c_codecs\nencode\n" + text + 30 * b"X\3\0\0\0hex\x86R" + b"."
    )


def pt_of_shared_lists(path: Path) -> Read:
    """Ten references to a list of ten references to ..., thirty levels deep."""
    node: list[object] = []
    for _ in range(30):
        node = [node] * 10
    return saved(path, pickle.dumps({"state_dict": node}, 2))


def pt_of_many_steps(path: Path) -> Read:
    return saved(path, b"\x80\x02(" + b"]" * 20_000_000 + b"t.")


def pt_of_a_huge_tensor(path: Path) -> Read:
    torch.save({"w": torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as file:
        parts = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    data = parts["data.pkl"].replace(b"K\x01\x85", b"J\x00\x00\x00\x40\x85", 1)
    assert data != parts["data.pkl"]
    return saved(path, data, parts | {"data.pkl": data})


def legacy_pt_of_a_bytearray(path: Path) -> Read:
    torch.save({}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    at = content.rfind(b"\x80\x02}")
    assert at > 0
    path.write_bytes(content[:at] + called("builtins.bytearray", 2**33) + pickle.dumps([], 2))
    return lambda: load_checkpoint(path, small)


def checkpoint_of_deflated_records(path: Path) -> Read:
    pt_of_deflated_records(path)
    path.rename(path.with_name("checkpoint.pt"))
    model = small()
    optimizer = torch.optim.SGD(model.parameters())
    return lambda: RunFiles(path.parent, {}).restore(model, optimizer)


def safetensors_with_a_long_header(path: Path) -> Read:
    path = path.with_suffix(".safetensors")
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}" + bytes(100))
    return lambda: load_checkpoint(path, small)


def pt_of_many_sets(path: Path) -> Read:
    return saved(path, b"\x80\x02(" + b"c__builtin__\nset\n]\x85R" * 180_000 + b"t.")


def pt_of_many_records(path: Path) -> Read:
    return saved(path, b"\x80\x02}.", {f"data/{k}": b"" for k in range(29_900)})


def safetensors_of_many_tensors(path: Path) -> Read:
    path = path.with_suffix(".safetensors")
    save_file({f"{k:200}": torch.zeros(0) for k in range(29_900)}, path)
    return lambda: load_checkpoint(path, small)


def safetensors_of_many_names(path: Path) -> Read:
    path = path.with_suffix(".safetensors")
    text = b"{" + b",".join(b'"%d":{}' % k for k in range(1_200_000)) + b"}"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return lambda: load_checkpoint(path, small)


# --- settings -------------------------------------------------------------------------------------


def toml(path: Path, content: str) -> Read:
    path = path.with_suffix(".toml")
    path.write_text(content)
    return lambda: read_plan(path)


def toml_nested(path: Path) -> Read:
    return toml(path, "x = " + "[" * 100_000 + "]" * 100_000)


def toml_of_a_long_integer(path: Path) -> Read:
    return toml(path, "seed = " + "9" * 200_000)


def toml_of_a_long_hexadecimal(path: Path) -> Read:
    return toml(path, "seed = 0x" + "f" * 200_000)


def toml_of_a_long_key(path: Path) -> Read:
    return toml(path, "a." * 100_000 + "a = 1")


def toml_of_long_tables(path: Path) -> Read:
    return toml(path, "\n".join(f"[{'a.' * 200}b{k}]" for k in range(600)))


def trained(path: Path, **changes: object) -> Read:
    provenance = {"architecture": "resnet20", "input_shape": [3, 32, 32], "classes": 10}
    config = {"provenance": {**provenance, "data": "x", "root": None, **changes}}
    folder = path.parent
    (folder / "config.json").write_text(json.dumps({**config, "label_noise": 0, "seed": 0}))
    (folder / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    return lambda: load_trained(folder)


def trained_of_many_layers(path: Path) -> Read:
    return trained(path, architecture="resnet99998")


def trained_of_many_channels(path: Path) -> Read:
    return trained(path, architecture="nin-65535x2")


def trained_of_many_classes(path: Path) -> Read:
    return trained(path, classes=2**31)


def trained_on_large_images(path: Path) -> Read:
    return trained(path, architecture="vgg-64x2", input_shape=[3, 2**30, 2**30])


def claim_of_many_values(path: Path) -> Read:
    path.write_text("[" + "{}," * 5_000_000 + "{}]")
    return lambda: read_claim(path)


BOMBS = {
    make.__name__: make
    for make in (
        idx_of_zeros, idx_longer_than_stated, idx_of_something_else, npz_of_zeros,
        npz_with_a_long_header, npz_that_states_too_much, npz_of_spectra, mat_of_zeros,
        mat_that_states_too_much, tar_without_end, tar_with_a_long_name, large_images,
        images_of_text, images_of_many_scans, images_without_number,
        images_of_many_names, pt_of_deflated_records,
        pt_with_a_deflated_pickle, pt_of_a_bytearray, pt_of_growing_text, pt_of_shared_lists,
        pt_of_many_steps, pt_of_a_huge_tensor, legacy_pt_of_a_bytearray,
        checkpoint_of_deflated_records, safetensors_with_a_long_header, safetensors_of_many_names,
        safetensors_of_many_tensors, pt_of_many_sets, pt_of_many_records,
        toml_nested, toml_of_a_long_integer, toml_of_a_long_hexadecimal, toml_of_a_long_key,
        toml_of_long_tables, trained_of_many_layers, trained_of_many_channels,
        trained_of_many_classes, trained_on_large_images, claim_of_many_values,
    )
}  # fmt: skip


WARM = (
    "cifar", "svhn", "npz", "images", "jpegs", "pt", "safetensors", "zoo_plan", "trained",
    "spectrum",
)  # fmt: skip


def memory(field: str) -> int:
    """Bytes of this process, "VmRSS" now or "VmHWM" at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def measured(read: Read) -> dict[str, object]:
    """The error that reading raises, its processor time, and the memory it takes in between."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the maximum is from now on
    before, start = memory("VmRSS"), time.process_time()
    try:
        read()
        found = "read"
    except SharpkitError as error:
        found = f"{type(error).__name__}: {error}"
    seconds = time.process_time() - start
    return {"found": found, "seconds": seconds, "bytes": memory("VmHWM") - before}


def warm_up(folder: Path) -> None:
    """Read good files, so that what is read later imports nothing."""
    for name in WARM:
        (folder / name).mkdir()
        FORMATS[name](folder / name)[1]()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (300, 300))
    torch.set_num_threads(1)
    top = Path(sys.argv[1])
    warm_up(top)
    for name in sys.argv[2:] or BOMBS:
        (top / name).mkdir()
        read = BOMBS[name](top / name / "bomb")
        child = os.fork()  # which has what was imported, and nothing of the bombs before
        if not child:
            print(json.dumps({"name": name, **measured(read)}), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
