"""A tracker called by Lightning's trainer."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from sharpkit.errors import ArgumentError
from sharpkit.tracking.tracker import Tracker


def lightning_callback(tracker: Tracker, *, module: str = "") -> Any:
    """A Lightning `Callback` that calls a tracker on rank 0, and is saved in its checkpoints.

    A tracker with `DistributedData` is called on every rank.
    Steps are `trainer.global_step`, which counts optimizer steps: with accumulated gradients the
    batches between them are passed over. With several optimizers none is given to the tracker.

    Args:
        tracker: What is called before the first step, after each, and at the ends of epochs.
        module: Name of the network in the LightningModule, such as "net"; "" if its own `forward`
            takes the inputs and returns the outputs.

    Returns:
        A `lightning.pytorch.Callback`, or one of `pytorch_lightning` if that has been imported.

    Raises:
        ArgumentError: If neither is installed.
    """
    callback: Any = _library().Callback

    class TrackerCallback(callback):  # type: ignore[misc]
        """Calls a `sharpkit.Tracker`."""

        @property
        def state_key(self) -> str:
            """Its name in checkpoints."""
            return "sharpkit.Tracker"

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            """Before a checkpoint is loaded, on every process."""
            self._main = trainer.is_global_zero

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            """The initial weights."""
            if trainer.global_step == 0:
                self._look(trainer, pl_module, epoch=0)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
            """After a batch, and perhaps a step."""
            self._look(trainer, pl_module)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            """After an epoch."""
            self._look(trainer, pl_module, epoch=trainer.current_epoch + 1)

        def _look(self, trainer: Any, pl_module: Any, epoch: int | None = None) -> None:
            if self._main or tracker.on_every_rank:
                one = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
                model = pl_module.get_submodule(module)
                tracker(model, one, step=trainer.global_step, epoch=epoch)

        def state_dict(self) -> dict[str, Any]:
            """Of the tracker."""
            return tracker.state_dict()

        def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
            """Of the tracker, which writes its file on rank 0 only."""
            if self._main:
                tracker.load_state_dict(state_dict)

    return TrackerCallback()


def _library() -> Any:
    """The package whose trainer is used: the one that has been imported, or the newer one."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        if name in sys.modules:
            return sys.modules[name]
    try:
        import lightning.pytorch as library
    except ImportError:
        try:
            import pytorch_lightning as library
        except ImportError as error:
            raise ArgumentError(
                f"lightning_callback needs Lightning (pip install lightning): {error}"
            ) from error
    return library
