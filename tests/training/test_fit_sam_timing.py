"""`fit`, its command and its files, with SAM in some steps and of some parameters."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from fits import fit, images, network, same_weights
from sam_reference import gradient, m_sam_loop, perturbed_gradient, sgd_momentum
from torch import nn
from torch.nn.functional import cross_entropy

import sharpkit as sk
from sharpkit.cli import main
from sharpkit.errors import ArgumentError, RunError
from sharpkit.training import FitSettings, loop
from sharpkit.training.streams import stream

PLAIN = {"epochs": 3, "batch_size": 16, "weight_decay": 0.01, "schedule": "constant", "seed": 5}
STEPS = 12  # 4 of each epoch


pytestmark = pytest.mark.usefixtures("one_thread")


def normed():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(128, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)
    ).double()
    for p in model.parameters():
        nn.init.normal_(p, 0, 0.2, generator=generator)
    return model


def by_hand(factors, m=16, names=None):
    """Algorithm 1 where a factor is above 0, and SGD elsewhere, in float64."""
    model, (x, y), velocity = normed(), images(), None
    rho = {
        name: 0.3 if names is None or name in names else 0.0 for name, _ in model.named_parameters()
    }
    for step, factor in enumerate(factors):
        if step % 4 == 0:
            order = torch.randperm(70, generator=stream(5, "order", step // 4 + 1))
        batch = order[16 * (step % 4) : 16 * (step % 4) + 16]
        xs, ys = x.double()[batch], y[batch]
        loss = lambda net, xs=xs, ys=ys: cross_entropy(net(xs), ys)  # noqa: E731
        if not factor:
            g = gradient(model, loss)
        elif m < 16:
            g = m_sam_loop(model, xs, ys, m, [factor * r for r in rho.values()])
        else:
            g = perturbed_gradient(model, loss, [factor * r for r in rho.values()])
        own = [p.detach() for p in model.parameters()]
        new, velocity = sgd_momentum(own, g, velocity, lr=0.1, momentum=0.9, decay=0.01)
        for p, w in zip(model.parameters(), new, strict=True):
            p.data.copy_(w)
    return model


CASES = {
    "late": ({"sam_start": 0.75}, [0] * 9 + [1] * 3),
    "late, every second": ({"sam_start": 0.5, "sam_interval": 2}, [0] * 6 + [1, 0] * 3),
    "early, m = 4": ({"sam_stop": 0.5, "m": 4}, [1] * 6 + [0] * 6),
    "norm, m = 4": (
        {"sam_parameters": "norm", "m": 4, "sam_interval": 5},
        [1, 0, 0, 0, 0] * 2 + [1, 0],
    ),
    "norm": ({"sam_parameters": "norm"}, [1] * 12),
    "cosine": (
        {"rho_schedule": "cosine", "sam_stop": 0.5},
        [math.cos(math.pi * k / 12) ** 2 for k in range(6)] + [0] * 6,
    ),
    "warm-up, m = 6": ({"rho_warmup": 0.5, "m": 6}, [k / 6 for k in range(6)] + [1] * 6),
    "function": ({"rho_schedule": lambda t: t * t}, [(k / 12) ** 2 for k in range(12)]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_loop_by_hand(case):
    settings, factors = CASES[case]
    names = {"2.weight", "2.bias"} if "norm" in case else None
    expected = by_hand(factors, settings.get("m", 16), names)
    model = normed()
    result = sk.fit(model, images(), optimizer="sam", rho=0.3, progress=False, **PLAIN, **settings)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    shares = [sum(f > 0 for f in factors[i : i + 4]) / 4 for i in (0, 4, 8)]
    assert result.history.perturbed.tolist() == shares


def test_modules_lists_and_lines_of_names_are_one_selection():
    model = normed()
    kinds = [model[2], ["2.weight", "2.bias"], "2.weight, 2.bias", "norm", ["norm"]]
    trained = []
    for kind in kinds:
        model = normed()
        kind = model[2] if isinstance(kind, nn.Module) else kind
        sk.fit(
            model, images(), optimizer="sam", rho=0.3, progress=False, sam_parameters=kind,
            **{**PLAIN, "epochs": 1},
        )  # fmt: skip
        trained.append(model)
    assert all(same_weights(trained[0], other) for other in trained[1:])


def test_the_history_of_sgd_does_not_speak_of_it():
    assert "perturbed" not in fit(epochs=1).history
    assert fit(epochs=1, optimizer="sam", rho=0.0).history.perturbed.tolist() == [0.0]


# --- going on ------------------------------------------------------------------------------------

EVERY_KIND = {
    "optimizer": "sam", "m": 4, "rho": 0.1, "sam_interval": 3, "sam_start": 0.2,
    "rho_schedule": "linear", "rho_warmup": 0.2, "sam_parameters": "norm,5.*",
}  # fmt: skip


@pytest.mark.parametrize("at", [2, 9])
def test_an_interrupted_training_ends_with_the_same_bits(at, tmp_path, monkeypatch):
    whole = fit(**EVERY_KIND)
    original, count = loop._sam_step, 0

    def counted(*args):
        nonlocal count
        count += 1
        if count == at + 1:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_sam_step", counted)
        fit(tmp_path, **EVERY_KIND)
    result = fit(tmp_path, **EVERY_KIND)
    assert same_weights(result.model, whole.model)
    assert result.history.drop(columns="seconds").equals(whole.history.drop(columns="seconds"))
    written = pd.read_csv(tmp_path / "log.csv")
    assert written.perturbed.tolist() == whole.history.perturbed.tolist()


def test_the_settings_belong_to_what_a_training_goes_on_with(tmp_path):
    fit(tmp_path, epochs=2, **EVERY_KIND)
    noted = json.loads((tmp_path / "config.json").read_text())
    assert noted["sam_parameters"] == "norm,5.*" and noted["sam_start"] == 0.2
    for change, difference in (
        ({"sam_interval": 2}, "sam_interval: 3 there, 2 now"),
        ({"sam_start": 0.0}, "sam_start: 0.2 there, null now"),
        ({"rho_schedule": lambda t: 1 - t}, 'rho_schedule: "linear" there, "loss '),
        ({"sam_stop": 0.9}, "sam_stop: null there, 0.9 now"),
    ):
        with pytest.raises(RunError, match=difference):
            fit(tmp_path, epochs=2, **{**EVERY_KIND, **change})


def test_a_run_that_does_not_tell_the_share_goes_on(tmp_path, monkeypatch):
    """As one of an earlier version: no setting, no count of steps, no share."""
    settings = {"optimizer": "sam", "rho": 0.1}
    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "finished", property(lambda t: len(t.history) >= 2))
        fit(tmp_path, **settings)
    path = tmp_path / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    assert not [name for name in content["config"] if name.startswith(("sam_", "rho_"))]
    for group in content["optimizer"]["param_groups"]:
        del group["sam_step"]
    for row in content["history"]:
        del row["perturbed"]
    torch.save(content, path)
    result = fit(tmp_path, **settings)
    assert same_weights(result.model, fit(**settings).model)
    assert result.history.perturbed.tolist() == [1.0] * 4


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sam_interval": 0}, "sam_interval is 0: expected a whole number >= 1"),
        ({"sam_start": 1.5}, "sam_start is 1.5: expected a fraction, 0 to 1"),
        ({"sam_start": 0.5, "sam_stop": 0.5}, "leaves SAM no step: expected sam_start < sam_stop"),
        ({"sam_start": 0.98}, "sam_start is 0.98 and sam_stop is 1.0: none of 16 steps is in betw"),
        ({"rho_warmup": -0.1}, "rho_warmup is -0.1"),
        ({"rho_schedule": "exp"}, "rho_schedule is 'exp': expected one of 'cosine', 'linear'"),
        ({"sam_parameters": "head.*"}, r"no parameter matches 'head.\*'; the model has 0.weight"),
        ({"rho_schedule": 0.5}, "rho_schedule is 0.5: expected one of 'cosine', 'linear'"),
        ({"sam_parameters": ""}, "sam_parameters is ''"),
        ({"sam_parameters": 3}, "expected names, patterns or modules, got int"),
        ({"sam_parameters": [3]}, "expected names, patterns or modules, got int"),
        ({"optimizer": "sgd", "sam_start": 0.5}, "sam_start = 0.5 belongs to SAM"),
        ({"optimizer": "sgd", "sam_parameters": "norm"}, "sam_parameters = 'norm' belongs to SAM"),
        ({"optimizer": "sgd", "rho_schedule": lambda t: t}, "rho_schedule belongs to SAM"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(settings, message, tmp_path):
    model = network()
    with pytest.raises(ArgumentError, match=message):
        fit(tmp_path / "run", model, **{"optimizer": "sam", **settings})
    assert same_weights(model, network()) and not (tmp_path / "run").exists()


def test_settings_are_plain_values():
    plain = FitSettings(epochs=3, optimizer="sam", sam_start=0.8)
    assert json.loads(json.dumps(plain.asdict()))["sam_start"] == 0.8
    assert plain.where_sam_acts() == {"sam_start": 0.8}
    assert "sam_start" not in FitSettings(epochs=3).asdict()


# --- the tracker, and the command -----------------------------------------------------------------


def test_the_threshold_is_that_of_the_steps_that_are_made():
    track = sk.Tracker(images(32), measures="stability", every=1)
    settings = {"optimizer": "sam", "rho": 0.1, "sam_start": 0.25, "sam_stop": 0.75}
    fit(track=track, epochs=2, **settings)
    frame = track.frame()
    plain = 2 * 1.9 / frame.lr - 5e-4
    below = (frame.threshold < 0.999 * plain).tolist()
    assert below == [False] * 3 + [True] * 4 + [False] * 2
    assert frame.threshold[:3].tolist() == pytest.approx(plain[:3].tolist())
    for change in ({"sam_interval": 2}, {"sam_parameters": "norm"}, {"m": 4}):
        track = sk.Tracker(images(32), measures="stability", every=4)
        with pytest.raises(ArgumentError, match=r'threshold.*measure "lambda_max"'):
            fit(track=track, epochs=2, **settings, **change)


def test_the_command_has_them_all(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (64, 8, 8)).astype(np.uint8)
    y = np.arange(64) % 3
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    arguments = [
        "train", str(tmp_path / "data.npz"), "--out", str(tmp_path / "run"), "--arch", "vgg-4x1-bn",
        "--epochs", "2", "--lr", "0.05", "--batch-size", "16", "--optimizer", "sam", "--m", "4",
        "--sam-interval", "2", "--sam-start", "0.25", "--sam-stop", "0.9", "--sam-parameters",
        "norm,*.bias", "--rho-schedule", "linear", "--rho-warmup", "0.5",
    ]  # fmt: skip
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    model = sk.build_architecture("vgg-4x1-bn", (1, 8, 8), 3, seed=0)
    train, test = sk.load_dataset(tmp_path / "data.npz")
    expected = sk.fit(
        model, train, test, epochs=2, lr=0.05, batch_size=16, optimizer="sam", m=4, sam_interval=2,
        sam_start=0.25, sam_stop=0.9, sam_parameters=["norm", "*.bias"], rho_schedule="linear",
        rho_warmup=0.5, progress=False,
    )  # fmt: skip
    log = pd.read_csv(tmp_path / "run" / "log.csv")
    assert log.perturbed.tolist() == expected.history.perturbed.tolist() == [0.0, 0.5]
    from sharpkit.runs.trained import load_trained

    assert same_weights(load_trained(tmp_path / "run"), model)
    wrong = [a if a != "0.25" else "0.95" for a in arguments]
    result = CliRunner().invoke(main, wrong)
    assert result.exit_code and "expected sam_start < sam_stop" in result.output
