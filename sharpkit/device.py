"""Devices that a user names."""

from __future__ import annotations

import torch

from sharpkit.errors import ArgumentError


def check_device(device: str | torch.device) -> None:
    """Raise ArgumentError unless this process can use the device.

    Example:
        >>> check_device("gpu")
        Traceback (most recent call last):
        sharpkit.errors.ArgumentError: device 'gpu' cannot be used: Expected one of cpu, cuda...
    """
    try:
        trouble = _trouble(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        trouble = str(error).splitlines()[0]
    if trouble:
        raise ArgumentError(f"device {str(device)!r} cannot be used: {trouble}")


def _trouble(device: torch.device) -> str:
    if device.type != "cuda":
        torch.empty(0, device=device)
        return ""
    count = torch.cuda.device_count()  # a tensor on a GPU would take memory in this process
    return "" if (device.index or 0) < count else f"PyTorch finds {count} CUDA GPUs"
