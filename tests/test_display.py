"""What a notebook or a prompt shows of results: a few lines, a table, a DataFrame."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import tempfile
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
import torch
from small_cnns import SmallCnnFiles
from torch import nn

import sharpkit as sk
from sharpkit.display import LINES, as_html, as_text
from sharpkit.evaluation import (
    bootstrap_interval,
    cmi_null,
    combined_predictor,
    compare_measures,
    granulated_kendall,
    sign_error,
)
from sharpkit.files import atomic_path
from sharpkit.runs.spectrum import Spectra
from sharpkit.zoo.formats import find_tasks

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
SQUARES = {k: v**2 for k, v in VALUES.items()}


def scores():
    measure = sk.measures.make_measure("training_loss")
    return sk.score_models({"net": model()}, measure, DATA, DATA, progress=False)


def folder_of_checkpoints():
    folder = Path(tempfile.mkdtemp())
    torch.save(model().state_dict(), folder / "a.pt")
    table = pd.DataFrame({"path": ["a.pt"], "train_acc": [1.0], "test_acc": [0.9]})
    with pytest.warns(UserWarning, match="taken as path"):
        (task,) = sk.load_zoo(folder, build=model, table=table).values()
    return task


@cache
def small_cnns():
    folder = SmallCnnFiles(Path(tempfile.mkdtemp()) / "mnist", n=10, networks=2).write()
    return find_tasks(folder)["mnist"]


def spectra():
    density = sk.spectral_density(hessian(), steps=5)
    return Spectra({"net": density}, {"net": {"lambda_max": 1.0}}, {"other": "it diverged"})


def figure3():
    spectra = pd.DataFrame({"optimizer": ["sgd"], "epoch": [1], "lambda_max": [25.0]})
    power = pd.DataFrame({"task": ["t"], "m": [1], "cmi_pgdl": [0.2]})
    return sk.Figure3(Path("figure3.png"), spectra, None, power, {})


@cache
def stacked_task():
    """One network in a stack."""
    layers = [{"layer_name": "Dense", "units": 2}]
    network = sk.zoo.build_model({"input_shape": [3], "model_config": layers})
    writer = sk.ZooWriter(tempfile.mkdtemp(), layout="stacked")
    writer.write_model(
        "small", 0, network, initial=network, hyperparameters={}, possible_values={},
        metrics={"train_acc": 1.0, "test_acc": 0.5},
    )  # fmt: skip
    return sk.load_zoo(writer.path)["small"]


RESULTS = {
    "Barrier": lambda: sk.barrier(model(), nn.Linear(4, 3), DATA, points=5),
    "Checkpoint": lambda: small_cnns()["1"],
    "CheckpointTask": small_cnns,
    "CMIResult": lambda: sk.conditional_mutual_information(VALUES, CONFIGS),
    "CombinedPredictor": lambda: combined_predictor(
        pd.DataFrame({"a": VALUES, "b": SQUARES}), CONFIGS, resamples=5
    ),
    "Comparison": lambda: compare_measures(VALUES, SQUARES, CONFIGS, resamples=50),
    "Diagonal": lambda: sk.diagonal(hessian()),
    "Eigenpairs": lambda: sk.top_eigenvalues(hessian(), 3),
    "Estimate": lambda: sk.measures.training_loss(model(), DATA),
    "Estimated": lambda: sk.trace(hessian()),
    "Figure3": figure3,
    "FolderModel": lambda: folder_of_checkpoints()["a"],
    "FolderTask": folder_of_checkpoints,
    "FitResult": lambda: sk.fit(model(), DATA, epochs=1, progress=False),
    "GranulatedKendall": lambda: granulated_kendall(VALUES, CONFIGS),
    "Interval": lambda: bootstrap_interval(VALUES, CONFIGS, resamples=50),
    "Landscape": lambda: sk.landscape(model(), DATA, points=5),
    "LayerSpectra": lambda: sk.layer_spectra(nn.Sequential(model()), DATA, steps=5),
    "ModelComparison": lambda: sk.compare_models(model(), model(), DATA, m=1, rho=0.1),
    "ModelEntry": lambda: sk.embedded_zoo()["fashion_mnist_14x14"]["0"],
    "PowerLaw": lambda: sk.measures.fit_power_law([1.0, 2.0, 3.0, 5.0, 8.0]),
    "CMINull": lambda: cmi_null(VALUES, CONFIGS, shuffles=20),
    "Recomputed": lambda: small_cnns().recomputed("0"),
    "Scores": scores,
    "SharpnessResult": lambda: sk.m_sharpness(model(), DATA, m=[1, 4], rho=0.1, progress=False),
    "SignError": lambda: sign_error(VALUES, CONFIGS),
    "SignErrorSummary": lambda: sign_error(VALUES, CONFIGS).overall,
    "Spectra": spectra,
    "SpectralDensity": lambda: sk.spectral_density(hessian(), steps=5),
    "StackedModel": lambda: stacked_task()["0"],
    "StackedTask": stacked_task,
    "Task": lambda: sk.embedded_zoo()["fashion_mnist_14x14"],
    "ShapeCost": lambda: sk.training_cost("mini", limit=1, seconds=0.01).shapes[0],
    "TrainingCost": lambda: sk.training_cost("mini", limit=2, seconds=0.01),
    "TrainingReport": lambda: sk.TrainingReport(Path("zoo"), ["0"], ["1"], {"2": "it diverged"}),
    "Tridiagonal": lambda: sk.curvature.lanczos(hessian(), steps=4),
    "Zoo": sk.embedded_zoo,
}
# read from files, or given to rules of one's own, by public functions, but not results
SETTINGS = {"Plan", "AscentRule", "Ball", "Direction"}


def rooms():
    """The package, and each room whose names users import; workers know nothing of them."""
    for found in pkgutil.walk_packages(sk.__path__, "sharpkit."):
        if found.ispkg and found.name != "sharpkit.workers":
            yield importlib.import_module(found.name)
    yield sk


def own_functions(thing):
    """A public function, or the public methods and properties of a class."""
    if inspect.isfunction(thing):
        yield thing
    if inspect.isclass(thing) and thing.__module__.startswith("sharpkit."):
        for name, member in vars(thing).items():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            public = name == "__getitem__" or not name.startswith("_")
            if public and inspect.isfunction(function):
                yield function


def result_classes():
    """What public functions return, and what that holds; what is called is a measure or network."""
    named = [(room, name) for room in rooms() for name in getattr(room, "__all__", [])]
    public = {name: getattr(room, name) for room, name in named}

    def named_in(annotation, module):
        here = {**public, **vars(importlib.import_module(module))}
        for word in re.findall(r"\w+", str(annotation)):
            found = here.get(word)
            own = inspect.isclass(found) and found.__module__.startswith("sharpkit.")
            protocol = getattr(found, "_is_protocol", False)
            if own and not protocol and "__call__" not in dir(found) and word not in SETTINGS:
                yield found

    todo = [
        found
        for thing in public.values()
        for function in own_functions(thing)
        for found in named_in(function.__annotations__.get("return"), function.__module__)
    ]
    classes = set()
    while todo:
        classes.add(found := todo.pop())
        fields = dataclasses.fields(found) if dataclasses.is_dataclass(found) else ()
        inside = {c for f in fields for c in named_in(f.type, found.__module__)}
        todo += inside - classes
    return classes


@cache
def example(key):
    return RESULTS[key]()


def test_every_result_of_a_public_function_is_looked_at_here():
    looked_at = {type(example(key)) for key in RESULTS}
    assert result_classes() - looked_at == set()
    assert looked_at - result_classes() == {Spectra}  # of the command, `sharpkit spectrum`


@pytest.mark.parametrize("key", RESULTS)
def test_a_result_is_a_few_lines_a_table_and_a_frame(key):
    result = example(key)
    title, text = f"{type(result).__name__}: ", repr(result)
    assert text.startswith(title)
    assert len(text.splitlines()) <= LINES and len(text) < 2000
    assert "array(" not in text and "tensor(" not in text
    page = ElementTree.fromstring(f"<div>{result._repr_html_()}</div>")
    assert page.find("p").text.startswith(title)
    assert page.find("table") is not None
    assert not result.frame().empty


def test_a_long_table_says_that_it_goes_on():
    many, few = (pd.DataFrame({"m": range(rows)}) for rows in (15, 10))
    assert as_text("head", many).endswith("... 6 more rows: .frame() has all")
    assert len(as_text("head", many).splitlines()) == LINES
    assert as_html("head", many).count("<tr") == 9 + 1
    assert len(as_text("head", few).splitlines()) == LINES  # a single row more is shown instead
    assert "more" not in as_text("head", few)


def test_names_from_files_are_neither_markup_nor_commands():
    named = "<b>\x1b[2J\n&"
    frame = pd.DataFrame({"model": [named], named: [0.123456]})
    text, page = as_text("head", frame), as_html("<i>", frame)
    assert "".join(text.splitlines()).isprintable()
    assert len(text.splitlines()) == 3 and "0.1235" in text
    assert [p.text for p in ElementTree.fromstring(f"<div>{page}</div>").iter("p")] == ["<i>"]
    assert "<b>" not in page and "\x1b" not in page


def test_a_task_whose_table_cannot_be_read_says_so_in_a_notebook(tmp_path):
    (tmp_path / "model_0").mkdir()
    task = find_tasks(tmp_path)[tmp_path.name]
    assert "model_configs.json is missing" in task._repr_html_()
    assert repr(task) == f"PgdlTask: {tmp_path.name}, 1 models, in {tmp_path}"


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
