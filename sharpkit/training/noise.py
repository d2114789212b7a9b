"""Random numbers drawn twice: both passes of SAM see the same dropout masks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Noise:
    """The random state of the CPU and of some GPUs, to be replayed.

    Args:
        devices: Those of other types than CUDA have no state of their own.
    """

    def __init__(self, *devices: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}

    @classmethod
    def of(cls, parameters: Iterable[Tensor]) -> Noise:
        """The state of every device that holds parameters."""
        return cls(*{p.device for p in parameters})

    def replay(self) -> None:
        """Put the state back as it was."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
