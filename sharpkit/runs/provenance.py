"""What a result was computed with: versions, device, peak memory."""

from __future__ import annotations

import json
import multiprocessing
import platform
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sharpkit
from sharpkit.contract.precision import current_precision
from sharpkit.memory import process_status


def circumstances(device: str) -> dict[str, Any]:
    """What an `Outcome` has of this process and its device, at the end of a measurement."""
    return {
        "device": _device_name(device),
        "precision": current_precision(),
        "peak_memory": _peak_memory(device),
        "environment": _environment(),
    }


@cache
def _environment() -> str:
    """Versions and machine of this process, as JSON."""
    # torch's own word names its build, which the distribution of a CUDA build may leave out
    torch_version = str(torch.__version__)
    packages = {"sharpkit": own_version(), "torch": torch_version, "numpy": version("numpy")}
    python = {"python": platform.python_version(), "platform": platform.platform()}
    return json.dumps({**packages, **python, "host": platform.node()})


def own_version() -> str:
    """That of the installed distribution, or that of the source tree where none is installed."""
    try:
        return version("sharpkit")
    except PackageNotFoundError:
        return sharpkit.__version__


@cache
def _device_name(device: str) -> str:
    """The name of a GPU, or of the processor."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(torch.device(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def dtype_name(model: nn.Module) -> str | None:
    """That of the weights, such as "float32"; None without weights."""
    return next((str(p.dtype).removeprefix("torch.") for p in model.parameters()), None)


def restart_peak_memory(device: str) -> None:
    """Count the peak from now on; on a CPU only in a worker, whose peak is no one else's."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(torch.device(device))
    elif sys.platform == "linux" and multiprocessing.parent_process() is not None:
        with suppress(OSError):  # else the peak counts from the start of the process
            Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(device: str) -> int:
    """Bytes of GPU memory allocated at the peak, or resident bytes of the process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(torch.device(device))
    try:
        return process_status("VmHWM")
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
