"""Figure 3: what its tables say is what the trainings, spectra and scores are."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from zoos import write_small_zoo

import sharpkit as sk
from sharpkit.cli import main
from sharpkit.contract.loading import load_examples
from sharpkit.errors import ArgumentError, RunError
from sharpkit.runs.figure3 import figure3, read_plan
from sharpkit.runs.figure3.trainings import best_lr
from sharpkit.training import build_architecture, fit
from sharpkit.zoo_training.grid_file import read_plan as read_zoo_plan, settings_of

TINY = """
[data]
name = "embedded"
train_size = 96

[training]
architecture = "nin-4x1"
epochs = 2
batch_size = 32
lr = [0.02, 0.05]
m = [1, 32]
rho = [0.01, 0.05]
seeds = [0, 1]

[spectra]
epochs = [0, 2]
m = 32
rho = 0.05
n = 40
steps = 12
probes = 2

[power]
zoo = "{zoo}"
rho = 0.1
m = [1, 4, 24]
"""
TABLES = ("spectra", "test_error", "trainings", "predictive_power", "density")


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preset")
    zoo = write_small_zoo(folder / "zoo")
    path = folder / "tiny.toml"
    path.write_text(TINY.format(zoo=zoo))
    return path


@pytest.fixture(scope="module")
def made(preset, tmp_path_factory):
    out = tmp_path_factory.mktemp("figure")
    return figure3(preset, out=out, progress=False), out


def table(out: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(out / f"{name}.csv")


def test_every_training_is_one_of_fit(preset, made):
    result, out = made
    assert not result.failures and result.picture.stat().st_size > 20_000
    trainings, plan = table(out, "trainings"), read_plan(preset)
    assert len(trainings) == 2 * 2 + 2 * 2 * 2
    train, test = plan.data.load()
    row = trainings.query("optimizer == 'sam' and m == 1 and rho == 0.05 and seed == 1").iloc[0]
    model = build_architecture("nin-4x1", (1, 14, 14), 10, seed=1)
    torch.set_num_threads(1)
    history = fit(
        model, train, test, epochs=2, optimizer="sam", m=1, rho=0.05, lr=row["lr"], batch_size=32,
        seed=1, progress=False,
    ).history  # fmt: skip
    assert row["test_error"] == pytest.approx(1 - history["test_accuracy"].iloc[-1], abs=1e-12)
    assert row["train_loss"] == pytest.approx(history["train_loss"].iloc[-1], rel=1e-6)
    kept = load_file(out / "trainings" / f"sam-m1-rho0.05-lr{row['lr']:g}-seed1/model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


def test_the_middle_table_has_means_and_standard_errors_over_seeds(made):
    result, out = made
    trainings = table(out, "trainings")
    pd.testing.assert_frame_equal(
        result.test_error, table(out, "test_error"), check_dtype=False, check_exact=False
    )
    for row in result.test_error.itertuples():
        of = trainings[(trainings["optimizer"] == row.optimizer) & (trainings["lr"] == row.lr)]
        if row.optimizer == "sam":
            of = of[(of["m"] == row.m) & (of["rho"] == row.rho)]
        first, second = of["test_error"]
        assert row.seeds == 2
        assert row.test_error == pytest.approx((first + second) / 2)
        assert row.std_error == pytest.approx(abs(first - second) / 2)


def test_sam_has_the_learning_rate_that_is_best_for_sgd(made):
    rows = made[0].test_error
    sgd = rows[rows["optimizer"] == "sgd"].set_index("lr")["test_error"]
    assert len(sgd) == 2
    assert set(rows[rows["optimizer"] == "sam"]["lr"]) == {sgd.idxmin()}


def test_a_learning_rate_at_which_a_seed_failed_is_not_chosen():
    rows = [("sgd", lr, seed, lr) for lr in (0.1, 0.2) for seed in (0, 1)]
    trainings = pd.DataFrame(rows, columns=["optimizer", "lr", "seed", "test_error"])
    assert best_lr(trainings, 2) == 0.1
    assert best_lr(trainings.iloc[1:], 2) == 0.2
    with pytest.raises(RunError, match="at every learning rate"):
        best_lr(trainings.iloc[1:3], 2)


def test_the_left_table_has_the_largest_eigenvalues_of_the_loss(preset, made):
    result, out = made
    spectra, plan = result.spectra, read_plan(preset)
    assert len(spectra) == 2 * 2 * 2
    assert set(table(out, "density")["epoch"]) == {0, 2}
    row = spectra.query("optimizer == 'sam' and seed == 1 and epoch == 2").iloc[0]
    model = build_architecture("nin-4x1", (1, 14, 14), 10, seed=1)
    name = f"sam-m32-rho0.05-lr{row['lr']:g}-seed1"
    model.load_state_dict(load_file(out / "trainings" / name / "epoch-2.safetensors"))
    examples = load_examples(plan.data.load()[0], n=40, seed=0)
    shapes = [p.shape for p in model.parameters()]
    sizes = [p.numel() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]

    def loss(flat):
        parts = [v.view(s) for v, s in zip(flat.split(sizes), shapes, strict=True)]
        weights = dict(zip(names, parts, strict=True))
        outputs = torch.func.functional_call(model, weights, examples.inputs)
        return cross_entropy(outputs, examples.labels)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    hessian = torch.func.jacrev(torch.func.grad(loss))(flat)
    values = torch.linalg.eigvalsh(hessian.double()).flip(0)
    assert row["lambda_max"] == pytest.approx(float(values[0]), rel=1e-3)
    ratio = float(values[0] / values[4])
    assert row["lambda_max_over_lambda_5"] == pytest.approx(ratio, rel=1e-2)


def test_the_right_table_is_that_of_evaluate(preset, made):
    zoo = sk.load_zoo(read_plan(preset).power.zoo)
    scores = sk.score_zoo(
        zoo, sk.MSharpness(m=[1, 4, 24], rho=0.1), workers=sk.Workers(threads=1), progress=False
    )
    expected = sk.evaluate(scores)
    found = made[0].predictive_power
    assert list(found["m"]) == [1, 4, 24]
    np.testing.assert_allclose(found["cmi_pgdl"], expected["cmi_pgdl"], rtol=1e-6)
    np.testing.assert_allclose(found["kendall_tau"], expected["kendall_tau"], rtol=1e-6)


def comparable(out):
    return {
        name: table(out, name).drop(columns="seconds", errors="ignore").to_csv(index=False)
        for name in TABLES
    }


@pytest.mark.slow
def test_neither_workers_nor_an_interruption_change_a_number(preset, made, tmp_path, monkeypatch):
    from sharpkit.runs.figure3 import trainings

    calls = []

    def interrupted(*args, **kwargs):
        calls.append(kwargs["out"])
        if len(calls) == 6:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    monkeypatch.setattr(trainings, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        figure3(preset, out=tmp_path, progress=False)
    monkeypatch.undo()
    figure3(preset, out=tmp_path, workers=2, progress=False)
    assert comparable(tmp_path) == comparable(made[1])


def test_a_finished_figure_is_drawn_again_without_training(preset, made, monkeypatch):
    from sharpkit.training.loop import Training

    def epoch(*args, **kwargs):
        raise AssertionError("an epoch was trained")

    monkeypatch.setattr(Training, "_epoch", epoch)
    before = comparable(made[1])
    result = figure3(preset, out=made[1], progress=False)
    assert not result.failures
    assert comparable(made[1]) == before


def test_the_right_panel_alone_needs_no_training(preset, tmp_path):
    plan = replace(read_plan(preset), data=replace(read_plan(preset).data, name="nowhere"))
    result = figure3(plan, out=tmp_path, panels=["right"], progress=False)
    assert result.spectra is None and result.test_error is None
    assert not (tmp_path / "trainings").exists()
    # the other panels may follow with any training
    other = replace(plan, data=read_plan(preset).data)
    assert figure3(other, out=tmp_path, panels=["right"], progress=False).picture.is_file()


def test_what_diverges_is_recorded_and_the_rest_goes_on(preset, tmp_path):
    plan = read_plan(preset)
    wild = replace(plan, training=replace(plan.training, lr=(0.05, 1e30), m=(32,), seeds=(0,)))
    result = figure3(wild, out=tmp_path, panels=["left", "middle"], progress=False)
    assert list(result.failures) == ["sgd-lr1e+30-seed0"]
    assert "epoch 1: the loss is nan" in result.failures["sgd-lr1e+30-seed0"]
    assert set(result.test_error["lr"]) == {0.05}
    assert len(result.spectra) == 4
    hopeless = replace(plan, training=replace(plan.training, lr=(1e30,)))
    with pytest.raises(RunError, match="every training with SGD failed: sgd-lr1e"):
        figure3(hopeless, out=tmp_path / "none", panels=["middle"], progress=False)


def test_a_directory_of_another_figure_is_refused(preset, made):
    plan = read_plan(preset)
    other = replace(plan, training=replace(plan.training, epochs=3))
    with pytest.raises(RunError, match=r"training: epochs: 2 there, 3 now"):
        figure3(other, out=made[1], progress=False)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs = 2\n", "", r"tiny\.toml, training: the field 'epochs' is missing"),
        ("epochs = 2\n", 'epochs = "2"\n', r"tiny\.toml, training, epochs: found '2', expected"),
        ("epochs = [0, 2]", "epochs = [0, 3]", r"tiny\.toml: spectra: epochs is \[0, 3\]"),
        ("m = [1, 32]", "m = []", r"tiny\.toml, training: m is \[\], expected distinct values"),
        ("rho = [0.01, 0.05]", "rho = [-0.1]", r"tiny\.toml, training: rho is \[-0\.1\]"),
        ("steps = 12", "step = 12", r"tiny\.toml, spectra: unknown field 'step'"),
        ("[power]", "[strength]", r"tiny\.toml: unknown field 'strength'"),
    ],
)
def test_a_faulty_preset_is_named_with_the_field(preset, tmp_path, old, new, message):
    path = tmp_path / "tiny.toml"
    assert old in preset.read_text()
    path.write_text(preset.read_text().replace(old, new, 1))
    with pytest.raises(ArgumentError, match=message):
        read_plan(path)


def test_code_that_a_preset_names_is_not_run(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planted_net.py").write_text("open('was_run', 'w')\n")
    path = tmp_path / "own.toml"
    path.write_text(preset.read_text().replace('"nin-4x1"', '"planted_net:build"'))
    for build in (None, "planted_net:other"):
        with pytest.raises(ArgumentError, match="code that a file names is not run"):
            figure3(path, out=tmp_path / "out", build=build, progress=False)
    assert not (tmp_path / "was_run").exists()
    assert read_plan(path, "planted_net:build").training.architecture == "planted_net:build"


def test_unknown_panels_and_presets_are_refused(preset, tmp_path):
    with pytest.raises(ArgumentError, match="panels is"):
        figure3(preset, out=tmp_path, panels=["top"])
    with pytest.raises(ArgumentError, match=r"no preset 'maxi': .* cifar10, fashion, mini, paper"):
        figure3("maxi", out=tmp_path)


@pytest.mark.parametrize("name", ["mini", "fashion", "cifar10", "paper"])
def test_presets_have_the_papers_group_sizes_and_their_networks_exist(name):
    plan = read_plan(name)
    assert plan.training.m == plan.power.m == (1, 4, 16, 64, 256)
    shape = {"mini": (1, 14, 14), "fashion": (1, 28, 28)}.get(name, (3, 32, 32))
    with torch.device("meta") if name == "paper" else torch.device("cpu"):
        assert build_architecture(plan.training.architecture, shape, 10, seed=0)
    assert plan.spectra.m in plan.training.m and plan.spectra.rho in plan.training.rho
    assert len(plan.training.seeds) >= 3


def test_experiments_are_readable():
    folder = Path(__file__).parents[2] / "benchmarks" / "experiments"
    networks = {"fashion_small": "fashion_cnn", "cifar10_subset": "cifar_cnn"}
    plans = [
        read_plan(folder / f"{name}.toml", f"benchmarks.experiments.networks:{network}")
        for name, network in networks.items()
    ]
    assert all(p.training.m == (1, 4, 16, 64, 256) and len(p.training.seeds) >= 3 for p in plans)
    zoo = read_zoo_plan(folder / "cifar10_zoo.toml")
    assert len(list(itertools.product(*zoo.grid.values()))) == 48
    medium = read_zoo_plan(folder / "cifar10_medium.toml")
    assert len(settings_of(medium.grid, medium.replicates)) == 128


def test_the_command_draws_and_tells_of_failures(preset, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(main, ["figure3", "--out", str(tmp_path / "out"), *arguments])

    result = run("--preset", str(preset), "--panels", "right")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "figure3.png").is_file()
    assert json.loads((tmp_path / "out" / "figure3.json").read_text()).keys() == {"power", "right"}
    wild = tmp_path / "wild.toml"
    text = preset.read_text().replace("lr = [0.02, 0.05]", "lr = [0.05, 1e30]")
    wild.write_text(
        text.replace("m = [1, 32]", "m = [32]").replace("seeds = [0, 1]", "seeds = [0]")
    )
    result = run("--preset", str(wild), "--panels", "middle")
    assert result.exit_code == 1
    assert "failed: sgd-lr1e+30-seed0: " in result.output
    result = run("--preset", "maxi")
    assert result.exit_code == 1 and "error: no preset 'maxi'" in result.output


def test_wrong_labels_are_in_the_hessian(preset):
    from sharpkit.runs.figure3.trainings import ArrayExamples, training_set

    plan = read_plan(preset)
    noisy = replace(plan, training=replace(plan.training, label_noise=0.5))
    train, test = plan.data.load()
    labels = training_set(noisy, ArrayExamples.of(train, test), 1).tensors[1]
    assert int((labels != train.tensors[1]).sum()) == 48
    assert isinstance(training_set(plan, ArrayExamples.of(train, test), 1), TensorDataset)
