"""Started by torchrun, as a user starts the Trainer of Hugging Face in two processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from problems import weights
from sentences import sam_trained, sentences

import sharpkit as sk
from sharpkit.tracking import hugging_face_callback

torch.set_num_threads(1)


def main(folder: Path) -> None:
    def tracked(name, *, resume=None):
        track = sk.Tracker(sentences(), every=1, out=folder / f"{name}.csv")
        saving = {"save_strategy": "steps", "save_steps": 1, "max_grad_norm": 0.3}
        callbacks = [hugging_face_callback(track, resume_from=resume)]
        return weights(sam_trained(folder, 1, callbacks, resume=resume, **saving)), track.rows

    whole, rows = tracked("whole")
    resumed, again = tracked("again", resume=str(folder / "checkpoint-2"))
    accumulated = weights(sam_trained(folder, 3, max_grad_norm=0.3))
    ends = {"automatic": whole, "resumed": resumed, "accumulated": accumulated}
    torch.save({"ends": ends, "rows": rows, "again": again}, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
