"""What a notebook shows: short results, public names, bars."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sharpkit as sk
from sharpkit.display import ROWS
from sharpkit.evaluation import combined_predictor, sign_error
from sharpkit.files import atomic_path
from sharpkit.progress import progress_bar

DATA = torch.randn(300, 4, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 3


def model():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def hessian():
    return sk.HessianOperator(model(), DATA)


CONFIGS = {
    f"{k}": {
        "hparams": {
            "width": {"possible_values": [8, 16], "current_value": 8 * (1 + k % 2)},
            "depth": {"possible_values": [1, 2], "current_value": 1 + k // 2 % 2},
        },
        "metrics": {"train_acc": 1.0, "test_acc": 0.9 - 0.01 * k},
    }
    for k in range(16)
}
VALUES = {f"{k}": float(k * 7 % 16) for k in range(16)}


def predictor():
    import pandas as pd

    values = pd.DataFrame({"a": VALUES, "b": {k: v**2 for k, v in VALUES.items()}})
    return combined_predictor(values, CONFIGS, resamples=5)


RESULTS = {
    "SharpnessResult": lambda: sk.m_sharpness(model(), DATA, m=[1, 4], rho=0.1, progress=False),
    "ModelComparison": lambda: sk.compare_models(model(), model(), DATA, m=1, rho=0.1),
    "Scores": lambda: sk.score_models(
        {f"net {k}": model() for k in range(ROWS + 3)},
        sk.measures.make_measure("training_loss"),
        DATA,
        DATA,
        progress=False,
    ),
    "FitResult": lambda: sk.fit(model(), DATA, epochs=1, progress=False),
    "Eigenpairs": lambda: sk.top_eigenvalues(hessian(), 3),
    "SpectralDensity": lambda: sk.spectral_density(hessian(), steps=5),
    "Tridiagonal": lambda: sk.curvature.lanczos(hessian(), steps=4),
    "CMIResult": lambda: sk.conditional_mutual_information(VALUES, CONFIGS),
    "SignError": lambda: sign_error(VALUES, CONFIGS),
    "CombinedPredictor": predictor,
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_prints_as_a_few_lines_without_arrays(name):
    text = repr(RESULTS[name]())
    assert text.startswith(f"{name}: ")
    assert len(text.splitlines()) <= ROWS + 3 and len(text) < 2500
    assert "array(" not in text and "tensor(" not in text


def test_a_long_table_says_that_it_goes_on():
    scores = RESULTS["Scores"]()
    assert repr(scores).endswith("... 3 more rows: .frame() has all")
    assert scores._repr_html_().count("<tr") == ROWS + 1


def test_only_public_names_are_listed():
    assert set(dir(sk)) == {*sk.__all__, "__version__"}
    for name in dir(sk):
        getattr(sk, name)


@pytest.mark.filterwarnings("ignore:IProgress not found")
def test_a_notebook_has_a_bar(monkeypatch):
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    with progress_bar(progress=True, total=2) as bar:
        assert not bar.disable
    assert progress_bar(progress=False, total=2).disable


def test_a_log_has_a_line_for_what_takes_long_and_none_for_what_does_not(monkeypatch, capsys):
    with progress_bar(progress=True, total=2) as bar:
        bar.update(2)
    with progress_bar(progress=False, total=2) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sharpkit.progress._SECONDS", 0.0)
    with progress_bar(progress=True, total=2, desc="score") as bar:
        bar.update()
        bar.update()
    lines = capsys.readouterr().err
    assert "\r" not in lines
    assert [line.split("|")[0] for line in lines.splitlines()][1:3] == [
        "score:  50%",
        "score: 100%",
    ]


def test_a_file_that_cannot_be_written_is_named_as_it_was_asked_for(tmp_path):
    blocked = tmp_path / "folder"
    blocked.mkdir()
    with pytest.raises(OSError) as caught, atomic_path(blocked) as temporary:
        (temporary / "missing").write_text("")  # some other file: its own name is kept
    assert caught.value.filename == str(temporary / "missing")
    with pytest.raises(FileNotFoundError) as caught, atomic_path(tmp_path / "a.html") as temporary:
        temporary.read_text()
    assert caught.value.filename == str(tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == [blocked]
