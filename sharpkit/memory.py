"""How much memory this process may use: what the machine has free, and limits of its own."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

_allowed: dict[str, int] = {}  # device type -> bytes
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
# bytes: free memory that is kept meanwhile; and what glibc adjusts its thresholds to at most, which
# it does as it sees large blocks freed, and no longer once it has been told anything
_KEPT, _MOST_TRIM, _MOST_MMAP = 2**30, 2**26, 2**25
# what it is told by the environment
_TOLD = [f"MALLOC_{name}_" for name in ("TRIM_THRESHOLD", "MMAP_THRESHOLD", "MMAP_MAX", "TOP_PAD")]
_keeping = 0  # how many are inside `freed_memory_kept`


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on a device; None where the system is silent."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        known = [int(free + reserved), _left_of_limits(device)]
    elif device.type == "cpu":
        known = [_system_memory(), _container_memory(), _left_of_limits(device)]
    else:
        return None
    return min((free for free in known if free is not None), default=None)


def limit_memory(memory: int | None, device: torch.device) -> None:
    """Let allocations beyond so many more bytes fail, with an error that tells their size.

    On a CPU only Linux can; elsewhere the limit is only what `allowed_memory` tells.
    """
    if memory is None:
        return
    _allowed[device.type] = memory
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total), device)
    elif sys.platform == "linux":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (process_status("VmData") + memory, hard))


def allowed_memory(device: torch.device) -> int | None:
    """Bytes that `limit_memory` granted this process; None if it did not limit it.

    It stays the same from item to item, so what follows from it does as well.

    Example:
        >>> allowed_memory(torch.device("cpu")) is None
        True
    """
    return _allowed.get(device.type)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, the C library keeps the memory that passes free, for the next ones.

    It hands it back to the system otherwise, as its heap happens to lie, and page faults then took
    up to two thirds more time. Only glibc is told, and not where the environment tells it other. Of
    a process's own limit at most an eighth is kept: large blocks do not come from it.

    Example:
        >>> with freed_memory_kept():
        ...     pass
    """
    global _keeping
    _keeping += 1
    if _keeping == 1:
        allowed = allowed_memory(torch.device("cpu"))
        _tell_allocator(_KEPT if allowed is None else min(_KEPT, allowed // 8))
    try:
        yield
    finally:
        _keeping -= 1
        if _keeping == 0:
            _tell_allocator(_MOST_TRIM)


def _tell_allocator(kept: int) -> None:
    told = any(name in os.environ for name in _TOLD)
    if told or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or not _is_glibc():
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP_THRESHOLD, _MOST_MMAP)
    mallopt(_TRIM_THRESHOLD, kept)


@cache
def _is_glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def process_status(name: str, file: str = "/proc/self/status") -> int:
    """Bytes of one line of the process's status, or of another file of the system."""
    lines = Path(file).read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(f"{name}:")) * 1024


def _left_of_limits(device: torch.device) -> int | None:
    """Bytes that this process may still allocate under its own limits; None if it has none.

    On a GPU the limit is the fraction of its memory, on a CPU the system's limits of data and
    address space.
    """
    if device.type == "cuda":
        if device.type not in _allowed:
            return None
        return max(0, _allowed[device.type] - torch.cuda.memory_allocated(device))
    if sys.platform != "linux":
        return None
    import resource

    left = []
    for kind, used in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            left.append(max(0, limit - process_status(used)))
    return min(left, default=None)


def _system_memory() -> int | None:
    try:
        return process_status("MemAvailable", "/proc/meminfo")
    except (OSError, StopIteration):
        return None


def _container_memory() -> int | None:
    """What is left of the control group's limit, if there is one."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        cached = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - used + int(cached.get("inactive_file", 0)))
