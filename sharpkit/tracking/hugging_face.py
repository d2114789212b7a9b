"""A tracker called by the Trainer of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sharpkit.errors import ArgumentError, RunError
from sharpkit.files import atomic_path, disk_errors
from sharpkit.tensor_files import read_torch
from sharpkit.tracking.tracker import Tracker

_FILE = "sharpkit_tracker.pt"


def hugging_face_callback(tracker: Tracker, *, resume_from: str | Path | None = None) -> Any:
    """A `TrainerCallback` that calls a tracker on the main process, and saves it in checkpoints.

    A tracker with `DistributedData` is called on every process. The optimizer has the learning rate
    of its next step when the tracker is called.

    Args:
        tracker: What is called before the first step, after each, and at the ends of epochs.
        resume_from: The checkpoint folder that `Trainer.train(resume_from_checkpoint=...)` is
            given; None for `checkpoint-N` in the output directory.

    Returns:
        A `transformers.TrainerCallback`.

    Raises:
        ArgumentError: If transformers is not installed.
    """
    try:
        from transformers import TrainerCallback as Base
    except ImportError as error:
        raise ArgumentError(
            f"hugging_face_callback needs transformers (pip install transformers): {error}"
        ) from error
    base: Any = Base

    class TrackerCallback(base):  # type: ignore[misc]
        """Calls a `sharpkit.Tracker`."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """The initial weights, or those of a checkpoint."""
            if state.global_step and (state.is_world_process_zero or tracker.on_every_rank):
                _load(tracker, Path(resume_from or _folder(args, state)))
            self._look(state, given, epoch=0 if state.global_step == 0 else None)

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """After a step of the optimizer."""
            self._look(state, given)

        def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """After an epoch."""
            self._look(state, given, epoch=round(state.epoch))

        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """Beside the weights of a checkpoint."""
            if state.is_world_process_zero:
                _save(tracker, _folder(args, state))

        def _look(self, state: Any, given: dict[str, Any], epoch: int | None = None) -> None:
            if state.is_world_process_zero or tracker.on_every_rank:
                model, optimizer = given["model"], given.get("optimizer")
                tracker(model, optimizer, step=state.global_step, epoch=epoch)

    return TrackerCallback()


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _save(tracker: Tracker, folder: Path) -> None:
    import torch

    path = folder / _FILE
    with disk_errors(path), atomic_path(path) as temporary:
        torch.save(tracker.state_dict(), temporary)


def _load(tracker: Tracker, folder: Path) -> None:
    path = folder / _FILE
    if not path.is_file():
        raise RunError(
            f"{path}: is missing, so the rows before this step are not known. Give "
            "hugging_face_callback(tracker, resume_from=...) the checkpoint's folder, or go on "
            "without a tracker"
        )
    tracker.load_state_dict(read_torch(path, f"{path}: the tracker's state is damaged", RunError))
