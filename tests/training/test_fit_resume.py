"""A training that is interrupted, killed, or given a directory that it cannot use."""

from __future__ import annotations

import errno
import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fits import fit, images, network, same_weights
from safetensors.torch import load_file

import sharpkit as sk
from sharpkit.errors import ArgumentError, DivergedError, ModelError, RunError
from sharpkit.run_directory import sole_driver
from sharpkit.training import loop
from sharpkit.training.run_files import RunFiles

KINDS = {"sgd": {}, "sam": {"optimizer": "sam", "m": 4, "rho": 0.1}}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def undisturbed(one_thread):
    return {kind: fit(**settings) for kind, settings in KINDS.items()}


def interrupt_at(monkeypatch, step):
    """Ctrl-C in that step of the run, counted from 0 over all epochs; 4 steps are an epoch."""
    count = 0
    for name in ("_sgd_step", "_sam_step"):
        original = getattr(loop, name)

        def counted(*args, original=original):
            nonlocal count
            count += 1
            if count == step + 1:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(loop, name, counted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [0, 4, 6, 8, 15])
def test_an_interrupted_training_ends_with_the_same_bits(
    kind, step, tmp_path, undisturbed, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, step)
        fit(tmp_path, **KINDS[kind])
    torch.manual_seed(step)
    result = fit(tmp_path, **KINDS[kind])
    whole = undisturbed[kind]
    assert same_weights(result.model, whole.model)
    columns = [name for name in whole.history if name != "seconds"]
    assert result.history[columns].equals(whole.history[columns])
    exported = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(t, exported[k]) for k, t in whole.model.state_dict().items())


def test_interrupted_again_and_again(tmp_path, undisturbed, monkeypatch):
    for _ in range(3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_at(patch, 5)
            fit(tmp_path, **KINDS["sam"])
    assert same_weights(fit(tmp_path, **KINDS["sam"]).model, undisturbed["sam"].model)


_KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from fits import fit
from sharpkit.files import atomic_path
import sharpkit.training.run_files as directory
from contextlib import contextmanager

count = 0

@contextmanager
def killed_while_writing(path):
    global count
    with atomic_path(path) as temporary:
        yield temporary
        count += path.name == "checkpoint.pt"
        if count == 3:
            temporary.write_bytes(temporary.read_bytes()[:1000])
            os.kill(os.getpid(), signal.SIGKILL)

directory.atomic_path = killed_while_writing
fit(sys.argv[1], optimizer="sam", m=4, rho=0.1)
"""


def test_a_process_killed_while_it_writes_its_third_checkpoint(tmp_path, undisturbed):
    tests = str(Path(__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {tests!r})\n{_KILLED}"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".checkpoint*.tmp"))
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3
    result = fit(tmp_path, **KINDS["sam"])
    assert same_weights(result.model, undisturbed["sam"].model)
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))


def test_a_finished_training_returns_at_once(tmp_path, monkeypatch):
    first = fit(tmp_path)
    monkeypatch.setattr(loop, "_sgd_step", None)
    (tmp_path / "model.safetensors").unlink()
    again = fit(tmp_path)
    assert same_weights(first.model, again.model)
    assert again.history.equals(first.history)
    assert (tmp_path / "model.safetensors").is_file()


def test_the_weights_of_epochs_are_kept(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 9)
        fit(tmp_path, keep=[0, 1, 3])
    fit(tmp_path, keep=[0, 1, 3])
    kept = {p.name: load_file(p) for p in tmp_path.glob("epoch-*.safetensors")}
    assert sorted(kept) == [f"epoch-{k}.safetensors" for k in (0, 1, 3)]
    initial = network().state_dict()
    assert all(torch.equal(t, initial[k]) for k, t in kept["epoch-0.safetensors"].items())

    monkeypatch.setattr(loop.Training, "finished", property(lambda t: len(t.history) >= 3))
    third = fit().model.state_dict()
    assert all(torch.equal(t, third[k]) for k, t in kept["epoch-3.safetensors"].items())
    with pytest.raises(RunError, match=r"epoch-2.safetensors: the training is past epoch 2"):
        fit(tmp_path, keep=[2])


# --- directories that cannot be used ----------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished")
    fit(path, epochs=2)
    return path


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"lr": 0.06}, "lr: 0.05 there, 0.06 now"),
        ({"epochs": 3}, "epochs: 2 there, 3 now"),
        ({"optimizer": "sam"}, 'optimizer: "sgd" there, "sam" now'),
        ({"batch_size": 8}, "batch_size: 16 there, 8 now"),
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"label_noise": 0.0}, "label_noise: 0.2 there, 0.0 now"),
        ({"augmentation": None}, 'augmentation: "flip-crop" there, null now'),
        ({"evaluate_every": 2}, "evaluate_every: 1 there, 2 now"),
        ({"model": network(1)}, "initial weights: "),
        ({"provenance": {"data": "x"}}, 'provenance: null there, {"data": "x"} now'),
    ],
)
def test_another_configuration_is_refused(finished, change, difference):
    before = {p: p.read_bytes() for p in finished.iterdir() if p.is_file()}
    with pytest.raises(RunError, match=f"checkpoint.pt: .*{difference}"):
        fit(finished, **{"epochs": 2, **change})
    assert before == {p: p.read_bytes() for p in finished.iterdir() if p.is_file()}


@pytest.mark.parametrize(("train", "test", "which"), [(1, 1, "training"), (0, 2, "test")])
def test_other_data_are_refused(finished, train, test, which):
    settings = json.loads((finished / "config.json").read_text())
    names = ("epochs", "batch_size", "lr", "augmentation", "label_noise")
    with pytest.raises(RunError, match=f"{which} data: "):
        sk.fit(
            network(), images(seed=train), images(30, seed=test), out=finished, progress=False,
            **{name: settings[name] for name in names},
        )  # fmt: skip


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def flip_a_bit_of_a_weight(path):
    content = path.read_bytes()
    weight = load_file(path.with_name("model.safetensors"))["5.weight"].numpy().tobytes()
    at = content.index(weight) + 100
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


CORRUPTIONS = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "one bit": flip_a_bit_of_a_weight,
    "pickle": lambda path: path.write_bytes(pickle.dumps(Malicious())),
    "torch pickle": lambda path: torch.save({"config": Malicious()}, path),
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corrupt_checkpoint_is_refused_and_never_unpickled(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(tmp_path / "run", epochs=1)
    CORRUPTIONS[kind](tmp_path / "run" / "checkpoint.pt")
    model = network()
    with pytest.raises(RunError, match=r"run.checkpoint.pt: the checkpoint is corrupt"):
        fit(tmp_path / "run", epochs=1, model=model)
    assert same_weights(model, network())
    assert not (tmp_path / "executed").exists()


def test_another_file_of_torch_is_refused(tmp_path):
    torch.save({"model": network().state_dict()}, tmp_path / "checkpoint.pt")
    with pytest.raises(RunError, match=r"not a checkpoint of sharpkit.fit"):
        fit(tmp_path)


def test_two_processes_do_not_train_in_one_directory(tmp_path):
    with sole_driver(tmp_path), pytest.raises(RunError, match="another process"):
        fit(tmp_path)


# --- divergence and full disks ----------------------------------------------------------------


def nan_from(monkeypatch, step):
    """Training inputs are NaN from a step on."""
    original, count = loop._take, 0

    def take(inputs, chosen):
        nonlocal count
        count += 1
        return original(inputs, chosen) * (float("nan") if count > step else 1.0)

    monkeypatch.setattr(loop, "_take", take)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_loss_stops_and_keeps_the_last_good_checkpoint(
    kind, tmp_path, undisturbed, monkeypatch
):
    with monkeypatch.context() as patch:
        nan_from(patch, 9)
        with pytest.raises(DivergedError) as caught:
            fit(tmp_path, **KINDS[kind])
    message = str(caught.value)
    assert "training stopped in epoch 3" in message
    assert "nan" in message
    assert f"the last good checkpoint, of epoch 2, is {tmp_path / 'checkpoint.pt'}" in message
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3
    assert same_weights(fit(tmp_path, **KINDS[kind]).model, undisturbed[kind].model)


def test_a_nan_loss_in_the_first_epoch(tmp_path, monkeypatch):
    nan_from(monkeypatch, 0)
    with pytest.raises(DivergedError, match=r"epoch 1.*no good checkpoint yet"):
        fit(tmp_path)
    with pytest.raises(DivergedError, match=r"epoch 1.*give out="):
        fit()


def test_a_learning_rate_that_diverges():
    x, y = images()
    with pytest.raises(DivergedError, match="training stopped in epoch"):
        sk.fit(network(), (100 * x, y), epochs=50, batch_size=16, lr=1e30, progress=False)


def test_other_errors_of_a_step_do_not_speak_of_divergence():
    with pytest.raises(ModelError, match="one value per channel") as caught:
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        data = torch.randn(20, 4), torch.arange(20) % 3
        sk.fit(model, data, epochs=1, batch_size=4, optimizer="sam", m=1, progress=False)
    assert not isinstance(caught.value, DivergedError)


@pytest.mark.parametrize("name", ["checkpoint.pt", "log.csv", "epoch-3.safetensors"])
def test_a_full_disk_is_a_clear_error_and_loses_nothing(name, tmp_path, undisturbed, monkeypatch):
    original = Path.write_bytes

    def full(path, content):
        if name in path.name and len((tmp_path / "log.csv").read_text().splitlines()) > 2:
            original(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, content)

    (tmp_path / "log.csv").touch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(RunError, match=rf"{name}: cannot be written \(No space left"):
            fit(tmp_path, keep=[3])
    assert not list(tmp_path.glob(".*.tmp"))
    assert same_weights(fit(tmp_path, keep=[3]).model, undisturbed["sgd"].model)


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write to the run directory"):
        fit(tmp_path / "file" / "run")


@pytest.mark.parametrize("content", ['{"model_config": []}', "no JSON", "[]"])
def test_the_directory_of_something_else_is_left_alone(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"config.json: is not of sharpkit.fit"):
        fit(tmp_path)
    assert (tmp_path / "config.json").read_text() == content


def test_nothing_is_written_without_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RunFiles(None, {}).begin()
    assert fit().path is None
    assert not list(tmp_path.iterdir())


def test_tensorboard_logs_every_epoch_once(tmp_path, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 9)
        fit(tmp_path, tensorboard=True)
    result = fit(tmp_path, tensorboard=True)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss", "test_accuracy", "lr"):
        scalars = events.Scalars(name)
        assert [s.step for s in scalars] == [1, 2, 3, 4]
        assert [s.value for s in scalars] == pytest.approx(result.history[name].tolist())


def test_without_tensorboard_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ArgumentError, match="pip install tensorb"):
        fit(tmp_path, tensorboard=True)
