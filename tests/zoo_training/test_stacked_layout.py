"""Networks trained into stacks, and the whole way from there: looked into, scored, rated."""

from __future__ import annotations

import pickle

import pytest
import torch
from click.testing import CliRunner
from torch.utils.data import TensorDataset

import sharpkit as sk
from sharpkit.cli import main
from sharpkit.errors import RunError
from sharpkit.zoo import StackedTask
from sharpkit.zoo.stacked.file import read_stack
from sharpkit.zoo_training.model import train_model
from sharpkit.zoo_training.recipe import Recipe

GRID = {"width": [3, 5], "dropout": [0.0, 0.2, 0.4]}
RECIPE = Recipe(dense_units=6, batch_size=8, stop_at_loss=0.7, epochs=200)


def blobs(count: int, seed: int) -> TensorDataset:
    """Noise images whose brightness tells the class."""
    labels = torch.arange(count) % 3
    noise = torch.randn(count, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(0.3 * noise + labels.view(-1, 1, 1, 1) - 1, labels)


TRAIN, TEST = blobs(24, 0), blobs(18, 1)


def train(out, **options):
    options = {"recipe": RECIPE, "progress": False, "layout": "stacked"} | options
    return sk.train_zoo(GRID, TRAIN, TEST, out, **options)


def numbers(zoo):
    return {
        (id_, kind, name): tensor
        for id_, entry in zoo["task1"].items()
        for kind in ("final", "initial")
        for name, tensor in entry.load(kind).state_dict().items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("zoo")
    assert train(path).trained == list("012345")
    return path


def test_the_layout_changes_no_number(trained, tmp_path):
    train(tmp_path, layout="pgdl")
    zoo, other = sk.load_zoo(trained), sk.load_zoo(tmp_path)
    assert isinstance(zoo["task1"], StackedTask)
    assert same(numbers(zoo), numbers(other))
    assert zoo["task1"].model_configs == other["task1"].model_configs
    files = list((trained / "input_data" / "task1" / "networks").iterdir())
    assert len(files) == 2  # one for each width


def test_an_interrupted_training_goes_on(trained, tmp_path, monkeypatch):
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train_model(*args, **kwargs)

    monkeypatch.setattr("sharpkit.zoo_training.zoo.train_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.undo()
    report = train(tmp_path)
    assert report.skipped == list("012") and report.trained == list("345")
    assert same(numbers(sk.load_zoo(trained)), numbers(sk.load_zoo(tmp_path)))
    assert train(tmp_path).skipped == list("012345")


def test_another_layout_in_the_same_place_is_refused(trained, tmp_path):
    with pytest.raises(RunError, match='layout: "stacked" there, null now'):
        train(trained, layout="pgdl")
    train(tmp_path, layout="pgdl", limit=1)
    with pytest.raises(RunError, match='layout: null there, "stacked" now'):
        train(tmp_path)


def test_the_command_has_the_layout(tmp_path):
    (tmp_path / "grid.toml").write_text(
        'task = "few"\n[data]\nname = "embedded"\ntrain_size = 40\n'
        "[recipe]\nwidth = 3\nstop_at_loss = 2.5\n[grid]\ndense_units = [4, 6]\n"
    )
    arguments = ["zoo", "train", str(tmp_path / "grid.toml"), "--layout", "stacked", "--out"]
    result = CliRunner().invoke(main, [*arguments, str(tmp_path / "zoo")])
    assert result.exit_code == 0, result.output
    assert isinstance(sk.load_zoo(tmp_path / "zoo")["few"], StackedTask)
    shown = CliRunner().invoke(main, ["zoo", "info", str(tmp_path / "zoo"), "--deep"])
    assert shown.exit_code == 0 and "2 rows, 0 with problems" in shown.output


# --- scored, and scored again where something changed --------------------------------------------


class Counting:
    """The squared norm of the weights, and for which calls it was computed."""

    name = "norm"

    def __init__(self):
        self.calls = 0

    def __call__(self, model, data, *, seed):
        self.calls += 1
        return sum(p.double().square().sum().item() for p in model.parameters())


@pytest.fixture
def zoo(trained, tmp_path):
    """Another copy, through the other layout."""
    sk.write_zoo(sk.load_zoo(trained), tmp_path / "plain")
    sk.write_zoo(sk.load_zoo(tmp_path / "plain"), tmp_path / "zoo", layout="stacked")
    return tmp_path / "zoo"


def norms(zoo, out, calls):
    """The scores, which took so many calls of the measure."""
    measure = Counting()
    scores = sk.score_zoo(sk.load_zoo(zoo), measure, out=out, progress=False)
    assert measure.calls == calls
    return scores


@pytest.mark.filterwarnings("ignore:given width,dropout the gaps leave nothing to predict")
def test_the_whole_way(zoo, tmp_path):
    """Info, scores, and a table of ratings are those of the same zoo in directories."""
    tables = []
    for path in (zoo, tmp_path / "plain"):
        assert not sk.zoo_info(path, deep=True)["problem"].any()
        measures = [sk.MSharpness(m=[1, 4], rho=0.05), sk.measures.make_measure("training_loss")]
        distance = sk.measures.make_measure("distance_from_initial")
        scores = sk.score_zoo(
            sk.load_zoo(path), [*measures, distance], n=16, test_metrics=True, progress=False
        )
        assert scores.failures.empty
        tables.append((scores.frame(), scores.metrics(), sk.evaluate(scores, resamples=20)))
    for stacked, plain in zip(*tables, strict=True):
        assert stacked.equals(plain)


def test_only_what_changed_is_scored_again(zoo, tmp_path):
    run = tmp_path / "run"
    before = norms(zoo, run, 6).frame().set_index("model")["value"]
    norms(zoo, run, 0)
    task = sk.load_zoo(zoo)["task1"]
    writer, changed = sk.ZooWriter(zoo, layout="stacked"), task["1"].load()
    with torch.no_grad():
        next(changed.parameters()).mul_(2)
    entry = task.model_configs["1"]
    writer.write_model(
        "task1",
        1,
        changed,
        initial=task["1"].load("initial"),
        hyperparameters=task["1"].hyperparameters,
        possible_values={k: h["possible_values"] for k, h in entry["hparams"].items()},
        metrics=task["1"].metrics,
    )
    writer.finish()
    after = norms(zoo, run, 1).frame().set_index("model")["value"]
    assert [i for i in before.index if before[i] != after[i]] == ["1"]


def test_a_changed_byte_concerns_one_model(zoo, tmp_path):
    run = tmp_path / "run"
    norms(zoo, run, 6)
    (path,) = sk.load_zoo(zoo)["task1"]["4"].files()
    stack = read_stack(path)
    stored, rows = stack.tensors["final/dense.weight"], len(stack.rows)
    content = bytearray(path.read_bytes())
    content[stored.start + stack.rows["4"] * stored.size // rows] ^= 1
    path.write_bytes(content)
    scores = norms(zoo, run, 0)  # the others are as they were, and this one does not load
    (failure,) = scores.failures.itertuples()
    assert failure.model == "4"
    assert f"{path.name}, network 4: its final weights are damaged" in failure.error
    assert set(scores.frame()["model"]) == set("01235")


def test_files_that_are_brought_together_are_not_scored_again(tmp_path):
    train(tmp_path / "zoo", limit=2)
    with pytest.warns(UserWarning, match="settings have no model"):
        norms(tmp_path / "zoo", tmp_path / "run", 2)
    train(tmp_path / "zoo")
    assert len(norms(tmp_path / "zoo", tmp_path / "run", 4).frame()) == 6


def test_a_task_is_sent_to_workers_without_its_data(zoo):
    task = sk.load_zoo(zoo)["task1"]
    small = len(pickle.dumps(task))
    inputs, _ = task.dataset("train").tensors
    assert len(pickle.dumps(task)) == small
    sent = pickle.loads(pickle.dumps(task))
    assert same(numbers({"task1": sent}), numbers({"task1": task}))
    assert torch.equal(sent.dataset("train").tensors[0], inputs)


@pytest.mark.slow
def test_workers_read_stacks(zoo):
    measure = sk.MSharpness(m=4, rho=0.05)
    alone, two = (
        sk.score_zoo(sk.load_zoo(zoo), measure, n=16, workers=workers, progress=False).frame()
        for workers in (1, 2)
    )
    assert alone.equals(two)
