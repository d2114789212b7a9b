"""`spectrum`: a directory with picture, tables and summary; resumable per model."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from sharpkit.errors import ArgumentError, RunError
from sharpkit.run_directory import sole_driver
from sharpkit.runs.saved_spectrum import read_spectrum
from sharpkit.runs.spectrum import spectrum

DATA = torch.randn(20, 3), torch.randint(0, 2, (20,))
QUICK = {"steps": 6, "probes": 2, "progress": False}


def net(seed):
    def build():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))

    return build


def test_it_writes_what_it_promises(tmp_path):
    result = spectrum({"epoch 1": net(1), "b/50": net(2)}, DATA, tmp_path, **QUICK)
    assert (tmp_path / "spectrum.png").stat().st_size > 5000
    density = pd.read_csv(tmp_path / "density.csv")
    assert list(density) == ["model", "eigenvalue", "density", "std_error"]
    assert list(density["model"].unique()) == ["epoch 1", "b/50"]
    nodes = pd.read_csv(tmp_path / "nodes.csv")
    assert list(nodes) == ["model", "probe", "node", "weight"]
    assert len(nodes) == 2 * 2 * 6
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["models"] == result.summary
    row = summary["models"]["b/50"]
    assert row["lambda_max"] == row["eigenvalues"][0]
    assert row["parameters"] == 34
    assert len(result.frame()) == 2
    assert result.frame().drop(columns="model").dtypes.map(lambda kind: kind.kind in "if").all()


def test_it_resumes_per_model(tmp_path):
    first = spectrum({"a": net(1)}, DATA, tmp_path, **QUICK)
    stamp = (tmp_path / "models" / "a.npz").stat().st_mtime_ns
    both = spectrum({"a": net(1), "b": net(2)}, DATA, tmp_path, grid="symlog", **QUICK)
    assert (tmp_path / "models" / "a.npz").stat().st_mtime_ns == stamp
    assert both.summary["a"] == first.summary["a"]
    assert both.densities["a"].spacing == "symlog"
    assert both.densities["a"].mass == pytest.approx(1, abs=1e-6)


def test_other_weights_or_a_damaged_file_are_computed_anew(tmp_path):
    first = spectrum({"a": net(1)}, DATA, tmp_path, **QUICK)
    second = spectrum({"a": net(2)}, DATA, tmp_path, **QUICK)
    assert second.summary["a"]["lambda_max"] != first.summary["a"]["lambda_max"]
    (tmp_path / "models" / "a.npz").write_bytes(b"PK\x03\x04 damaged")
    third = spectrum({"a": net(2)}, DATA, tmp_path, **QUICK)
    assert third.summary["a"]["lambda_max"] == second.summary["a"]["lambda_max"]


def test_a_damaged_file_is_noticed_wherever_it_is_damaged(tmp_path):
    spectrum({"a": net(1)}, DATA, tmp_path, **QUICK)
    path = tmp_path / "models" / "a.npz"
    content, (density, numbers, weights) = path.read_bytes(), read_spectrum(path)
    rng = np.random.default_rng(0)
    ends = [*range(0, len(content), 7919), len(content) - 1]  # also cut off
    damages = [content[:end] for end in ends]
    for place in rng.integers(0, len(content), 400):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        damages.append(bytes(flipped))
    noticed = 0
    for damaged in damages:
        path.write_bytes(damaged)
        found = read_spectrum(path)
        noticed += found is None
        if found is not None:  # a bit that means nothing, such as in a date
            assert found[1:] == (numbers, weights)
            assert all(
                np.array_equal(getattr(found[0], name), getattr(density, name), equal_nan=True)
                for name in ("nodes", "weights", "grid", "density", "std_error")
            )
    assert noticed > 380


def test_other_settings_are_refused(tmp_path):
    spectrum({"a": net(1)}, DATA, tmp_path, **QUICK)
    with pytest.raises(RunError, match="steps: 6 there, 7 now"):
        spectrum({"a": net(1)}, DATA, tmp_path, **{**QUICK, "steps": 7})
    with pytest.raises(RunError, match="data: "):
        spectrum({"a": net(1)}, (DATA[0] + 1, DATA[1]), tmp_path, **QUICK)
    for damaged in ("{", "[]"):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(RunError, match="damaged"):
            spectrum({"a": net(1)}, DATA, tmp_path, **QUICK)


def test_a_full_disk_is_told_and_the_run_goes_on_later(tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_csv", full)
        with pytest.raises(RunError, match=r"cannot be written \(No space left on device\)"):
            spectrum({"a": net(1)}, DATA, tmp_path, **QUICK)
    stamp = (tmp_path / "models" / "a.npz").stat().st_mtime_ns
    spectrum({"a": net(1)}, DATA, tmp_path, **QUICK)
    assert (tmp_path / "models" / "a.npz").stat().st_mtime_ns == stamp
    assert (tmp_path / "nodes.csv").is_file() and not list(tmp_path.rglob("*.tmp"))


def test_a_second_process_is_refused(tmp_path):
    with sole_driver(tmp_path), pytest.raises(RunError, match="another process"):
        spectrum({"a": net(1)}, DATA, tmp_path, **QUICK)
    spectrum({"a": net(1)}, DATA, tmp_path, **QUICK)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_failing_model_does_not_stop_the_others(tmp_path):
    def broken():
        model = nn.Linear(3, 2)
        model.weight.data.fill_(torch.nan)
        return model

    result = spectrum({"bad": broken, "good": net(1)}, DATA, tmp_path, **QUICK)
    assert list(result.densities) == ["good"]
    assert "NaN" in result.failures["bad"]
    assert json.loads((tmp_path / "summary.json").read_text())["failures"] == result.failures
    again = spectrum({"bad": net(3), "good": net(1)}, DATA, tmp_path, **QUICK)
    assert not again.failures

    def unbuilt():
        raise KeyError("layer1.weight")

    result = spectrum({"lost": unbuilt, "good": net(1)}, DATA, tmp_path, **QUICK)
    assert result.failures == {"lost": "KeyError: 'layer1.weight'"}
    assert list(result.densities) == ["good"]
    with pytest.raises(RunError, match=r"no model could be measured.*NaN"):
        spectrum({"bad": broken}, DATA, tmp_path / "other", **QUICK)


@pytest.mark.parametrize(
    "arguments",
    [{"steps": 0}, {"probes": 0}, {"loss": "hinge"}, {"grid": "round"}, {"device": "abacus"}],
)
def test_bad_arguments_are_refused(tmp_path, arguments):
    with pytest.raises(ArgumentError):
        spectrum({"a": net(1)}, DATA, tmp_path, **{**QUICK, **arguments})
    with pytest.raises(ArgumentError, match="no models"):
        spectrum({}, DATA, tmp_path)


def test_a_selection_and_a_subset(tmp_path):
    result = spectrum({"a": net(1)}, DATA, tmp_path, parameters="3.*", n=7, **QUICK)
    assert result.summary["a"]["parameters"] == 10
    assert json.loads((tmp_path / "config.json").read_text())["n"] == 7
