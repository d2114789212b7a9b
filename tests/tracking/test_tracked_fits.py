"""`sk.fit(track=...)` and `sharpkit train --track`: rows beside the log, resumed with it."""

from __future__ import annotations

import pandas as pd
import pytest
from click.testing import CliRunner
from fits import fit, images, same_weights

import sharpkit as sk
from sharpkit.cli import main
from sharpkit.errors import ArgumentError, RunError
from sharpkit.training import loop

MEASURES = ("loss", "stability", "distance")


pytestmark = pytest.mark.usefixtures("one_thread")


def tracker(**options):
    return sk.Tracker(images(32), **{"measures": MEASURES, "every": 3, **options})


def rows(frame):
    return frame.drop(columns="seconds")


@pytest.fixture(scope="module", params=["sgd", "sam"])
def whole(request):
    """A training of 4 epochs of 4 steps, with a tracker and without."""
    settings = {"optimizer": request.param}
    track = tracker()
    return settings, fit(**settings), fit(track=track, **settings), track


def test_the_weights_are_those_without_a_tracker(whole):
    _, plain, tracked, track = whole
    assert same_weights(plain.model, tracked.model)
    columns = [name for name in plain.history if name != "seconds"]
    assert plain.history[columns].equals(tracked.history[columns])
    assert track.frame().step.tolist() == [0, 3, 6, 9, 12, 15]


def test_the_threshold_follows_the_learning_rate(whole):
    settings, _, _, track = whole
    frame = track.frame()
    bare = 2 * 1.9 / frame.lr - 5e-4
    assert frame.lr.is_monotonic_decreasing and frame.lr.iloc[-1] < 0.2 * frame.lr.iloc[0]
    if settings["optimizer"] == "sgd":
        assert frame.threshold.tolist() == pytest.approx(bare.tolist())
    else:
        assert (frame.threshold < bare).all()


def test_the_last_row_of_an_epoch_is_of_what_the_log_evaluates():
    data = images()
    track = sk.Tracker(data, measures="loss", every=4)
    result = fit(track=track, label_noise=0.0)
    assert track.frame().loss[1:].tolist() == pytest.approx(result.history.train_loss.tolist())


@pytest.fixture(scope="module")
def whole_sgd():
    track = tracker()
    fit(track=track)
    return track


def interrupted(monkeypatch, step):
    original, count = loop._sgd_step, 0

    def counted(*args):
        nonlocal count
        count += 1
        if count > step:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(loop, "_sgd_step", counted)


@pytest.mark.parametrize("step", [2, 10])
def test_an_interrupted_training_has_the_same_rows(step, tmp_path, monkeypatch, whole_sgd):
    whole = whole_sgd
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, step)
        fit(tmp_path, track=tracker())
    assert len(pd.read_csv(tmp_path / "tracking.csv")) == 1 + step // 3
    track = tracker()
    fit(tmp_path, track=track)
    pd.testing.assert_frame_equal(rows(track.frame()), rows(whole.frame()))
    read = pd.read_csv(tmp_path / "tracking.csv")
    pd.testing.assert_frame_equal(rows(read), rows(whole.frame()), check_dtype=False)
    again = tracker()
    fit(tmp_path, track=again)  # finished: returns at once, with the rows
    pd.testing.assert_frame_equal(again.frame(), track.frame())


def test_epochs_and_a_file_of_its_own(tmp_path):
    track = tracker(measures="loss", every=2, per="epoch", out=tmp_path / "own.csv")
    fit(tmp_path / "run", track=track)
    assert track.frame()[["step", "epoch"]].to_numpy().tolist() == [[0, 0], [8, 2], [16, 4]]
    assert len(pd.read_csv(tmp_path / "own.csv")) == 3
    assert not (tmp_path / "run" / "tracking.csv").exists()


def test_what_does_not_fit_together_is_refused(tmp_path):
    fit(tmp_path, epochs=1)
    with pytest.raises(RunError, match="not tracked from its first step"):
        fit(tmp_path, epochs=1, track=tracker())
    track = tracker(measures="loss")
    fit(tmp_path / "tracked", epochs=1, track=track)
    with pytest.raises(RunError, match=r"the tracker's state: was started with another.*every"):
        fit(tmp_path / "tracked", epochs=1, track=tracker(measures="loss", every=2))
    with pytest.raises(ArgumentError, match="rows of another training"):
        fit(track=track)
    with pytest.raises(ArgumentError, match="threshold of SAM"):
        fit(optimizer="sam", m=4, track=tracker())
    assert fit(tmp_path / "tracked", epochs=1).path is not None  # without one, it may go on


def test_the_command_writes_a_table_and_goes_on_with_it(tmp_path):
    arguments = [
        "train", "embedded", "--arch", "vgg-2x1", "--epochs", "1", "--lr", "0.05",
        "--batch-size", "400", "--label-noise", "0.5", "--track", "loss,stability",
        "--track-every", "2", "--track-examples", "40", "--out", str(tmp_path),
    ]  # fmt: skip
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    frame = pd.read_csv(tmp_path / "tracking.csv")
    assert frame.step.tolist()[:2] == [0, 2]
    assert set(frame) >= {"loss", "lambda_max", "lambda_max_residual", "threshold", "lr"}
    wrong = [a.replace("loss,stability", "loss,sharpness") for a in arguments[:-1]]
    result = CliRunner().invoke(main, [*wrong, str(tmp_path / "other")])
    assert result.exit_code and "no measure 'sharpness'" in result.output
