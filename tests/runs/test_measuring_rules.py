"""Runs hold values of one precision and of one set of rules, whoever computes them."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from zoos import write_small_zoo

import sharpkit as sk
from sharpkit.contract.measuring_rules import RULES, measuring_rules, refuse_other_rules
from sharpkit.contract.precision import current_precision, precision
from sharpkit.errors import RunError
from sharpkit.runs import score_models
from sharpkit.runs.figure3 import figure3
from sharpkit.runs.spectrum import spectrum
from sharpkit.workers import Workers, run_items

TRAIN = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
OLD = "measured by rules 1, now rules 2 apply: frozen parameters are left out .* another directory"
OTHER_PRECISION = 'precision: "full" there, "tf32" now'


@dataclass(frozen=True)
class AllowsTF32:
    """A user's own measure: 1 if torch may use TF32 while it is computed, 0 if not."""

    name: str = "allows_tf32"

    def __call__(self, model, data, *, seed):
        return float(torch.backends.cudnn.allow_tf32)


def networks():
    torch.manual_seed(0)
    return {f"net {k}": nn.Linear(4, 3) for k in range(2)}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return sk.load_zoo(write_small_zoo(tmp_path_factory.mktemp("zoo")))


# --- the kinds of runs: each a function that starts or resumes one in a directory -----------------


@pytest.fixture
def scoring(zoo):
    return lambda out: sk.score_zoo(zoo, AllowsTF32(), out=out, n=8, limit=2, progress=False)


@pytest.fixture
def scoring_models():
    return lambda out: score_models(networks(), AllowsTF32(), TRAIN, TRAIN, out=out, progress=False)


@pytest.fixture
def measuring_spectra():
    models = {name: lambda net=net: net for name, net in networks().items()}
    return lambda out: spectrum(models, TRAIN, out, steps=3, probes=1, progress=False)


PLAN = """
[data]
name = "embedded"
train_size = 48
[training]
architecture = "nin-4x1"
epochs = 1
batch_size = 24
lr = [0.05]
m = [24]
rho = [0.05]
seeds = [0]
[spectra]
epochs = [1]
m = 24
rho = 0.05
n = 16
steps = 4
[power]
zoo = "{zoo}"
rho = 0.1
m = [4]
n = 8
"""


@pytest.fixture
def drawing(zoo, tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(PLAN.format(zoo=zoo.path))
    return lambda panel: lambda out: figure3(path, out=out, panels=[panel], progress=False)


@pytest.fixture(params=["scoring", "scoring_models", "measuring_spectra", "left", "right"])
def run(request):
    if request.param in ("left", "right"):
        return request.getfixturevalue("drawing")(request.param)
    return request.getfixturevalue(request.param)


def make_old(out):
    """What sharpkit noted before there were rules."""
    for path in out.rglob("results.sqlite"):
        with sqlite3.connect(path) as db:
            (text,) = db.execute("SELECT value FROM meta WHERE key = 'config'").fetchone()
            config = without_rules(json.loads(text))
            db.execute(
                "UPDATE meta SET value = ?, checksum = NULL WHERE key = 'config'",
                (json.dumps(config),),
            )
        db.close()
    for path in [*out.rglob("figure3.json"), *out.glob("config.json"), *out.glob("spectra/*/*")]:
        if path.suffix == ".json":
            path.write_text(json.dumps(without_rules(json.loads(path.read_text()))))


def without_rules(config):
    gone = ("rules", "precision", "left", "right")
    return {key: value for key, value in config.items() if key not in gone}


@pytest.mark.slow
def test_a_run_goes_on_under_the_same_rules_and_precision(run, tmp_path):
    out = tmp_path / "run"
    with precision("tf32"):
        run(out)
        run(out)


@pytest.mark.slow
def test_a_run_is_not_resumed_with_another_precision(run, tmp_path):
    out = tmp_path / "run"
    run(out)
    with precision("tf32"), pytest.raises(RunError, match=OTHER_PRECISION):
        run(out)
    run(out)


def test_a_run_of_old_rules_is_refused_with_the_remedy(run, tmp_path):
    out = tmp_path / "run"
    run(out)
    make_old(out)
    with pytest.raises(RunError, match=OLD):
        run(out)


def test_an_old_figure_without_measurements_goes_on(drawing, tmp_path):
    out = tmp_path / "run"
    drawing("middle")(out)
    make_old(out)
    drawing("left")(out)
    assert json.loads((out / "figure3.json").read_text())["left"] == measuring_rules()


def test_an_old_run_can_still_be_read(scoring, tmp_path):
    out = tmp_path / "run"
    expected = scoring(out).frame()
    make_old(out)
    assert sk.Scores.open(out).frame().equals(expected)


def test_a_run_of_later_rules_is_refused():
    later = {"rules": RULES + 1}
    with pytest.raises(RunError, match=f"rules {RULES + 1}, this version of sharpkit measures by"):
        refuse_other_rules(later, "run")


def test_the_accuracies_of_a_configuration_given_up_are_not_kept(tmp_path):
    out = tmp_path / "run"

    def failing(model, data, *, seed):
        raise ZeroDivisionError

    given_up = score_models(networks(), failing, TRAIN, TRAIN, out=out, progress=False)
    known = given_up._store.model_configs()["models"]
    known["net 0"]["metrics"]["train_loss"] = -1.0  # as of another precision
    given_up._store.add_task("models", known)
    given_up.close()
    with precision("tf32"):
        scores = score_models(networks(), failing, TRAIN, TRAIN, out=out, progress=False)
    assert (scores.metrics()["train_loss"] > 0).all()


@pytest.mark.filterwarnings("ignore:frozen parameters")
def test_a_parameter_frozen_since_makes_its_model_be_measured_again(tmp_path):
    nets = {"net": nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))}
    found = []
    for frozen in (False, True):
        nets["net"][0].requires_grad_(not frozen)
        result = spectrum({"net": lambda: nets["net"]}, TRAIN, tmp_path, steps=3, probes=1)
        found.append(result.summary["net"]["parameters"])
    assert found == [27, 12]


# --- who computes ---------------------------------------------------------------------------------


def precision_of_item(item, device):
    return current_precision()


@pytest.mark.parametrize("backend", ["inline", "processes"])
@pytest.mark.parametrize("kind", ["full", "tf32"])
def test_workers_compute_at_the_precision_of_the_driver(backend, kind):
    with precision(kind):
        results = run_items(precision_of_item, [1], Workers(1, backend))
    assert list(results) == [(1, kind)]


@pytest.mark.parametrize("backend", ["inline", "processes"])
def test_every_value_is_kept_with_the_precision_it_was_computed_at(zoo, backend):
    with precision("tf32"):
        scores = sk.score_zoo(
            zoo, AllowsTF32(), n=8, limit=1, workers=Workers(1, backend), progress=False
        )
    assert scores.frame()["value"].tolist() == [1.0]
    assert scores.provenance()["precision"].tolist() == ["tf32"]
    assert scores.config["precision"] == "tf32" and scores.config["rules"] == RULES


def test_values_of_ones_own_models_are_kept_with_their_precision(scoring_models):
    scores = scoring_models(None)
    assert scores.frame()["value"].tolist() == [0.0, 0.0]
    assert scores.provenance()["precision"].tolist() == ["full", "full"]


def test_the_same_settings_at_another_precision_have_another_hash(scoring):
    with precision("tf32"):
        quick = scoring(None).provenance()["settings_hash"]
    assert not set(quick) & set(scoring(None).provenance()["settings_hash"])
