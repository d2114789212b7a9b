"""`sharpkit train`, and `sharpkit spectrum` on what it leaves."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

import sharpkit as sk
from sharpkit.cli import main
from sharpkit.errors import RunError
from sharpkit.runs.trained import load_trained, trained_data
from sharpkit.training import loop


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 64), ("test", 20)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (n, 8, 8)).astype(np.uint8)
        arrays[f"y_{split}"] = np.arange(n) % 3
    np.savez(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


def arguments(data, out, **options):
    options = {"arch": "vgg-4x1", "epochs": 3, "batch-size": 16, "lr": 0.05, **options}
    return ["train", data, "--out", out, *(f"--{k}={v}" for k, v in options.items())]


def test_train_and_look_at_the_spectrum(data, tmp_path):
    out = tmp_path / "run"
    text = run(*arguments(data, out, optimizer="sam", m=4, keep="0,2", **{"label-noise": 0.5}))
    assert [f"epoch {k}/3" in text for k in (1, 2, 3)] == [True] * 3
    log = pd.read_csv(out / "log.csv")
    assert f"{out / 'model.safetensors'}: accuracy" in text
    assert f"{100 * log['test_accuracy'].iloc[-1]:.2f} % test" in text
    names = ("epoch-0", "epoch-2", "model")
    checkpoints = [f"--checkpoint={out / name}.safetensors" for name in names]
    run("spectrum", *checkpoints, "--out", tmp_path / "spectra", "--steps", 5, "--probes", 1)
    summary = json.loads((tmp_path / "spectra" / "summary.json").read_text())
    assert set(summary["models"]) == set(names)
    # the data are those trained on, wrong labels included
    train, test = trained_data(out)
    model = load_trained(out)
    for (x, y), split in ((train.tensors, "train"), (test.tensors, "test")):
        accuracy = (model(x).argmax(1) == y).double().mean().item()
        assert accuracy == log[f"{split}_accuracy"].iloc[-1]
    assert int((train.tensors[1] != torch.arange(64) % 3).sum()) == 32


def test_spectra_of_runs_with_other_examples_or_labels_are_not_mixed(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noisy = {"label-noise": 0.25, "epochs": 1}
    other = tmp_path / "other.npz"
    other.write_bytes(data.read_bytes())
    for name, file, options in (
        ("a", data, {"epochs": 1}),
        ("other_seed", data.name, {"epochs": 1, "seed": 1}),  # the same file, called otherwise
        ("other_data", other, {"epochs": 1}),
        ("noisy", data, noisy),
        ("noisy_other_seed", data, {**noisy, "seed": 1}),
    ):
        run(*arguments(file, name, **options))

    def spectrum(one, two, code=0):
        weights = [f"--checkpoint={name}/model.safetensors" for name in (one, two)]
        quick = ("--steps", 2, "--probes", 1)
        return run("spectrum", *weights, "--out", f"{one}-{two}", *quick, code=code)

    spectrum("a", "other_seed")
    for one, two in (("a", "other_data"), ("a", "noisy"), ("noisy", "noisy_other_seed")):
        assert f"{one} and {two} were trained on different data" in spectrum(one, two, code=1)


def test_the_command_trains_what_the_function_trains(data, tmp_path):
    out = tmp_path / "run"
    run(*arguments(data, out, seed=3, augmentation="flip", schedule="step"))
    train, test = sk.load_dataset(data)
    model = sk.build_architecture("vgg-4x1", (1, 8, 8), 3, seed=3)
    sk.fit(
        model, train, test, epochs=3, batch_size=16, lr=0.05, seed=3, augmentation="flip",
        schedule="step", progress=False,
    )  # fmt: skip
    stored = load_trained(out / "model.safetensors").state_dict()
    assert all(torch.equal(t, stored[k]) for k, t in model.state_dict().items())


def test_a_stopped_command_goes_on(data, tmp_path, monkeypatch):
    out, original, count = tmp_path / "run", loop._sgd_step, 0

    def stops(*args):
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_sgd_step", stops)
        assert "the same command goes on" in run(*arguments(data, out), code=130)
    text = run(*arguments(data, out))
    assert "epoch 1/3" not in text
    assert "epoch 2/3" in text


def test_your_own_network(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\n\n"
        "def build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n"
    )
    run(*arguments(data, "run", arch="own_networks:build", epochs=1))
    network = load_trained("run", "own_networks:build")
    assert isinstance(network[1], torch.nn.Linear)
    measured = ("sharpness", "run", "--m", 4, "--rho", 0.1, "--build", "own_networks:build")
    expected = sk.m_sharpness(network, trained_data("run")[0], m=4, rho=0.1, progress=False)
    assert f"{expected.value:.4g}" in run(*measured)


def test_code_that_a_run_names_is_not_run(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*arguments(data, "run", epochs=1))
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["provenance"]["architecture"] = "planted_code:build"
    path.write_text(json.dumps(config))
    (tmp_path / "planted_code.py").write_text("open('was_run', 'w')\n")
    quick = ("--m", 4, "--rho", 0.1)
    refused = "code that a file names is not run"
    with pytest.raises(RunError, match=refused):
        load_trained("run")
    assert refused in run("sharpness", "run", *quick, code=1)
    assert refused in run("score", "--checkpoint", "run", "--out", "scores", *quick, code=1)
    text = run("spectrum", "--checkpoint", "run", "--out", "spectra", "--steps", 2, code=1)
    assert refused in text
    assert not (tmp_path / "was_run").exists()
    run("sharpness", "run", *quick, "--build", "planted_code:build", code=1)  # what the user types
    assert (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "alexnet"}, "unknown architecture 'alexnet'"),
        ({"m": 4}, "m and adaptive belong to SAM"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch-size": 100}, "batch_size is 100, but there are 64"),
        ({"rho": -1}, "rho"),
        ({"rho": 0.2}, "rho = 0.2 belongs to SAM"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"root": "."}, "root is for"),
    ],
)
def test_errors_are_one_message_without_a_traceback(data, tmp_path, change, message):
    text = run(*arguments(data, tmp_path / "run", **change), code=1)
    assert text.splitlines()[-1].startswith("error: ")
    assert message in text
    assert "Traceback" not in text


def test_an_unknown_data_set_and_another_configuration(data, tmp_path):
    assert "unknown data set 'mnist'" in run(*arguments("mnist", tmp_path / "run"), code=1)
    run(*arguments(data, tmp_path / "run", epochs=1))
    text = run(*arguments(data, tmp_path / "run", epochs=1, lr=0.2), code=1)
    assert "lr: 0.05 there, 0.2 now" in text
    text = run(*arguments(data, tmp_path / "run", epochs=1, arch="vgg-5x1"), code=1)
    assert "another configuration" in text


def test_a_directory_that_is_no_run_of_train(tmp_path):
    with pytest.raises(RunError, match=r"config.json: file is missing"):
        load_trained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match="not JSON with a provenance"):
        load_trained(tmp_path)
    (tmp_path / "config.json").write_text('{"provenance": {"data": "x"}}')
    with pytest.raises(RunError, match="does not name architecture"):
        trained_data(tmp_path)
    names = {"architecture": 5, "input_shape": [1, 8, 8], "classes": 3, "data": "x", "root": None}
    config = {"provenance": names, "label_noise": 0, "seed": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="its architecture is 5, expected text"):
        load_trained(tmp_path)
