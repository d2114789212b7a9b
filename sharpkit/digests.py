"""Whether tensors, files and settings are those that a result was computed from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharpkit.files import open_regular


def digest(parts: Iterable[str | Tensor]) -> str:
    """SHA-256 of texts and of the bytes of tensors, of any device and layout, in their order.

    Example:
        >>> digest(["a", torch.zeros(2)]) == digest(["a" + bytes(8).decode()])
        True
    """
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.encode() if isinstance(part, str) else _bytes(part))
    return whole.hexdigest()


def described(tensors: Iterable[Tensor]) -> Iterator[str | Tensor]:
    """Parts for `digest`: shape and dtype of each tensor before its bytes."""
    for tensor in tensors:
        yield f"{tuple(tensor.shape)} {tensor.dtype}"
        yield tensor


def stamp(paths: Iterable[Path]) -> str:
    """Sizes and times of files: as long as it is the same, so are they, and it costs no reading.

    Example:
        >>> stamp([Path("/nowhere")])
        'missing'
    """
    return " ".join(map(_stamp, paths))


def digest_of_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the contents of files in order; empty if one cannot be read.

    Example:
        >>> digest_of_files([])
        'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'
    """
    whole = hashlib.sha256()
    try:
        for path in paths:
            with open_regular(path) as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
    except OSError:
        return ""
    return whole.hexdigest()


def digest_of_settings(settings: Mapping[str, Any]) -> str:
    """SHA-256 of settings, whatever their order.

    Example:
        >>> digest_of_settings({"a": 1, "b": 2}) == digest_of_settings({"b": 2, "a": 1})
        True
    """
    return digest([json.dumps(settings, sort_keys=True, default=repr)])


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return "missing"
    # the change time too: a copy may keep the modification time of another file
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"
