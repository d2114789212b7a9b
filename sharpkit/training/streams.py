"""Random streams derived from a seed: each purpose and each epoch has one of its own.

Nothing is carried from one epoch to the next, so a training that goes on from a checkpoint draws
what it would have drawn anyway.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def stream_seed(seed: int, purpose: str, *index: int) -> int:
    """A seed that no other purpose or index shares.

    Example:
        >>> stream_seed(0, "order", 1) == stream_seed(0, "order", 1)
        True
        >>> stream_seed(0, "order", 1) == stream_seed(0, "dropout", 1)
        False
    """
    key = (seed, zlib.crc32(purpose.encode()), *index)
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def stream(seed: int, purpose: str, *index: int) -> torch.Generator:
    """A generator on the CPU, so that every device sees the same numbers."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, *index))


@contextmanager
def global_stream(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Inside, modules that draw from torch's global state (dropout) draw from the seed.

    The caller's state is put back; of GPUs, only the given device is touched.
    """
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for gpu in cuda:
            torch.cuda.default_generators[gpu.index or 0].manual_seed(seed)
        yield
