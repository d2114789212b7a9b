"""Where downloads are kept, and writing files such that no reader or crash sees half of one."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def cache_folder() -> Path:
    """Where downloads are kept: `SHARPKIT_CACHE`, if set, else the platform's folder."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("SHARPKIT_CACHE") or user_cache_dir("sharpkit"))


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error.

    The content reaches the disk before the name does, so a power cut leaves the old file or the
    new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(temporary):
            # whoever reads the message knows only the name that was asked for
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
