"""What a training shows while it runs: a progress bar, a line per epoch, TensorBoard."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sharpkit.errors import ArgumentError
from sharpkit.files import disk_errors
from sharpkit.progress import progress_bar
from sharpkit.training.run_files import Row


class Reporter:
    """Shows a training's progress.

    Its bar is over all steps: its estimate of the time left is for the whole training.
    """

    def __init__(self, bar: Any, writer: Any, epochs: int) -> None:
        self._bar, self._writer, self._epochs = bar, writer, epochs

    def step(self) -> None:
        """One more step is done."""
        self._bar.update()

    def loss(self, value: float, last: Row | None) -> None:
        """Show the loss of the steps of this epoch, and the accuracy after the last one."""
        text = f"loss {value:.4g}"
        if last is not None:
            text += f", accuracy {_shown(last)}"
        self._bar.set_postfix_str(text, refresh=False)

    def epoch(self, row: Row) -> None:
        """Print the line of an epoch, and log it."""
        if not self._bar.disable:
            text = f"epoch {row['epoch']:g}/{self._epochs}: loss {row['loss']:.4g}"
            self._bar.write(f"{text}, accuracy {_shown(row)}, {row['seconds']:.1f} s", sys.stderr)
        if self._writer is not None:
            for name, value in row.items():
                if name != "epoch" and value == value:
                    self._writer.add_scalar(name, value, int(row["epoch"]))
            self._writer.flush()


def _shown(row: Row) -> str:
    parts = [
        f"{100 * row[f'{split}_accuracy']:.2f} % {split}"
        for split in ("train", "test")
        if row[f"{split}_accuracy"] == row[f"{split}_accuracy"]
    ]
    return ", ".join(parts) or "not evaluated"


@contextmanager
def reporting(
    epochs: int, steps: int, history: Iterable[Row], board: Path | None, *, progress: bool
) -> Iterator[Reporter]:
    """A reporter for a training of some epochs and steps per epoch, part of which may be done.

    `steps` are those of an epoch, `history` the epochs that are done, `board` the folder for
    TensorBoard's files or None.

    Raises:
        ArgumentError: If TensorBoard is not installed.
        RunError: If the folder cannot be written, such as because it is a file.
    """
    done = len(list(history))
    writer = None
    if board is not None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ArgumentError(
                f"tensorboard=True needs the package (pip install tensorboard): {error}"
            ) from error
        with disk_errors(board):
            # what a killed process logged after its last checkpoint is shown no more
            writer = SummaryWriter(board, purge_step=done + 1)
    bar = progress_bar(
        desc="training", total=epochs * steps, initial=done * steps, unit="step",
        progress=progress and done < epochs,
    )  # fmt: skip
    try:
        yield Reporter(bar, writer, epochs)
    finally:
        bar.close()
        if writer is not None:
            writer.close()
