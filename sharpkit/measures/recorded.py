"""What a zoo recorded of the training of its models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from sharpkit.contract.loading import Data
from sharpkit.errors import ModelError
from sharpkit.measures.measure import needed

KINDS = ("steps", "iterations", "epochs")


@dataclass(frozen=True)
class TrainingSteps:
    """How long a model was trained, as far as the zoo recorded it among the model's metrics.

    Fast training is one of the oldest predictors of generalization. Cost: none; neither the model
    nor the data are looked at.

    Source:
        Jiang et al., ICLR 2020 (1912.02178), optimisation-based measures; there the steps to reach
        a given cross-entropy, which a zoo trained to one loss records.

    Example:
        >>> TrainingSteps()(nn.Linear(1, 1), [], seed=0, metrics={"train_acc": 1.0, "epochs": 60})
        {'form=epochs': 60.0}
    """

    name: str = field(default="training_steps", init=False)
    needs_metrics: bool = field(default=True, init=False)

    def __call__(
        self, model: nn.Module, data: Data, *, seed: int, metrics: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """The metrics called steps, iterations or epochs, by name.

        Raises:
            ArgumentError: If no metrics are given.
            ModelError: If they record none of the three.
        """
        metrics = needed(self.name, "metrics", metrics)
        found = {f"form={kind}": float(metrics[kind]) for kind in KINDS if kind in metrics}
        if not found:
            raise ModelError(
                f"the metrics record {', '.join(metrics) or 'nothing'}: "
                f"expected one of {', '.join(KINDS)}"
            )
        return found
