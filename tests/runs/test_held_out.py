"""Calibration and accuracy on corrupted test images, as columns that can be predicted."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from scipy.ndimage import gaussian_filter
from torch import nn

import sharpkit as sk
from sharpkit.cli import main
from sharpkit.errors import ArgumentError, DataError
from sharpkit.runs.corruptions import CORRUPTIONS, blurred, less_contrast, noisy, shifted
from sharpkit.runs.held_out import (
    brier_score,
    calibration_error,
    held_out_metrics,
    negative_log_likelihood,
)

COLUMNS = ["test_ece", "test_nll", "test_brier"]
CORRUPTED = [f"test_acc_{name}" for name in CORRUPTIONS]
MEASURE = sk.MSharpness(m=1, rho=0.1)
IMAGES = torch.randn(30, 2, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_loops(logits, labels, bins=15):
    """ECE, negative log-likelihood and Brier score, one example after the other in float64."""
    members = {b: [] for b in range(1, bins + 1)}
    nll = brier = 0.0
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        top = max(row)
        weights = [math.exp(z - top) for z in row]
        p = [w / sum(weights) for w in weights]
        nll -= math.log(p[label])
        brier += sum((q - (c == label)) ** 2 for c, q in enumerate(p))
        confidence = max(p)
        for b in members:
            if (b - 1) / bins < confidence <= b / bins:
                members[b].append((p.index(confidence) == label, confidence))
    n = len(labels)
    ece = sum(
        len(m) / n * abs(np.mean([r for r, _ in m]) - np.mean([c for _, c in m]))
        for m in members.values()
        if m
    )
    return {"test_ece": ece, "test_nll": nll / n, "test_brier": brier / n}


@pytest.mark.parametrize("seed", range(4))
def test_calibration_is_a_loop_over_examples(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(200, 5, generator=generator)
    labels = torch.where(
        torch.rand(200, generator=generator) < 0.6,
        logits.argmax(1),
        torch.randint(5, (200,), generator=generator),
    )
    expected = by_loops(logits, labels)
    assert calibration_error(logits, labels) == pytest.approx(expected["test_ece"], rel=1e-12)
    assert negative_log_likelihood(logits, labels) == pytest.approx(expected["test_nll"], rel=1e-12)
    assert brier_score(logits, labels) == pytest.approx(expected["test_brier"], rel=1e-12)


def test_certainty_has_a_bin_and_can_be_right_or_wrong():
    certain = torch.tensor([[1000.0, 0.0], [1000.0, 0.0]])
    assert calibration_error(certain, torch.tensor([0, 0])) == 0
    assert calibration_error(certain, torch.tensor([0, 1])) == 0.5
    assert calibration_error(certain, torch.tensor([1, 1]), bins=1) == 1
    assert brier_score(certain, torch.tensor([1, 1])) == 2
    assert negative_log_likelihood(certain, torch.tensor([0, 1])) == 500  # finite
    with pytest.raises(ArgumentError, match="bins"):
        calibration_error(certain, torch.tensor([0, 0]), bins=0)


def test_blur_is_scipys_gaussian_with_a_continued_border():
    expected = gaussian_filter(IMAGES.numpy(), (0, 0, 1, 1), mode="nearest", truncate=3.0)
    np.testing.assert_allclose(blurred(IMAGES).numpy(), expected, atol=1e-12)


def test_noise_has_its_size_and_its_seed():
    noise = noisy(IMAGES, 3) - IMAGES
    own = IMAGES.numpy().std()
    # 4,320 numbers: the sample's spread is within 1.1 % in two of three cases
    assert float(noise.std()) == pytest.approx(0.25 * own, rel=0.05)
    assert torch.equal(noisy(IMAGES, 3), noisy(IMAGES, 3))
    assert not torch.equal(noisy(IMAGES, 3), noisy(IMAGES, 4))


def test_contrast_is_lost_about_the_mean_of_each_image():
    pale = less_contrast(IMAGES)
    for before, after in zip(IMAGES.numpy(), pale.numpy(), strict=True):
        expected = before.mean() + 0.4 * (before - before.mean())
        np.testing.assert_allclose(after, expected, atol=1e-12)


def test_a_shift_moves_every_image_by_at_most_two_pixels_and_fills_with_the_darkest():
    floor = float(IMAGES.min())
    moves = set()
    for before, after in zip(IMAGES, shifted(IMAGES, 1), strict=True):
        found = []
        for down in range(-2, 3):
            for right in range(-2, 3):
                expected = torch.full_like(before, floor)
                for r in range(9):
                    for c in range(8):
                        if 0 <= r - down < 9 and 0 <= c - right < 8:
                            expected[:, r, c] = before[:, r - down, c - right]
                if torch.allclose(expected, after, atol=1e-12):
                    found.append((down, right))
        assert len(found) == 1
        moves |= set(found)
    assert len(moves) > 5  # 30 draws from 25


class Network(nn.Module):
    """A classifier of images; its outputs as logits."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(168, 3))

    def forward(self, x):
        return self.body(x)


def test_corrupted_accuracies_are_those_of_the_corrupted_images():
    model = Network(0).double()
    labels = torch.arange(30) % 3
    found = held_out_metrics(model, (IMAGES, labels), seed=5)
    assert list(found) == COLUMNS + CORRUPTED
    with torch.no_grad():
        for name, corrupt in CORRUPTIONS.items():
            predicted = model(corrupt(IMAGES, 5)).argmax(1)
            expected = sum(p == y for p, y in zip(predicted.tolist(), labels.tolist(), strict=True))
            assert found[f"test_acc_{name}"] == pytest.approx(expected / 30, abs=1e-12)
        assert {c: found[c] for c in COLUMNS} == pytest.approx(by_loops(model(IMAGES), labels))


def test_what_is_no_image_has_calibration_alone_and_what_is_no_class_is_refused():
    x = torch.randn(12, 4)
    assert list(held_out_metrics(nn.Linear(4, 3), (x, torch.arange(12) % 3))) == COLUMNS
    with pytest.raises(DataError):
        held_out_metrics(nn.Linear(4, 1), (x, torch.randn(12, 1)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Eight models of the embedded zoo."""
    path = tmp_path_factory.mktemp("run")
    options = {"out": path, "n": 16, "limit": 8, "progress": False}
    sk.score_zoo(sk.embedded_zoo(), MEASURE, **options).close()  # without them first
    sk.score_zoo(sk.embedded_zoo(), MEASURE, test_metrics=True, **options).close()
    return path


def test_a_zoo_run_has_them_as_columns_and_not_as_measures(run):
    scores = sk.Scores.open(run)
    metrics = scores.metrics().set_index("model")
    task = next(iter(sk.embedded_zoo().values()))
    expected = held_out_metrics(task["3"].load(), task.dataset("test"), seed=0)
    # outputs are float32, and threads round them differently
    assert metrics.loc["3", list(expected)].to_dict() == pytest.approx(expected, rel=1e-6)
    assert metrics.loc["3", "test_acc"] == task["3"].metrics["test_acc"]
    assert metrics["test_acc_noise"].notna().sum() == 8  # of 96; the others were not scored
    assert set(scores.frame()["measure"]) == {"m_sharpness"}
    assert scores.failures.empty


@pytest.mark.parametrize("target", ["test_ece", "test_acc_blur"])
@pytest.mark.filterwarnings("ignore:task .* has no value for")
def test_the_columns_are_targets(run, target):
    scores = sk.Scores.open(run)
    row = sk.evaluate(scores, target=target, resamples=10).iloc[0]
    assert row["target"] == target and row["models"] == 8
    wide = scores.frame().merge(scores.metrics(), on=["task", "model"])
    assert row["pearson"] == pytest.approx(np.corrcoef(wide["value"], wide[target])[0, 1])
    # a sharp model should be badly calibrated, and wrong on blurred images
    assert row["direction"] == (-1 if target == "test_acc_blur" else 1)
    assert len(sk.selection_regret(scores, target=target)) == 1


def test_a_second_start_computes_nothing_again(run, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "sharpkit.runs.held_out.held_out_metrics", lambda *a, **k: calls.append(1) or {}
    )
    before = sk.Scores.open(run).metrics()
    again = sk.score_zoo(
        sk.embedded_zoo(), MEASURE, out=run, n=16, limit=8, test_metrics=True, progress=False
    )
    pd.testing.assert_frame_equal(again.metrics(), before)
    assert calls == []
    again.close()


@pytest.mark.slow
def test_worker_processes_give_the_same(run):
    scores = sk.score_zoo(
        sk.embedded_zoo(), MEASURE, n=16, limit=2, test_metrics=True,
        workers=sk.Workers(2, threads=torch.get_num_threads()), progress=False,
    )  # fmt: skip
    columns = [*COLUMNS, *CORRUPTED]
    expected = sk.Scores.open(run).metrics().set_index("model").loc[["0", "1"], columns]
    found = scores.metrics().set_index("model").loc[["0", "1"], columns]
    pd.testing.assert_frame_equal(found, expected)


def test_a_zoo_without_test_images_says_so(tmp_path):
    zoo = tmp_path / "zoo"
    source = next(iter(sk.embedded_zoo().values()))
    for part in ("model_0", "dataset_1/train"):
        (zoo / "small" / part).parent.mkdir(parents=True, exist_ok=True)
        (zoo / "small" / part).symlink_to(source.path / part)
    configs = {"0": source.model_configs["0"]}
    (zoo / "small" / "model_configs.json").write_text(json.dumps(configs))
    with pytest.warns(UserWarning):
        loaded = sk.load_zoo(zoo)
    scores = sk.score_zoo(loaded, MEASURE, n=8, test_metrics=True, progress=False)
    assert len(scores.frame()) == 1
    (failure,) = scores.failures.to_dict("records")
    assert failure["measure"] == "test_metrics" and "no test data" in failure["error"]


def test_own_models_have_them_too(tmp_path):
    labels = torch.arange(30) % 3
    models = {f"net {k}": Network(k) for k in range(3)}
    data = (IMAGES.float(), labels)
    options = {"out": tmp_path, "seed": 2, "progress": False}
    plain = sk.score_models(models, MEASURE, data, data, **options)
    assert "test_ece" not in plain.metrics()
    plain.close()
    scores = sk.score_models(models, MEASURE, data, data, test_metrics=True, **options)
    found = scores.metrics().set_index("model").loc["net 1"]
    expected = held_out_metrics(models["net 1"], data, seed=2)
    assert found[list(expected)].to_dict() == pytest.approx(expected)


def test_the_name_is_taken():
    class Measure:
        name = "test_metrics"

        def __call__(self, model, data, *, seed):
            return 0.0

    with pytest.raises(ArgumentError, match="no name for a measure"):
        sk.score_zoo(sk.embedded_zoo(), Measure(), n=8, limit=1)


def test_the_command_line_computes_and_predicts_them(tmp_path):
    out = str(tmp_path / "run")
    command = ["score", "embedded", "--out", out, "--m", "1", "--n", "8", "--limit", "4"]
    result = CliRunner().invoke(main, [*command, "--backend", "inline", "--test-metrics"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(
        main, ["evaluate", out, "--target", "test_acc_shift", "--resamples", "10"]
    )
    assert result.exit_code == 0, result.output
    assert "test_acc_shift lost by picking" in result.output
