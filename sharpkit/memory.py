"""How much memory this process may use: what the machine has free, and limits of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_allowed: dict[str, int] = {}  # device type -> bytes


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
