"""A network trained in a stack is the one that it would be alone, whatever else is in the stack."""

import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.utils.data import TensorDataset

from sharpkit.cli import main
from sharpkit.errors import ArgumentError, ModelError
from sharpkit.workers import Failure
from sharpkit.zoo import load_zoo
from sharpkit.zoo_training import stacked_plan, stacked_state
from sharpkit.zoo_training.model import train_model
from sharpkit.zoo_training.recipe import Recipe
from sharpkit.zoo_training.stacked import train_stacked
from sharpkit.zoo_training.stacked_plan import shape_of, sizes_of, stacks_of
from sharpkit.zoo_training.stacked_state import Job
from sharpkit.zoo_training.zoo import train_zoo


def blobs(count: int, seed: int) -> TensorDataset:
    """Noise images whose brightness tells the class, of torch's default dtype."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    noise = 0.3 * torch.randn(count, 2, 6, 5, generator=generator, dtype=torch.float64)
    images = noise + labels.view(-1, 1, 1, 1) - 1
    return TensorDataset(images.to(torch.get_default_dtype()), labels)


@dataclass(frozen=True, kw_only=True)
class Normed(Recipe):
    """BatchNorm after every convolution, with an offset but no factor (which would start at 0)."""

    def network(self, input_shape, classes):
        config = super().network(input_shape, classes)
        norm = {"layer_name": "BatchNormalization", "scale": False, "momentum": 0.9}
        layers = [
            part
            for layer in config["model_config"]
            for part in ([layer, norm] if layer["layer_name"] == "Conv2D" else [layer])
        ]
        return {**config, "model_config": layers}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def varied(kind=Recipe, count=8, **fields):
    """Recipes of one shape, in which everything else differs."""
    recipes = []
    for i in range(count):
        own = {
            "lr": 0.02 + 0.01 * i,
            "momentum": 0.1 * i,
            "weight_decay": 0.001 * i,
            "init_gain": 1.0 + 0.1 * i,
            "decay": 0.9 + 0.01 * i,
            **fields,
        }
        own["rho"] = fields.get("rho", 0.0) * (1 + i)
        own["dropout"] = fields.get("dropout", 0.0) * (i % 4) / 3
        recipes.append(kind(width=4, dense_units=16, batch_size=7, **own))
    return recipes


def jobs_of(recipes):
    return [Job(str(i), recipe, (5, i)) for i, recipe in enumerate(recipes)]


def alone(recipes, train, test):
    return [train_model(r, train, test, seed=(5, i)) for i, r in enumerate(recipes)]


def assert_same(found, expected, tolerance):
    assert not isinstance(found, Failure), found
    assert found.config == expected.config
    for name, array in expected.initial.items():
        assert np.array_equal(found.initial[name], array)
    for name, array in expected.final.items():
        np.testing.assert_allclose(found.final[name], array, rtol=0, atol=tolerance, err_msg=name)
    for name, value in expected.metrics.items():
        assert found.metrics[name] == pytest.approx(value, rel=0, abs=tolerance), name


FIFTY_STEPS = {"epochs": 1, "stop_at_loss": 1e9}  # of 7 examples, but for the last of 6
DROPOUT = {"dropout": 0.5, "num_dense_layers": 2}
UNTIL = {"lr": 0.04, "decay": 0.99, "dropout": 0.3, "epochs": 200}
NIN = {"dropout": 0.5, "architecture": "nin"}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Recipe, DROPOUT),
        pytest.param(Recipe, {**DROPOUT, "architecture": "vgg"}, marks=pytest.mark.slow),
        pytest.param(Normed, {}, marks=pytest.mark.slow),
        pytest.param(Recipe, {"rho": 0.02, **DROPOUT}, marks=pytest.mark.slow),
        pytest.param(Recipe, {"rho": 0.02, "m": 1, **NIN}, marks=pytest.mark.slow),
        pytest.param(Recipe, {"rho": 0.02, "m": 2, **DROPOUT}, marks=pytest.mark.slow),
        (Recipe, {"rho": 0.02, "m": 3, **NIN}),
        pytest.param(Normed, {"rho": 0.02, **DROPOUT}, marks=pytest.mark.slow),
        (Normed, {"rho": 0.02, "m": 2}),
    ],
)
def test_stacks_of_any_size_give_the_networks_that_train_alone(float64, kind, fields):
    recipes = varied(kind, **fields, **FIFTY_STEPS)
    train, test = blobs(349, 0), blobs(21, 1)
    expected = alone(recipes, train, test)
    assert all(
        np.abs(model.final["conv2d.weight"] - model.initial["conv2d.weight"]).max() > 0.01
        for model in expected
    )
    for most, count in ((1, 2), (3, 8), (8, 8)):
        jobs = jobs_of(recipes)[:count]
        found = dict(train_stacked(jobs, train, test, most=most, shipped_test=21))
        assert len(found) == count
        for i, model in enumerate(expected[:count]):
            assert_same(found[str(i)], model, 1e-10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Recipe, DROPOUT),
        (Normed, {"rho": 0.02, **DROPOUT}),
        (Recipe, {"rho": 0.02, "m": 2, **NIN}),
    ],
)
def test_a_stack_on_a_gpu_gives_the_networks_that_train_alone_there(float64, kind, fields):
    recipes = varied(kind, **fields, **FIFTY_STEPS)
    train, test = blobs(349, 0), blobs(21, 1)
    found = dict(train_stacked(jobs_of(recipes), train, test, most=8, device="cuda"))
    for i, recipe in enumerate(recipes):
        expected = train_model(recipe, train, test, seed=(5, i), device="cuda")
        assert_same(found[str(i)], expected, 1e-10)


def parts_of_trainings(kind=Recipe, **fields):
    """Recipes whose perturbed steps, parameters and radii differ; some have none in an epoch."""
    changes = [
        {"sam_interval": 3},
        {"sam_start": 0.4, "rho_schedule": "linear"},
        {"sam_stop": 0.6, "sam_parameters": "*.bias"},
        {"sam_start": 0.6, "sam_interval": 2, "sam_parameters": "conv2d.*,*_1.weight"},
        {"rho_warmup": 0.5, "rho_schedule": "cosine"},
        {"rho_schedule": "step", "sam_interval": 7},
        {},
        {"sam_start": 0.3, "sam_stop": 0.4},
    ]
    recipes = varied(kind, rho=0.02, **fields)
    return [replace(recipe, **change) for recipe, change in zip(recipes, changes, strict=True)]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Normed, {"m": 3, **DROPOUT}),
        pytest.param(Recipe, DROPOUT, marks=pytest.mark.slow),
        pytest.param(Recipe, {"m": 1, **NIN}, marks=pytest.mark.slow),
    ],
)
def test_steps_of_either_kind_stack(float64, kind, fields):
    """Where networks of a stack are in plain and perturbed steps at the same time."""
    recipes = parts_of_trainings(kind, **fields, **FIFTY_STEPS)
    train, test = blobs(69, 0), blobs(21, 1)  # 10 steps, the last of 6 examples
    expected = alone(recipes, train, test)
    shares = [model.metrics["perturbed"] for model in expected]
    assert shares[0] == 0.4 and shares[6] == 1.0 and len(set(shares)) > 5
    for most, count in ((1, 2), (3, 8), (8, 8)):
        found = dict(
            train_stacked(jobs_of(recipes)[:count], train, test, most=most, shipped_test=21)
        )
        assert len(found) == count
        for i, model in enumerate(expected[:count]):
            assert_same(found[str(i)], model, 1e-10)


@pytest.mark.parametrize("sam", [{}, {"rho": 0.02, "m": 2}])
def test_networks_that_are_done_leave_and_others_take_their_places(float64, sam):
    recipes = [
        replace(recipe, stop_at_loss=0.5 + 0.1 * (i % 3))
        for i, recipe in enumerate(varied(**UNTIL, **sam))
    ]
    train, test = blobs(30, 0), blobs(21, 1)
    expected = alone(recipes, train, test)
    assert len({model.metrics["epochs"] for model in expected}) > 3
    found = list(train_stacked(jobs_of(recipes), train, test, most=3))
    assert [id_ for id_, _ in found] != sorted(id_ for id_, _ in found)
    backwards = dict(train_stacked(jobs_of(recipes)[::-1], train, test, most=4))
    for i, model in enumerate(expected):
        assert_same(dict(found)[str(i)], model, 1e-8)
        assert_same(backwards[str(i)], model, 1e-8)


@pytest.mark.parametrize("sam", [{}, {"rho": 0.02}, {"rho": 0.02, "m": 2}])
def test_one_that_diverges_tells_so_and_leaves_the_others_alone(float64, sam):
    recipes = varied(count=3, **UNTIL, **sam, stop_at_loss=0.6)
    recipes[1] = replace(recipes[1], lr=1e200)
    train, test = blobs(30, 0), blobs(21, 1)
    found = dict(train_stacked(jobs_of(recipes), train, test, most=3))
    with pytest.raises(ModelError, match="diverged") as error:
        train_model(recipes[1], train, test, seed=(5, 1))
    assert found["1"] == Failure(str(error.value))
    for i in (0, 2):
        assert_same(found[str(i)], train_model(recipes[i], train, test, seed=(5, i)), 1e-8)


def test_a_missed_target_is_tried_again_from_other_random_numbers(float64):
    train, test = blobs(30, 0), blobs(21, 1)
    recipes = [replace(r, stop_at_loss=0.75, epochs=2, attempts=30) for r in varied(**UNTIL)]
    expected = alone(recipes, train, test)
    assert len({model.metrics["attempt"] for model in expected}) > 1
    found = dict(train_stacked(jobs_of(recipes), train, test, most=3))
    for i, model in enumerate(expected):
        assert_same(found[str(i)], model, 1e-10)


def test_an_error_is_that_of_all_that_are_not_done(float64, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(stacked_state, "sgd_slopes", full)
    found = dict(train_stacked(jobs_of(varied()), blobs(30, 0), blobs(21, 1), most=3))
    assert len(found) == 8
    assert all(failure.message.endswith("give a smaller stack") for failure in found.values())


def test_the_callers_random_state_stays():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    recipes = varied(count=2, **DROPOUT, **FIFTY_STEPS)
    assert len(list(train_stacked(jobs_of(recipes), blobs(30, 0), blobs(21, 1), most=2))) == 2
    assert torch.equal(torch.get_rng_state(), state)


# --- which networks, and how many ------------------------------------------------------------


def test_little_memory_gives_smaller_stacks_and_the_same_networks(float64, monkeypatch):
    recipes = varied(rho=0.02, m=1, count=3, **FIFTY_STEPS)
    train, test = blobs(69, 0), blobs(21, 1)
    shape = shape_of(recipes[0], (6, 5, 2), 3)
    expected = dict(train_stacked(jobs_of(recipes), train, test, most=3))
    budgets = [2**i for i in range(10, 30)]
    sizes = []
    for budget in budgets:
        monkeypatch.setattr(stacked_plan, "default_memory_budget", lambda _, b=budget: b)
        sizes.append(sizes_of(shape, *train.tensors, 100))
    for now, more in pairwise(sizes):
        assert now.networks <= more.networks <= 2 * now.networks + 2
        assert now.networks * now.groups <= more.networks * more.groups
    assert (sizes[0].networks, sizes[0].groups) == (1, 1)
    assert (sizes[-1].networks, sizes[-1].groups) == (100, 7)
    part = next(b for b, s in zip(budgets, sizes, strict=True) if s.networks == 2)
    for budget in (2**10, part):
        monkeypatch.setattr(stacked_plan, "default_memory_budget", lambda _, b=budget: b)
        found = dict(train_stacked(jobs_of(recipes), train, test, most=3))
        for id_, model in expected.items():
            assert_same(found[id_], model, 1e-10)


def test_only_what_has_one_shape_is_stacked():
    common = Recipe(architecture="vgg", rho=0.1)
    together = [
        replace(common, lr=0.3, momentum=0.1, weight_decay=0.1, init_gain=2.0, decay=0.5),
        replace(common, dropout=0.5, rho=0.2, stop_at_loss=0.2, epochs=3, m=32),
    ]
    apart = [{"width": 8}, {"batch_size": 16}, {"m": 4}, {"rho": 0.0}, {"num_dense_layers": 2}]
    recipes = dict(enumerate([common, *together, *(replace(common, **change) for change in apart)]))
    recipes = {str(i): recipe for i, recipe in recipes.items()}
    found = stacks_of(recipes, (8, 8, 3), 10, stack=5, device=torch.device("cpu"))
    assert found == [(["0", "1", "2"], 5), *(([str(i)], 5) for i in range(3, 8))]


def test_auto_stacks_on_a_gpu_what_does_not_fill_it():
    small = Recipe(batch_size=64)
    large = Recipe(architecture="vgg", width=512, convs_per_block=2, batch_size=512)
    impossible = Recipe(architecture="vgg", width=1, num_conv_blocks=3)
    recipes = {"0": small, "1": large, "2": small, "3": large, "4": impossible}
    ((ids, most),) = stacks_of(recipes, (32, 32, 3), 10, stack="auto", device=torch.device("cuda"))
    assert ids == ["0", "2"] and most > 16
    for stack, device in (("auto", "cpu"), (None, "cuda")):
        assert not stacks_of(recipes, (32, 32, 3), 10, stack=stack, device=torch.device(device))


@pytest.mark.parametrize("stack", [0, -1, 2.0, True, "all"])
def test_other_stacks_are_refused(tmp_path, stack):
    with pytest.raises(ArgumentError, match='expected "auto", a number of networks >= 1, or None'):
        train_zoo({"width": [4]}, blobs(9, 0), blobs(9, 1), tmp_path, stack=stack)


# --- zoos ------------------------------------------------------------------------------------

GRID = {"lr": [0.02, 0.03, 1e30], "width": [3, 5], "dropout": [0.0, 0.3]}
EASY = Recipe(dense_units=8, batch_size=8, stop_at_loss=0.6, epochs=200, attempts=2)


def train(out, **changes):
    arguments = {"recipe": EASY, "shipped_test": 12, "progress": False, **changes}
    return train_zoo(GRID, blobs(30, 0), blobs(21, 1), out, **arguments)


def assert_same_zoo(found, expected):
    with pytest.warns(UserWarning, match="settings have no model"):
        one, other = load_zoo(found)["task1"], load_zoo(expected)["task1"]
    assert list(one) == list(other)
    for id_, entry in other.items():
        assert one[id_].hyperparameters == entry.hyperparameters
        assert one[id_].metrics["epochs"] == entry.metrics["epochs"]
        state = one[id_].load().state_dict()
        for name, tensor in entry.load().state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    path = tmp_path_factory.mktemp("zoo")
    assert len(train(path, stack=None).failed) == 4
    return path


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stacked_zoo_is_the_zoo_of_networks_alone(one_by_one, tmp_path, workers):
    report = train(tmp_path, stack=3, workers=workers)
    assert report.trained == [str(i) for i in range(8)]
    assert list(report.failed) == [str(i) for i in range(8, 12)]
    assert all("diverged" in message for message in report.failed.values())
    assert_same_zoo(tmp_path, one_by_one)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from sharpkit.zoo_training import zoo
from zoo_training.test_stacked import train
written, write = [], zoo._write
def write_some(*arguments):
    if len(written) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(arguments)
    write(*arguments)
zoo._write = write_some
train({out!r}, stack=3)
"""


def test_a_killed_run_goes_on_after_its_finished_models(one_by_one, tmp_path):
    tests = str(Path(__file__).parents[1])
    script = KILLED.format(tests=tests, out=str(tmp_path))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    report = train(tmp_path, stack=2)
    assert len(report.skipped) == 3
    assert sorted(report.skipped + report.trained) == [str(i) for i in range(8)]
    assert_same_zoo(tmp_path, one_by_one)


def test_the_command_stacks(tmp_path):
    data, grid = tmp_path / "blobs.npz", tmp_path / "grid.toml"
    arrays = {}
    for split, count in (("train", 30), ("test", 21)):
        x, y = blobs(count, count).tensors
        arrays |= {f"x_{split}": x.numpy(), f"y_{split}": y.numpy()}
    np.savez(data, **arrays)
    grid.write_text(
        f'task = "toy"\n[data]\nname = "{data}"\n[recipe]\nbatch_size = 8\nstop_at_loss = 0.8\n'
        "[grid]\nlr = [0.02, 0.03]\n"
    )

    def command(stack, out):
        arguments = ["zoo", "train", str(grid), "--out", str(tmp_path / out), "--stack", stack]
        return CliRunner().invoke(main, arguments)

    for stack in ("2", "none", "auto"):
        result = command(stack, stack)
        assert "2 models trained, 0 were there, 0 failed" in result.output, result.output
    alone, together = (load_zoo(tmp_path / name)["toy"] for name in ("none", "2"))
    assert [m.metrics["epochs"] for m in alone.values()] == [
        m.metrics["epochs"] for m in together.values()
    ]
    assert command("many", "many").exit_code == 2
    assert "expected" in command("0", "0").output
