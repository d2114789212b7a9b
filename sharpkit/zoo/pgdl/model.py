"""A model in the PGDL competition's files: config.json and HDF5 weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpkit.display import readable
from sharpkit.errors import ArgumentError, ZooFormatError
from sharpkit.zoo.files import read_json
from sharpkit.zoo.pgdl.recorded import gap_of, hyperparameters_of, metrics_of
from sharpkit.zoo.task import Weights

if TYPE_CHECKING:
    import pandas as pd

    from sharpkit.zoo.keras import KerasModel
    from sharpkit.zoo.pgdl.task import PgdlTask
    from sharpkit.zoo.stacked.model import StackedModel

WEIGHT_FILES = {"final": "weights.hdf5", "initial": "weights_init.hdf5"}


@readable(lambda e: f"{e.id} of task {e.task.name}", brief=True)
class PgdlModel:
    """One trained network: its architecture, weights, hyperparameters and accuracies.

    Args:
        task: The task that it belongs to.
        id: Its id, the digits of `model_<id>`.
        path: Its directory.
    """

    def __init__(self, task: PgdlTask, id: str, path: Path) -> None:
        self.task, self.id, self.path = task, id, path

    def frame(self) -> pd.DataFrame:
        """One row: task, model, the hyperparameters and the metrics; see `PgdlTask.frame`."""
        return models_table([self])

    @property
    def config(self) -> dict[str, Any]:
        """The parsed config.json."""
        config = read_json(self.task.local(self.path / "config.json"))
        if not isinstance(config, dict):
            raise ZooFormatError(f"{self.path / 'config.json'}: expected a JSON object")
        return config

    def build(self, device: str = "meta") -> KerasModel:
        """The architecture without this model's weights; on "meta" nothing is allocated."""
        from sharpkit.zoo.keras.model import build_model

        return build_model(self.config, model_name=str(self.path / "config.json"), device=device)

    def weights_path(self, weights: Weights = "final") -> Path:
        """The weight file of the trained or the freshly initialised network; see `Task.local`."""
        if weights not in WEIGHT_FILES:
            raise ArgumentError(f"weights is {weights!r}; expected 'final' or 'initial'")
        return self.path / WEIGHT_FILES[weights]

    def files(self, weights: Weights = "final") -> list[Path]:
        """config.json and the weight file."""
        return [self.path / "config.json", self.weights_path(weights)]

    def load(self, weights: Weights = "final") -> KerasModel:
        """The network as a torch module in eval mode.

        Args:
            weights: "final" for the trained weights, "initial" for those before training.

        Returns:
            KerasModel: Takes float32 (n, c, h, w), or (n, d); returns what the network's last
            layer returns, logits in a PGDL zoo.

        Raises:
            ZooFormatError: Unknown layer or keyword, damaged weights, shapes that do not agree,
                NaN or infinite weights; names the file and the layer.
        """
        from sharpkit.zoo.keras.weights import load_weights

        path = self.weights_path(weights)
        model = self.build()
        load_weights(model, self.task.local(path))
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


def models_table(models: Sequence[PgdlModel | StackedModel]) -> pd.DataFrame:
    """One row per model: task, model, hyperparameters, metrics.

    A hyperparameter and a metric of the same name are two columns.
    """
    import pandas as pd

    ids = [{"task": model.task.name, "model": model.id} for model in models]
    parts = [ids, [model.hyperparameters for model in models], [model.metrics for model in models]]
    return pd.concat([pd.DataFrame(rows) for rows in parts], axis=1)
