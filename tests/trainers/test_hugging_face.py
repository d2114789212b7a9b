"""The Trainer of Hugging Face: a tracker sees its steps and goes on with its checkpoints."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from problems import close, same, weights
from sentences import SgdSamTrainer, bert, by_hand, sam_trained, sentences, trainer

import sharpkit as sk
from sharpkit.errors import RunError
from sharpkit.tracking import hugging_face_callback


def tracker(**options):
    return sk.Tracker(sentences(), **{"measures": ("loss", "stability"), "every": 2, **options})


def rows(track):
    return track.frame().drop(columns="seconds")


def test_training_is_the_same_with_a_tracker(tmp_path):
    plain = trainer(tmp_path / "plain")
    plain.train()
    track = tracker()
    tracked = trainer(tmp_path / "tracked", [hugging_face_callback(track)])
    tracked.train()
    assert same(weights(plain.model), weights(tracked.model))
    frame = track.frame()
    assert frame.step.tolist() == [0, 2, 4, 6, 8]
    assert frame.preconditioned_lambda_max.notna().tolist() == [False, True, True, True, True]
    assert frame.threshold[1] == pytest.approx(38 / frame.lr[1], rel=1e-6)


def test_it_goes_on_with_a_checkpoint(tmp_path):
    whole = tracker()
    trainer(tmp_path / "whole", [hugging_face_callback(whole)]).train()
    track = tracker(out=tmp_path / "rows.csv")
    again = trainer(tmp_path / "whole", [hugging_face_callback(track)])
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    pd.testing.assert_frame_equal(rows(track), rows(whole))
    assert pd.read_csv(tmp_path / "rows.csv").step.tolist() == [0, 2, 4, 6, 8]


def test_a_checkpoint_without_a_tracker_says_so(tmp_path):
    trainer(tmp_path, max_steps=4).train()
    with pytest.raises(RunError, match=r"checkpoint-4.sharpkit_tracker.pt: is missing"):
        trainer(tmp_path, [hugging_face_callback(tracker())]).train(resume_from_checkpoint=True)


def test_accumulated_gradients_make_one_step(tmp_path):
    track = tracker(every=1)
    callback = hugging_face_callback(track)
    trainer(tmp_path, [callback], gradient_accumulation_steps=3, max_steps=4).train()
    assert track.frame().step.tolist() == [0, 1, 2, 3, 4]


def test_epochs(tmp_path):
    track = tracker(measures="loss", every=1, per="epoch")
    options = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "no"}
    trainer(tmp_path, [hugging_face_callback(track)], **options).train()
    assert track.frame()[["step", "epoch"]].to_numpy().tolist() == [[0, 0], [6, 1], [12, 2]]


# --- SAM --------------------------------------------------------------------------------------


class SometimesTrainer(SgdSamTrainer):
    interval = 2


@pytest.mark.parametrize("of", [1, 2])
@pytest.mark.parametrize("clip", [1e9, 0.3], ids=["unclipped", "clipped"])
def test_sam_is_algorithm_1(of, clip, tmp_path):
    model = sam_trained(tmp_path, of, max_grad_norm=clip)
    assert close(weights(model), weights(by_hand(of, clip)))


@pytest.mark.parametrize("of", [1, 2])
def test_sam_in_some_steps(of, tmp_path):
    model = sam_trained(tmp_path, of, kind=SometimesTrainer, max_grad_norm=0.3)
    assert close(weights(model), weights(by_hand(of, 0.3, interval=2)))


def test_sam_with_bfloat16_and_a_tracker(tmp_path):
    """8 bits of mantissa: the way is that of float32 to some per cent of its length."""
    track = tracker(every=1, measures=["loss", "lambda_max"])
    callback = hugging_face_callback(track)
    model = sam_trained(tmp_path, 1, [callback], bf16=True, dtype=torch.float32, max_grad_norm=1e9)
    exact, start, end = (
        torch.cat([w.flatten() for w in weights(m)])
        for m in (by_hand(1, 1e9, torch.float32), bert(), model)
    )
    assert not torch.equal(end, exact)
    assert (end - exact).norm() < 0.1 * (exact - start).norm()
    assert track.frame().step.tolist() == [0, 1, 2, 3]


def test_a_stopped_training_with_sam_goes_on(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_grad_norm": 0.3}
    tracks = tracker(every=1), tracker(every=1)
    whole = sam_trained(tmp_path, 2, [hugging_face_callback(tracks[0])], **saving)
    path = str(tmp_path / "checkpoint-2")
    again = sam_trained(tmp_path, 2, [hugging_face_callback(tracks[1])], resume=path, **saving)
    assert same(weights(again), weights(whole))
    pd.testing.assert_frame_equal(rows(tracks[1]), rows(tracks[0]))
    assert rows(tracks[0]).threshold.nunique() == 4  # SAM's falls with the norm of the gradient
