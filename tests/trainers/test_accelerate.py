"""Accelerate: a tracker is a plain callable, and one of the objects that it saves."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from problems import close, examples, loader, micro_batches, network, sam_by_hand, same, weights
from recipes.accelerate_loop import train_step
from torch import nn

import sharpkit as sk


def trained(track, steps, folder=None, *, resume=False, precision="no", accumulate=1):
    """So many batches, a checkpoint after the fourth."""
    accelerator = Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate
    )
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader())
    if track is not None:
        accelerator.register_for_checkpointing(track)
    done = 0
    if resume:
        accelerator.load_state(str(folder))
        done = 4
    elif track is not None:
        track(model, optimizer, step=0)
    every = list(batches) * 10
    for number in range(done, steps):
        x, y = every[number]
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if track is not None and accelerator.is_main_process and accelerator.sync_gradients:
            track(model, optimizer, step=(number + 1) // accumulate)
        if folder is not None and not resume and number == 3:
            accelerator.save_state(str(folder))
    inner = accelerator.unwrap_model(model)
    accelerator.free_memory()
    return inner


def tracker(**options):
    return sk.Tracker(examples(), **{"measures": ("loss", "stability"), "every": 2, **options})


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_is_the_same_with_a_tracker(precision):
    track = tracker()
    plain, tracked = trained(None, 8, precision=precision), trained(track, 8, precision=precision)
    assert same(weights(plain), weights(tracked))
    # measured in float32, not under the autocast that Accelerate has put into the model's forward
    exact = sk.Tracker(examples(), measures="lambda_max")(network_of(tracked), step=0)
    row = sk.Tracker(examples(), measures="lambda_max")(tracked, step=0)
    assert row["lambda_max"] == pytest.approx(exact["lambda_max"], rel=1e-6)
    assert track.frame().step.tolist() == [0, 2, 4, 6, 8]


def network_of(model):
    own = network()
    own.load_state_dict(model.state_dict())
    return own


def test_the_wrapped_forward_is_there_after_a_call():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(network())
    x, _ = examples()
    before = model(x)
    forward = model.forward
    low = sk.Tracker(examples(), measures="loss")(model, step=0)["loss"]
    high = sk.Tracker(examples(), measures="loss")(network(), step=0)["loss"]
    assert low == high
    assert model.forward is forward and torch.equal(model(x), before)
    assert not torch.equal(before, network()(x))  # bfloat16 it was, and is


def test_it_is_saved_and_goes_on(tmp_path):
    whole = tracker()
    trained(whole, 8, tmp_path / "state")
    track = tracker()
    trained(track, 8, tmp_path / "state", resume=True)
    drop = {"columns": "seconds"}
    pd.testing.assert_frame_equal(track.frame().drop(**drop), whole.frame().drop(**drop))


def test_accumulated_gradients_make_one_step():
    track = tracker(every=1)
    trained(track, 8, accumulate=2)
    assert track.frame().step.tolist() == [0, 1, 2, 3, 4]


# --- SAM --------------------------------------------------------------------------------------


def sam_trained(of, clip=None, precision="no", track=None, folder=None, resume=False, **where):
    """Two epochs; with a folder, a checkpoint after the first, or begun from it."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = network()
    optimizer = sk.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, **where)
    model, optimizer = accelerator.prepare(model, optimizer)
    if track is not None:
        accelerator.register_for_checkpointing(track)
    if resume:
        accelerator.load_state(str(folder))
    epoch = micro_batches(of)
    for step, batches in enumerate(epoch * 2, start=1):
        if resume and step <= len(epoch):
            continue
        train_step(accelerator, model, optimizer, batches, clip)
        if track is not None:
            track(model, optimizer, step=step)
        if folder is not None and step == len(epoch):
            accelerator.save_state(str(folder))
    inner = accelerator.unwrap_model(model)
    accelerator.free_memory()
    return inner


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("of", [1, 2])
def test_sam_is_algorithm_1(of, clip):
    expected = sam_by_hand(network(), micro_batches(of) * 2, clip=clip)
    assert close(weights(sam_trained(of, clip)), weights(expected))


@pytest.mark.parametrize("of", [1, 2])
def test_sam_in_some_steps(of):
    expected = sam_by_hand(network(), micro_batches(of) * 2, clip=0.3, interval=2)
    assert close(weights(sam_trained(of, 0.3, interval=2)), weights(expected))


def test_sam_with_bfloat16():
    """8 bits of mantissa: the way is that of float32 to a few per cent of its length."""
    exact = sam_by_hand(network(), micro_batches(1) * 2)
    flat = [torch.cat([w.flatten() for w in weights(m)]) for m in
            (network(), exact, sam_trained(1, precision="bf16"))]  # fmt: skip
    assert not torch.equal(flat[2], flat[1])
    assert (flat[2] - flat[1]).norm() < 0.05 * (flat[1] - flat[0]).norm()


def test_a_stopped_training_with_sam_goes_on(tmp_path):
    whole, track = tracker(every=1), tracker(every=1)
    first = sam_trained(2, 0.3, track=whole, folder=tmp_path / "state")
    again = sam_trained(2, 0.3, track=track, folder=tmp_path / "state", resume=True)
    assert same(weights(again), weights(first))
    drop = {"columns": "seconds"}
    pd.testing.assert_frame_equal(track.frame().drop(**drop), whole.frame().drop(**drop))
