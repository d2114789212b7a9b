"""What a training tells of its steps, to whoever follows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer


class StepTracker(Protocol):
    """Called before the first step and after every step; `sharpkit.Tracker` is one."""

    @property
    def on_every_rank(self) -> bool:
        """Whether every process of a training calls it, not rank 0 alone."""
        ...

    def __call__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        step: int,
        epoch: int | None = None,
    ) -> object:
        """Look at the model, and leave it as it is; `epoch` is given where one has just ended."""
        ...

    def begin(self, folder: Path | None, state: Mapping[str, Any] | None) -> None:
        """Begin, in a run directory or without one, with the state of a checkpoint or none."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint."""
        ...
