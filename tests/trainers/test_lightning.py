"""Lightning: a tracker in its trainer, resumed by its checkpoints; SAM in both of its ways."""

from __future__ import annotations

import warnings

import lightning as L
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from problems import close, examples, loader, micro_batches, network, sam_by_hand, same, weights
from recipes.lightning_automatic import Classifier
from recipes.lightning_manual import AccumulatingClassifier
from recipes.lightning_tracked import tracked_fit

import sharpkit as sk
from sharpkit.errors import ArgumentError
from sharpkit.tracking import lightning_callback


class Plain(Classifier):
    def on_train_start(self):
        pass  # Adam takes accumulated gradients

    optimizer_step = L.LightningModule.optimizer_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(module, folder, callbacks=(), *, ckpt_path=None, **options):
    settings = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "max_epochs": 3, "default_root_dir": str(folder), **options,
    }  # fmt: skip
    if not any(isinstance(c, ModelCheckpoint) for c in callbacks):
        settings["enable_checkpointing"] = False
    trainer = L.Trainer(callbacks=list(callbacks), **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(num_workers|bottleneck).*")
        trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return module


def tracker(**options):
    return sk.Tracker(examples(), **{"measures": ("loss", "stability"), "every": 3, **options})


def rows(track):
    return track.frame().drop(columns="seconds")


def test_training_is_the_same_with_a_tracker(tmp_path):
    track = tracker()
    plain = fit(Plain(network()), tmp_path)
    tracked = fit(Plain(network()), tmp_path, [lightning_callback(track)])
    assert same(weights(plain), weights(tracked))
    assert track.frame().step.tolist() == [0, 3, 6, 9, 12]
    assert track.frame().preconditioned_lambda_max.notna().sum() == 4


@pytest.mark.parametrize("per", ["step", "epoch"])
def test_it_goes_on_with_a_checkpoint(per, tmp_path):
    every = {"step": 3, "epoch": 1}[per]
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1)
    whole = tracker(every=every, per=per)
    # a tracker that stands behind the checkpoint is called before it all the same
    fit(Plain(network()), tmp_path, [saved, lightning_callback(whole)])
    track = tracker(every=every, per=per, out=tmp_path / "rows.csv")
    again = Plain(network())
    path = str(tmp_path / "step=8.ckpt")
    fit(again, tmp_path, [lightning_callback(track)], ckpt_path=path)
    pd.testing.assert_frame_equal(rows(track), rows(whole))
    assert len(pd.read_csv(tmp_path / "rows.csv")) == len(whole.rows)


def test_accumulated_gradients_make_one_step(tmp_path):
    track = tracker(every=1)
    fit(Plain(network()), tmp_path, [lightning_callback(track)], accumulate_grad_batches=2)
    assert track.frame().step.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_the_network_may_be_a_part_of_the_module(tmp_path):
    class Silent(Plain):
        def forward(self, x):
            raise AssertionError("not the network's own")

        def training_step(self, batch, number):
            return torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    track = tracker()
    fit(Silent(network()), tmp_path, [lightning_callback(track, module="network")], max_epochs=1)
    assert track.frame().step.tolist() == [0, 3]


def test_several_optimizers_have_no_threshold(tmp_path):
    class Two(Plain):
        def configure_optimizers(self):
            self.automatic_optimization = False
            return [torch.optim.SGD([p], lr=0.1) for p in self.parameters()]

    with pytest.raises(ArgumentError, match='measure "lambda_max"'):
        fit(Two(network()), tmp_path, [lightning_callback(tracker())], max_epochs=1)


def test_three_lines_make_a_curve(tmp_path):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    rows = tracked_fit(
        Classifier(network()), loader(), tmp_path / "curve.png", n=32, max_epochs=5,
        accelerator="cpu", default_root_dir=tmp_path, **quiet,
    ).frame()  # fmt: skip
    assert rows.step.tolist() == [0, 10, 20] and (rows.lambda_max > 0).all()
    assert (tmp_path / "curve.png").is_file()


# --- SAM --------------------------------------------------------------------------------------


def test_sam_with_automatic_optimisation(tmp_path):
    module = fit(Classifier(network()), tmp_path, max_epochs=2)
    assert close(weights(module), weights(sam_by_hand(network(), micro_batches(1) * 2)))


def test_sam_in_some_steps(tmp_path):
    module = fit(Classifier(network(), interval=2), tmp_path, max_epochs=2)
    assert close(weights(module), weights(sam_by_hand(network(), micro_batches(1) * 2, interval=2)))


def test_sam_with_clipping_by_lightning(tmp_path):
    """It clips in the closure, so both gradients: the first one's length does not matter."""
    module = fit(Classifier(network()), tmp_path, max_epochs=2, gradient_clip_val=0.3)
    assert close(weights(module), weights(sam_by_hand(network(), micro_batches(1) * 2, clip=0.3)))


def test_sam_refuses_batches_that_lightning_keeps_to_itself(tmp_path):
    with pytest.raises(ValueError, match="last of the accumulated batches"):
        fit(Classifier(network()), tmp_path, accumulate_grad_batches=2)


def test_sam_with_accumulated_gradients(tmp_path):
    track = tracker(every=1, measures="loss")
    module = AccumulatingClassifier(network(), accumulate=2, clip=0.3)
    fit(module, tmp_path, [lightning_callback(track)], max_epochs=2)
    assert close(weights(module), weights(sam_by_hand(network(), micro_batches(2) * 2, clip=0.3)))
    assert track.frame().step.tolist() == [0, 1, 2, 3, 4]


KINDS = {
    "automatic": (1, lambda: Classifier(network())),
    "manual": (2, lambda: AccumulatingClassifier(network(), accumulate=2, clip=0.3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sam_with_bfloat16(kind, tmp_path):
    """8 bits of mantissa: the way is that of float32 to a few per cent of its length."""
    of, build = KINDS[kind]
    clipped = {"gradient_clip_val": 0.3} if kind == "automatic" else {}
    module = fit(build(), tmp_path, max_epochs=2, precision="bf16-mixed", **clipped)
    by_hand = sam_by_hand(network(), micro_batches(of) * 2, clip=0.3)
    start, exact, end = (
        torch.cat([w.flatten() for w in weights(m)]) for m in (network(), by_hand, module)
    )
    assert not torch.equal(end, exact)
    assert (end - exact).norm() < 0.05 * (exact - start).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_training_with_sam_goes_on(kind, tmp_path):
    of, build = KINDS[kind]
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1)
    tracks = tracker(every=1), tracker(every=1)
    whole = fit(build(), tmp_path, [saved, lightning_callback(tracks[0])])
    path = str(tmp_path / f"step={8 // of}.ckpt")
    again = fit(build(), tmp_path, [lightning_callback(tracks[1])], ckpt_path=path)
    assert same(weights(again), weights(whole))
    pd.testing.assert_frame_equal(rows(tracks[1]), rows(tracks[0]))
    assert rows(tracks[0]).threshold.notna().all()
