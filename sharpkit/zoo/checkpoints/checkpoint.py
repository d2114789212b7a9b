"""One network of a task at one epoch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpkit.display import readable
from sharpkit.errors import ArgumentError, ZooFormatError
from sharpkit.zoo.task import Weights

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from sharpkit.zoo.checkpoints.task import CheckpointTask


@readable(lambda c: f"{c.id} of task {c.task.name}", brief=True)
class Checkpoint:
    """One network at one epoch.

    Args:
        task: The task that it belongs to.
        id: Its id there.
        network: The network's id.
        epoch: Of the checkpoint; None for the last one.
    """

    def __init__(self, task: CheckpointTask, id: str, network: str, epoch: int | None) -> None:
        self.task, self.id, self.network, self._epoch = task, id, network, epoch

    @property
    def epoch(self) -> int:
        """The epoch of the checkpoint."""
        if self._epoch is None:
            self._epoch = self.task.source.epochs(self.network)[-1]
        return self._epoch

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Name to this network's value; "epoch" too in a task of several."""
        found = dict(self.task.source.hyperparameters(self.network))
        return found | ({"epoch": self.epoch} if self.task.epochs is not None else {})

    @property
    def metrics(self) -> dict[str, float]:
        """train_acc, test_acc and what else was recorded at this epoch.

        Raises:
            ZooFormatError: There is no record of it, or an accuracy is missing or not from 0 to 1.
        """
        found = dict(self.task.source.metrics(self.network, self.epoch))
        for name in ("train_acc", "test_acc"):
            value = found.get(name, math.nan)
            if not 0 <= value <= 1:
                shown = f"is {value:g}" if name in found else "is missing or not a finite number"
                raise ZooFormatError(
                    f"{self.task.path}: network {self.network}, epoch {self.epoch}: {name} "
                    f"{shown}; expected a number from 0 to 1, so it is left out"
                )
        return found

    def load(self, weights: Weights = "final") -> nn.Module:
        """The network as a torch module in eval mode.

        Args:
            weights: "final" for those of this checkpoint, "initial" for those of epoch 0.

        Raises:
            ZooFormatError: Damaged files, NaN or infinite weights, no checkpoint of epoch 0, or no
                record of the accuracies, without which a network is of no use.
        """
        self.metrics  # noqa: B018  (raises if the network cannot be rated)
        return self.task.source.load(self.network, self._epoch_of(weights), self.task.way)

    def files(self, weights: Weights = "final") -> list[Path]:
        """What `load` reads."""
        return [*self.task.source.checkpoint_files(self.network, self._epoch_of(weights))]

    @property
    def made_from(self) -> str:
        """What it depends on beside its files: how they are read where they do not tell."""
        return self.task.way if len(self.task.source.ways) > 1 else ""

    def frame(self) -> pd.DataFrame:
        """One row: task, model, the hyperparameters and the metrics."""
        import pandas as pd

        parts = {"task": self.task.name, "model": self.id}, self.hyperparameters, self.metrics
        return pd.concat([pd.DataFrame([part]) for part in parts], axis=1)

    def _epoch_of(self, weights: Weights) -> int:
        if weights not in ("final", "initial"):
            raise ArgumentError(f"weights is {weights!r}; expected 'final' or 'initial'")
        if weights == "final":
            return self.epoch
        if 0 not in self.task.source.epochs(self.network):
            raise ZooFormatError(
                f"{self.task.path}: network {self.network} has no checkpoint of epoch 0, before "
                "training"
            )
        return 0
