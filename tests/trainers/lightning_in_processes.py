"""Started as a user starts a training of Lightning in two processes; writes what each ends with."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from problems import examples, loader, network, weights
from recipes.lightning_automatic import Classifier
from recipes.lightning_manual import AccumulatingClassifier

import sharpkit as sk
from sharpkit.tracking import lightning_callback

torch.set_num_threads(1)


def fit(module, folder, callbacks=(), *, ckpt_path=None, **options):
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=2, default_root_dir=folder,
        callbacks=list(callbacks), enable_checkpointing=bool(callbacks), **options,
    )  # fmt: skip
    trainer.fit(module, loader(batch=4), ckpt_path=ckpt_path)
    return trainer.global_rank, weights(module)


def main(folder: Path) -> None:
    def tracker(name):
        return sk.Tracker(examples(), every=2, out=folder / f"{name}.csv")

    whole, again = tracker("whole"), tracker("again")
    saved = ModelCheckpoint(folder, filename="{step}", every_n_epochs=1, save_top_k=-1)
    rank, automatic = fit(Classifier(network()), folder, [saved, lightning_callback(whole)])
    callbacks = [ModelCheckpoint(folder / "again"), lightning_callback(again)]
    path = folder / "step=4.ckpt"
    _, resumed = fit(Classifier(network()), folder, callbacks, ckpt_path=path)
    _, clipped = fit(Classifier(network()), folder, gradient_clip_val=0.3)
    _, manual = fit(AccumulatingClassifier(network(), accumulate=2, clip=0.3), folder)
    ends = {"automatic": automatic, "resumed": resumed, "clipped": clipped, "manual": manual}
    torch.save({"ends": ends, "rows": whole.rows, "again": again.rows}, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
