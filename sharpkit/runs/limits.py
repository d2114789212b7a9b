"""How much of a machine one process may use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def limited_threads(threads: int) -> Iterator[None]:
    """Compute with so many CPU threads, in torch and in the libraries below numpy and scipy."""
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    with threadpool_limits(threads):
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def limit_memory(memory: int | None, device: torch.device) -> None:
    """Let allocations beyond so many more bytes fail, with an error that tells their size."""
    if memory is None:
        return
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total), device)
    elif sys.platform == "linux":
        import resource

        status = Path("/proc/self/status").read_text().splitlines()
        used = next(int(line.split()[1]) for line in status if line.startswith("VmData:"))
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + memory, hard))


def free_memory() -> int:
    """Bytes of the machine, or the container, that can still be allocated; 0 if not known."""
    from sharpkit.curvature.memory import available_memory

    return available_memory(torch.device("cpu")) or 0
