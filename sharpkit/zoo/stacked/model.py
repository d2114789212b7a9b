"""A model of a stack."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sharpkit.display import readable
from sharpkit.doors import shown
from sharpkit.errors import ArgumentError, ZooFormatError
from sharpkit.zoo.pgdl.model import models_table
from sharpkit.zoo.pgdl.recorded import gap_of, hyperparameters_of, metrics_of
from sharpkit.zoo.stacked.file import KINDS, StackFile
from sharpkit.zoo.task import Weights

if TYPE_CHECKING:
    import pandas as pd

    from sharpkit.zoo.keras import KerasModel
    from sharpkit.zoo.stacked.task import StackedTask


@readable(lambda e: f"{e.id} of task {e.task.name}", brief=True)
class StackedModel:
    """One trained network of a stack, as `PgdlModel` is one of files of its own.

    Args:
        task: The task that it belongs to.
        id: Its id, digits.
    """

    def __init__(self, task: StackedTask, id: str) -> None:
        self.task, self.id = task, id

    def frame(self) -> pd.DataFrame:
        """One row: task, model, the hyperparameters and the metrics; see `StackedTask.frame`."""
        return models_table([self])

    @property
    def config(self) -> dict[str, Any]:
        """What the competition has in config.json."""
        return self.task._stack(self.id).config(self.id)

    def build(self, device: str = "meta") -> KerasModel:
        """The architecture without this model's weights; on "meta" nothing is allocated."""
        from sharpkit.zoo.keras.model import build_model

        where = self.task._stack(self.id).where(self.id)
        return build_model(self.config, model_name=where, device=device)

    def files(self, weights: Weights = "final") -> list[Path]:
        """The file of the stack, which has other networks as well: see `digest`."""
        _check(weights)
        return [self.task._stack(self.id).path]

    def digest(self, weights: Weights = "final") -> str:
        """SHA-256 of what `load` reads: of this network alone, whatever else is in its file.

        Raises:
            ZooFormatError: The file is gone or cut short.
        """
        _check(weights)
        return self._stack().digest(self.id, weights)

    def load(self, weights: Weights = "final") -> KerasModel:
        """The network as a torch module in eval mode.

        Args:
            weights: "final" for the trained weights, "initial" for those before training.

        Returns:
            KerasModel: As `PgdlModel.load` returns it.

        Raises:
            ZooFormatError: Unknown layer or keyword, a file that was cut short, a wrong checksum,
                shapes that do not agree, NaN or infinite weights; names the file and the network.
        """
        from sharpkit.zoo.keras.weights import assign_weights

        _check(weights)
        stack = self._stack()
        model = self.build()
        wanted = {s.target: s.torch_shape for _, slots in model.slots for s in slots}
        there = dict(stack.shape)
        if there != wanted:
            raise ZooFormatError(
                f"{stack.where(self.id)}: has tensors of shapes {shown(there)}; the config needs "
                f"{shown(wanted)}"
            )
        tensors = stack.load(self.id, weights)
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ZooFormatError(f"{stack.where(self.id)}: {shown(name)} is NaN or infinite")
        assign_weights(model, tensors.items())
        return model.eval()

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Hyperparameter name to this model's value."""
        return hyperparameters_of(self.task, self.id)

    @property
    def metrics(self) -> dict[str, float]:
        """train_acc, test_acc and whatever else was recorded at the end of training."""
        return metrics_of(self.task, self.id)

    @property
    def generalization_gap(self) -> float:
        """Training accuracy minus test accuracy."""
        return gap_of(self.task, self.id)

    def _stack(self) -> StackFile:
        """The file that has it, brought here if the task is remote."""
        stack = self.task._stack(self.id)
        self.task.local(stack.path)
        return stack


def _check(weights: Weights) -> None:
    if weights not in KINDS:
        raise ArgumentError(f"weights is {weights!r}; expected 'final' or 'initial'")
