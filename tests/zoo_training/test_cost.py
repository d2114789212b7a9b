"""What a zoo would cost: counts are those of the zoo that is trained, times those of the clock."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from sharpkit.cli import main
from sharpkit.datasets import DataSource
from sharpkit.errors import ArgumentError, DataError
from sharpkit.zoo_training import Recipe, train_zoo, training_cost
from sharpkit.zoo_training.cost_counts import flops_of_an_example, sizes_of_data
from sharpkit.zoo_training.cost_trial import timed
from sharpkit.zoo_training.grid_file import ZooPlan, read_plan

SOON = {"seconds": 1e-6}  # an epoch over the first batch is long enough


@pytest.fixture
def blobs(tmp_path):
    """30 and 21 images of 2 x 6 x 5 pixels whose brightness tells the class, as a file."""
    arrays = {}
    for split, count in (("train", 30), ("test", 21)):
        y = np.arange(count) % 3
        noise = 0.3 * np.random.default_rng(count).standard_normal((count, 2, 6, 5))
        arrays[f"x_{split}"] = (noise + y[:, None, None, None] - 1).astype(np.float32)
        arrays[f"y_{split}"] = y
    np.savez(tmp_path / "blobs.npz", **arrays)
    return DataSource(str(tmp_path / "blobs.npz"))


def plan_of(data, **fields):
    recipe = Recipe(dense_units=8, batch_size=8, stop_at_loss=0.6, epochs=20)
    grid = {"width": (3, 5), "dropout": (0.0, 0.3), "batch_size": (8, 16)}
    return ZooPlan(data, "toy", recipe=recipe, grid=grid, **fields)


# --- what is counted ---------------------------------------------------------------------------


def test_operations_are_two_for_each_multiplication_forward_and_backward():
    recipe = Recipe(width=5, num_conv_blocks=2, num_dense_layers=1, dense_units=7)
    # 8 x 6 pixels, 3 channels; pooling halves both; the first layer needs no slope of its input
    first, others = 8 * 6 * 9 * 3 * 5, [4 * 3 * 9 * 5 * 5, 2 * 2 * 5 * 7, 7 * 4]
    forward = 2 * (first + sum(others))
    backward = 2 * (first + 2 * sum(others))
    assert flops_of_an_example(recipe, (8, 6, 3), 4) == (forward + backward, forward)
    sam = Recipe(**{**vars(recipe), "rho": 0.1})
    assert flops_of_an_example(sam, (8, 6, 3), 4) == (2 * (forward + backward), forward)


def test_a_network_in_network_shrinks_its_image_in_every_block():
    recipe = Recipe(architecture="nin", width=4, num_conv_blocks=2, convs_per_block=2)
    spatial = [4 * 4 * 9 * 3 * 4, 4 * 4 * 4 * 4, 2 * 2 * 9 * 4 * 4, 2 * 2 * 4 * 4, 2 * 2 * 4 * 10]
    assert flops_of_an_example(recipe, (8, 8, 3), 10)[1] == 2 * sum(spatial)


def test_networks_steps_and_operations_are_those_of_the_grid(blobs):
    cost = training_cost(plan_of(blobs, replicates=2), **SOON)
    table = cost.frame().set_index("shape")
    assert list(table.index) == [
        f"width={width} batch_size={size}" for width in (3, 5) for size in (8, 16)
    ]
    assert list(table["networks"]) == [4, 4, 4, 4]  # two dropout rates, two replicates
    assert list(table["stack"]) == [1, 1, 1, 1]
    assert list(table["steps_at_most"]) == [4 * 20 * steps for steps in (4, 2, 4, 2)]
    step, forward = flops_of_an_example(plan_of(blobs).recipe, (6, 5, 2), 3)
    wide = [s for s in cost.shapes if s.shape.startswith("width=5")]
    narrow = Recipe(**{**vars(plan_of(blobs).recipe), "width": 5})
    step, forward = flops_of_an_example(narrow, (6, 5, 2), 3)
    epochs = 4 * (20 * 30 * (step + forward) + (30 + 21 + 21) * forward)
    for shape in wide:
        assert table.loc[shape.shape, "flops_at_most"] == pytest.approx(epochs, rel=1e-12)
    assert cost.flops_at_most == pytest.approx(table["flops_at_most"].sum())
    assert cost.networks == 16


def test_shapes_are_named_by_what_makes_them(blobs):
    grid = {"lr": (0.1, 0.2), "rho": (0.0, 0.1, 0.2), "m": (0, 2)}
    sam = training_cost(replace(plan_of(blobs), grid=grid), **SOON)
    assert [(s.shape, s.networks) for s in sam.shapes] == [
        ("rho=0.0", 4), ("m=0 rho>0", 4), ("m=2 rho>0", 4)
    ]  # fmt: skip
    assert [s.flops for s in sam.shapes[1:]] == [s.flops for s in sam.shapes[2:]] * 2
    [one] = training_cost(replace(plan_of(blobs), grid={"lr": (0.1, 0.2)}), **SOON).shapes
    assert one.shape == "all"


def test_disk_is_what_a_run_writes(blobs, tmp_path):
    plan = plan_of(blobs, shipped_test=9)
    expected = training_cost(plan, **SOON).disk
    easy = Recipe(**{**vars(plan.recipe), "stop_at_loss": 10.0})
    train_zoo(
        plan.grid, *plan.load_data(), tmp_path / "zoo", recipe=easy, shipped_test=9,
        progress=False,
    )  # fmt: skip
    written = sum(
        path.stat().st_size
        for folder in ("input_data", "reference_data")
        for path in (tmp_path / "zoo" / folder).rglob("*")
        if path.is_file()
    )
    assert expected == pytest.approx(written, rel=0.02)


def test_stacks_take_the_memory_of_their_networks(blobs):
    data = sizes_of_data(plan_of(blobs)).memory
    assert data == 51 * (4 * 60 + 8)
    alone, three = (training_cost(plan_of(blobs), stack=k, **SOON) for k in (None, 3))
    assert [s.stack for s in three.shapes] == [2, 2, 2, 2]  # as many as have the shape
    for one, stacked in zip(alone.shapes, three.shapes, strict=True):
        assert stacked.memory - data == 2 * (one.memory - data)
        # weights, slopes, momentum and a copy at least
        assert one.memory - data >= 4 * 4 * one.parameters
    assert alone.memory == max(s.memory for s in alone.shapes)


# --- what is timed -----------------------------------------------------------------------------


class Clock:
    """Tells how long epochs took that take 0.001 seconds, and as much again for each example."""

    def __init__(self):
        self.now, self.sizes = 0.0, []

    def __call__(self):
        return self.now

    def prepared(self, size):
        def epoch():
            self.sizes.append(size)
            self.now += 0.001 * (1 + size)

        return epoch


@pytest.mark.parametrize(
    ("n", "seconds", "sizes"),
    [
        (100, 1e-6, [4]),  # the first is long enough
        (100, 0.04, [4, 32]),  # 0.033 of 0.04 seconds
        (20, 10.0, [4, 20]),  # all there are
        (4, 10.0, [4]),
    ],
)
def test_epochs_grow_until_one_is_long_enough(n, seconds, sizes):
    clock = Clock()
    took, size = timed(clock.prepared, n, 4, seconds, clock)
    assert size == sizes[-1]
    assert took == pytest.approx(0.001 * (1 + size))
    assert clock.sizes == [s for s in sizes for _ in range(2)]  # the first of each is not timed


@pytest.mark.parametrize("stack", [None, 2])
def test_hours_are_those_of_the_epoch_that_was_timed(blobs, monkeypatch, stack):
    def timed(prepared, n, least, seconds, clock):
        prepared(least)()  # what would be timed runs
        assert (n, least) in {(30, 8), (30, 16)}
        return 3.0, 15

    monkeypatch.setattr("sharpkit.zoo_training.cost_trial.timed", timed)
    plan = plan_of(blobs, recorded_epochs=5)
    cost = training_cost(plan, stack=stack)
    at_a_time = stack or 1
    assert [s.seconds for s in cost.shapes] == [3.0 * 30 / 15 / at_a_time] * 4
    last = [s.last for s in cost.shapes]
    hours = sum(2 * (20 + x) * 6 / at_a_time / 3600 for x in last)
    assert cost.hours_at_most == pytest.approx(hours)
    assert cost.hours == pytest.approx(sum(2 * (5 + x) * 6 / at_a_time / 3600 for x in last))
    assert "5 epochs of a recorded run" in repr(cost)
    assert math.isnan(training_cost(plan_of(blobs)).hours)


def test_the_callers_random_state_and_threads_stay(blobs):
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    training_cost(plan_of(blobs), stack=2, **SOON)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


# --- data --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "shape", "train", "test", "shipped"),
    [
        ("mini", (1, 14, 14), 2000, 10_000, 2000),
        ("medium", (1, 14, 14), 1000, 10_000, 2000),
        ("task1", (3, 32, 32), 50_000, 10_000, 10_000),
        ("task2", (3, 32, 32), 73_257, 26_032, 26_032),
        ("task8", (1, 28, 28), 60_000, 10_000, 10_000),
        ("cifar-nin", (3, 32, 32), 10_000, 10_000, 10_000),
        ("svhn-nin", (3, 32, 32), 10_000, 26_032, 26_032),
    ],
)
def test_the_data_of_presets_need_not_be_there(preset, shape, train, test, shipped):
    data = sizes_of_data(read_plan(preset))
    assert (data.shape, data.train, data.test, data.shipped) == (shape, train, test, shipped)


def test_more_images_than_there_are_and_vectors_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match="train_size is 50001, of 50000 examples"):
        training_cost(plan_of(DataSource("cifar10", train_size=50_001)))
    flat = {f"x_{s}": np.zeros((4, 3), np.float32) for s in ("train", "test")}
    labels = {f"y_{s}": np.arange(4) for s in ("train", "test")}
    np.savez(tmp_path / "flat.npz", **flat, **labels)
    with pytest.raises(DataError, match=r"shape \(4, 3\), expected \(n, c, h, w\)"):
        training_cost(plan_of(DataSource(str(tmp_path / "flat.npz"))))
    with pytest.raises(ArgumentError, match="limit is 0: expected at least one network"):
        training_cost("mini", limit=0)
    with pytest.raises(ArgumentError, match="seconds is 0: expected seconds > 0"):
        training_cost("mini", seconds=0)


# --- the command -------------------------------------------------------------------------------


def command(*arguments):
    return CliRunner().invoke(main, ["zoo", "train", *map(str, arguments)])


def test_a_dry_run_tells_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command("mini", "--dry-run", "--limit", 1, "--out", "zoo", "--workers", 2)
    assert result.exit_code == 0, result.output
    assert "width=10 num_conv_blocks=1 batch_size=16" in result.output
    assert "1 networks; at most 600 epochs of each in the first of 4 attempts" in result.output
    assert "at the 76 epochs of a recorded run" in result.output
    assert "2 workers, on a core or GPU each: " in result.output
    assert not list(tmp_path.iterdir())


def test_a_zoo_needs_a_place(blobs):
    result = command("mini")
    assert result.exit_code == 2 and "--out is missing" in result.output


@pytest.mark.slow
def test_the_preset_that_ships_is_told_whole():
    result = command("mini", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "96 networks; " in result.output


@pytest.mark.slow
def test_presets_of_the_competition_can_be_timed_one_by_one_and_stacked():
    one_by_one, stacked = ("task1", "task2", "cifar-nin"), ("task1", "task8", "svhn-nin")
    for preset, stack in [*((name, None) for name in one_by_one), *((name, 2) for name in stacked)]:
        cost = training_cost(preset, limit=4, stack=stack, **SOON)
        assert sum(shape.networks for shape in cost.shapes) == 4
        assert max(shape.stack for shape in cost.shapes) == (stack or 1)
        assert all(shape.timed >= 1 and shape.seconds > 0 for shape in cost.shapes)


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["8", "none"])
def test_the_first_networks_of_mini_train_on_other_images(tmp_path, stack):
    """2,000 images that are told apart in a few epochs."""
    x, y = torch.randn(2040, 1, 14, 14), torch.arange(2040) % 10
    x[torch.arange(2040), 0, y, y] += 8
    parts = {"train": slice(0, 2000), "test": slice(2000, None)}
    arrays = {f"{name}_{split}": t[part].numpy() for split, part in parts.items()
              for name, t in (("x", x), ("y", y))}  # fmt: skip
    np.savez(tmp_path / "bright.npz", **arrays)
    where = ("--data", tmp_path / "bright.npz", "--out", tmp_path / "zoo")
    result = command("mini", *where, "--stack", stack, "--limit", 16)
    assert "16 models trained, 0 were there, 0 failed" in result.output, result.output
