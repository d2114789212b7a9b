"""Recipes with SAM in some steps and of some parameters: by hand, in grids, and what they cost."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from sharpkit.cli import main
from sharpkit.datasets import DataSource
from sharpkit.errors import ArgumentError, RunError
from sharpkit.zoo import load_zoo
from sharpkit.zoo_training import Recipe, train_zoo, training_cost
from sharpkit.zoo_training.cost_counts import flops_of_an_example
from sharpkit.zoo_training.grid_file import ZooPlan
from sharpkit.zoo_training.model import begin, train_model

ANY = {"epochs": 1, "stop_at_loss": 1e9}  # one epoch, whatever the loss
SMALL = {"width": 3, "num_conv_blocks": 1, "dense_units": 5, "batch_size": 7, **ANY}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def blobs(count):
    """Noise images whose brightness tells the class, of torch's default dtype."""
    labels = torch.arange(count) % 3
    noise = torch.randn(count, 1, 6, 5, generator=torch.Generator().manual_seed(count))
    images = 0.3 * noise.double() + labels.view(-1, 1, 1, 1) - 1
    return TensorDataset(images.to(torch.get_default_dtype()), labels)


def by_hand(recipe, data, factors, perturbed):
    """An epoch: SGD with momentum, along the gradient at w + ε where a factor is above 0."""
    x, y = data.tensors
    config = recipe.network((6, 5, 1), 3)
    with torch.random.fork_rng():
        start = begin(config, recipe, (5, 0))
        model = start.model.train()
        order = torch.randperm(len(x), generator=start.order)
    named = dict(model.named_parameters())
    velocity = {name: torch.zeros_like(p) for name, p in named.items()}
    for batch, factor in zip(torch.split(order, recipe.batch_size), factors, strict=True):

        def slopes(batch=batch):
            loss = cross_entropy(model(x[batch]), y[batch])
            return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

        g = slopes()
        if factor:
            kept = {name: p.detach().clone() for name, p in named.items()}
            norm = torch.cat([g[name].flatten() for name in perturbed]).norm()
            with torch.no_grad():
                for name in perturbed:
                    named[name] += factor * recipe.rho * g[name] / norm
            g = slopes()
            with torch.no_grad():
                for name, p in named.items():
                    p.copy_(kept[name])
        rate = recipe.lr * (recipe.batch_size / 16) ** 0.5
        with torch.no_grad():
            for name, p in named.items():
                velocity[name] = recipe.momentum * velocity[name] + g[name]
                p -= rate * velocity[name]
    return model.state_dict()


@pytest.mark.parametrize(
    ("settings", "factors", "perturbed"),
    [
        ({"sam_interval": 3}, [1, 0, 0, 1, 0], ["*"]),
        ({"sam_start": 0.4, "sam_parameters": "*.bias"}, [0, 0, 1, 1, 1], ["bias"]),
        ({"sam_stop": 0.8, "rho_schedule": "linear"}, [1, 0.75, 0.5, 0.25, 0], ["*"]),
        (
            {"rho_warmup": 0.6, "sam_parameters": "conv2d.*, dense_1.weight"},
            [0, 1 / 3, 2 / 3, 1, 1],
            ["conv2d.", "dense_1.weight"],
        ),
    ],
)
def test_a_network_is_that_of_the_loop_by_hand(float64, settings, factors, perturbed):
    recipe = Recipe(rho=0.05, **SMALL, **settings)
    data = blobs(34)  # 5 steps
    found = train_model(recipe, data, data, seed=(5,))
    names = [
        name
        for name in ("conv2d.weight", "conv2d.bias", "dense.weight", "dense.bias",
                     "dense_1.weight", "dense_1.bias")
        if any(part in name or part == "*" for part in perturbed)
    ]  # fmt: skip
    for name, tensor in by_hand(recipe, data, factors, names).items():
        np.testing.assert_allclose(found.final[name], tensor.numpy(), rtol=1e-12, atol=1e-12)
    assert found.metrics["perturbed"] == sum(f > 0 for f in factors) / 5


def test_parts_of_a_training_are_parts_of_all_its_epochs():
    recipe = Recipe(rho=0.1, sam_start=0.5, epochs=40, batch_size=32)
    assert recipe.total_steps(300) == 400
    assert [recipe.perturbed(300, epochs) for epochs in (10, 20, 25, 40, 99)] == [
        0.0, 0.0, 0.2, 0.5, 0.5
    ]  # fmt: skip
    assert replace(recipe, rho=0.0).perturbed(300, 40) == 0.0
    every = replace(recipe, sam_start=0.0, sam_interval=3)
    assert every.perturbed(300, 2) == 7 / 20 and every.perturbed(300, 1) == 4 / 10
    assert "perturbed" not in train_model(Recipe(**SMALL), blobs(20), blobs(5)).metrics


# --- grids ---------------------------------------------------------------------------------------


def test_a_grid_may_vary_them(tmp_path):
    data = blobs(30)
    grid = {"rho": [0.0, 0.1], "sam_start": [0.0, 0.5], "sam_parameters": ["*", "dense*"]}
    common = Recipe(**SMALL, sam_interval=2)
    reports = [
        train_zoo(grid, data, data, tmp_path / name, recipe=common, stack=stack, progress=False)
        for name, stack in (("alone", None), ("stacked", 3))
    ]
    assert [len(report.trained) for report in reports] == [8, 8]
    alone, stacked = (load_zoo(tmp_path / name)["task1"] for name in ("alone", "stacked"))
    assert alone.possible_values["sam_parameters"] == ["*", "dense*"]
    found = alone.frame()
    assert found.perturbed.isna().sum() == 4
    assert found.perturbed[4:].tolist() == [0.6, 0.6, 0.4, 0.4]
    for id_ in alone:
        one, other = (task[id_].load().state_dict() for task in (alone, stacked))
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)
    plan = json.loads((tmp_path / "alone" / "training" / "task1.json").read_text())
    assert plan["recipe"]["sam_interval"] == 2 and "sam_stop" not in plan["recipe"]
    with pytest.raises(RunError, match="sam_interval: 2 there, null now"):
        train_zoo(grid, data, data, tmp_path / "alone", recipe=Recipe(**SMALL))


def test_contradictions_are_refused_before_anything_is_trained(tmp_path):
    data = blobs(30)

    def refused(grid, message, **fields):
        recipe = Recipe(**{**SMALL, "rho": 0.1, **fields})
        with pytest.raises(ArgumentError, match=message):
            train_zoo(grid, data, data, tmp_path / "zoo", recipe=recipe)
        assert not (tmp_path / "zoo").exists()

    refused(
        {"width": [3]},
        "sam_start is 0.5, but no network is .* give rho > 0",
        rho=0.0,
        sam_start=0.5,
    )
    refused({"sam_start": [0.0, 0.95]}, "network 1: sam_start is 0.95 and .* none of 5 steps")
    refused(
        {"num_dense_layers": [0, 1]},
        r"network 0: sam_parameters is 'dense_1.\*': no parameter matches 'dense_1.\*'; the model",
        sam_parameters="dense_1.*",
    )
    refused({"width": [3]}, "no parameter is of a normalisation layer", sam_parameters="norm")
    refused({"sam_start": [0.2], "sam_stop": [0.2]}, "leaves SAM no step")


# --- cost ----------------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path):
    arrays = {}
    for split, count in (("train", 30), ("test", 21)):
        x, y = blobs(count).tensors
        arrays |= {f"x_{split}": x.numpy(), f"y_{split}": y.numpy()}
    np.savez(tmp_path / "blobs.npz", **arrays)
    recipe = Recipe(width=3, dense_units=5, batch_size=8, epochs=20, rho=0.1)
    return ZooPlan(
        DataSource(str(tmp_path / "blobs.npz")), "toy", recipe=recipe,
        grid={"sam_start": (0.0, 0.5), "sam_interval": (1, 4)}, recorded_epochs=15,
    )  # fmt: skip


def test_passes_are_those_of_the_steps(plan, monkeypatch):
    """Of 80 steps 80, 20, 40 and 10 are perturbed; of the first 60 it is 60, 15, 20 and 5."""
    timed = []

    def seconds(recipe, *_, **__):
        timed.append((bool(recipe.rho), recipe.where_sam_acts()))
        return (5.0 if recipe.rho else 2.0), 30

    monkeypatch.setattr("sharpkit.zoo_training.cost.epoch_seconds", seconds)
    [shape] = training_cost(plan).shapes
    assert timed == [(True, {}), (False, {})]
    assert shape.perturbed == pytest.approx(150 / 320)
    one, forward = flops_of_an_example(replace(plan.recipe, rho=0.0), (6, 5, 1), 3)
    steps = 320 + 150  # of four networks, of 7.5 examples on average
    expected = 7.5 * steps * one + 4 * (20 * 30 + 30 + 21 + 21) * forward
    assert shape.flops * shape.epochs_of(None) == pytest.approx(expected)
    assert shape.seconds == pytest.approx(2 + 3 * 150 / 320)
    assert shape.recorded_seconds == pytest.approx(2 + 3 * 100 / 240)
    cost = training_cost(replace(plan, grid={"width": (3,)}))
    assert cost.shapes[0].seconds == 5.0 and timed[2:] == [(True, {})]
    frame = training_cost(replace(plan, grid={"rho": (0.0, 0.1)})).frame()
    assert frame.perturbed.tolist() == [0.0, 1.0]


def test_an_epoch_of_either_kind_is_timed(plan):
    for stack in (None, 2):
        [shape] = training_cost(plan, stack=stack, seconds=1e-6).shapes
        assert shape.seconds > 0 and shape.recorded_seconds > 0
    with pytest.raises(ArgumentError, match="no network is trained with SAM"):
        training_cost(replace(plan, recipe=replace(plan.recipe, rho=0.0)))


def test_a_grid_file_has_them(plan, tmp_path):
    text = f"""
task = "toy"
[data]
name = "{plan.data.name}"
[recipe]
width = 3
dense_units = 5
epochs = 1
stop_at_loss = 100.0
rho = 0.1
sam_interval = 2
rho_schedule = "cosine"
rho_warmup = 0.75
[grid]
sam_start = [0, 0.5]
sam_parameters = ["*", "*.bias"]
"""
    (tmp_path / "grid.toml").write_text(text)
    run = CliRunner().invoke(
        main, ["zoo", "train", str(tmp_path / "grid.toml"), "--out", str(tmp_path / "zoo")]
    )
    assert run.exit_code == 1 and "SAM is left no step" in run.output
    (tmp_path / "grid.toml").write_text(text.replace("[grid]", "batch_size = 4\n[grid]"))
    run = CliRunner().invoke(
        main, ["zoo", "train", str(tmp_path / "grid.toml"), "--out", str(tmp_path / "zoo")]
    )
    assert run.exit_code == 0, run.output
    task = load_zoo(tmp_path / "zoo")["toy"]
    assert task.possible_values == {"sam_start": [0.0, 0.5], "sam_parameters": ["*", "*.bias"]}
    assert task.frame().perturbed.tolist() == [3 / 8, 3 / 8, 1 / 8, 1 / 8]
