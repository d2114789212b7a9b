"""A loop of one's own: SAM as in the trainers, and a checkpoint with the tracker in it."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from problems import close, examples, micro_batches, network, sam_by_hand, same, weights
from recipes.plain_loop import train_step

import sharpkit as sk


def begun():
    model = network()
    return model, sk.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1), tracker()


def tracker():
    return sk.Tracker(examples(), every=1)


def train(model, optimizer, track, steps, done=0, **options):
    for number, batches in enumerate(steps[done:], start=done):
        train_step(model, optimizer, batches, **options)
        track(model, optimizer, step=number + 1)
    return model


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("of", [1, 2])
def test_sam_is_algorithm_1(of, clip):
    steps = micro_batches(of) * 2
    model = train(*begun(), steps, clip=clip)
    assert close(weights(model), weights(sam_by_hand(network(), steps, clip=clip)))


def test_sam_with_bfloat16():
    """8 bits of mantissa: the way is that of float32 to a few per cent of its length."""
    steps = micro_batches(1) * 2
    start, exact, end = (
        torch.cat([w.flatten() for w in weights(m)])
        for m in (network(), sam_by_hand(network(), steps), train(*begun(), steps, bfloat16=True))
    )
    assert not torch.equal(end, exact)
    assert (end - exact).norm() < 0.05 * (exact - start).norm()


def test_a_stopped_training_with_sam_goes_on(tmp_path):
    steps = micro_batches(2) * 3
    model, optimizer, whole = begun()
    for number, batches in enumerate(steps, start=1):
        train_step(model, optimizer, batches, clip=0.3)
        whole(model, optimizer, step=number)
        if number == 3:
            parts = (model, optimizer, whole)
            torch.save([p.state_dict() for p in parts], tmp_path / "checkpoint.pt")
    parts = again, stepper, track = begun()
    for part, state in zip(parts, torch.load(tmp_path / "checkpoint.pt"), strict=True):
        part.load_state_dict(state)
    train(again, stepper, track, steps, done=3, clip=0.3)
    assert same(weights(again), weights(model))
    drop = {"columns": "seconds"}
    pd.testing.assert_frame_equal(track.frame().drop(**drop), whole.frame().drop(**drop))
