"""Other targets than the generalization gap, and the regret of a choice by a measure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import sharpkit as sk
from sharpkit.errors import ArgumentError
from sharpkit.runs.targets import larger_is_worse

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
DATA = X, torch.arange(60) % 3
TEST = torch.randn(90, 4, generator=torch.Generator().manual_seed(1)), torch.arange(90) % 3


class Largest:
    """A measure whose small values should mean a large gap."""

    name, direction = "largest", -1

    def __call__(self, model, data, *, seed):
        return float(model.weight.detach().abs().max())


class Unknown(Largest):
    name, direction = "unknown", None


@pytest.fixture(scope="module")
def scores():
    models = {}
    for k in range(14):
        torch.manual_seed(k)
        models[f"net {k}"] = nn.Linear(4, 3)
    measures = [sk.MSharpness(m=1, rho=0.1), Largest(), Unknown()]
    return sk.score_models(models, measures, DATA, TEST, progress=False)


def columns(scores):
    wide = scores.frame().pivot(index="model", columns="measure", values="value")
    return wide.join(scores.metrics().set_index("model").drop(columns="task"))


@pytest.mark.filterwarnings("ignore:task models. cmi_pgdl")
@pytest.mark.parametrize("target", ["test_loss", "test_acc", "generalization_gap"])
def test_a_recorded_column_is_predicted_as_scipy_says(scores, target):
    table = sk.evaluate(scores, target=target, resamples=20).set_index("measure")
    wide = columns(scores)
    for measure in ("m_sharpness", "largest"):
        row = table.loc[measure]
        expected = stats.pearsonr(wide[measure], wide[target])[0]
        assert row["pearson"] == pytest.approx(expected, abs=1e-9)
        assert row["kendall_tau_b"] == pytest.approx(
            stats.kendalltau(wide[measure], wide[target])[0], abs=1e-9
        )
    flipped = target == "test_acc"
    assert table["direction"].loc[["m_sharpness", "largest"]].tolist() == (
        [-1, 1] if flipped else [1, -1]
    )
    assert set(table["target"]) == {target}


@pytest.mark.filterwarnings("ignore:task models. cmi_pgdl")
def test_the_gap_given_as_a_target_gives_the_same_table(scores):
    plain = sk.evaluate(scores, resamples=20)
    again = sk.evaluate(scores, target="generalization_gap", resamples=20)
    assert again.drop(columns="target").equals(plain)
    gaps = scores.metrics().set_index("model")["generalization_gap"]
    given = sk.evaluate(scores, target=gaps.to_dict(), resamples=20)
    assert given.drop(columns="target").equals(plain)


@pytest.mark.filterwarnings("ignore:task models. cmi_pgdl")
def test_models_without_a_target_are_left_out(scores):
    values = dict.fromkeys(columns(scores).index[:12], 0.0)
    values = {name: float(k) for k, name in enumerate(values)}
    table = sk.evaluate(scores, target=values, resamples=20)
    assert set(table["models"]) == {12}


def test_regret_is_what_the_choice_loses(scores):
    wide = columns(scores)
    accuracy = wide["test_acc"]
    table = sk.selection_regret(scores).set_index("measure")
    for measure, picked in [
        ("m_sharpness", wide["m_sharpness"].idxmin()),
        ("largest", wide["largest"].idxmax()),
    ]:
        row = table.loc[measure]
        assert row["picked"] == picked and row["models"] == 14
        assert row["regret"] == pytest.approx(accuracy.max() - accuracy[picked], abs=1e-12)
        assert row["random_regret"] == pytest.approx(accuracy.max() - accuracy.mean(), abs=1e-12)
        assert row["p_value"] == pytest.approx((accuracy >= accuracy[picked]).mean())
    assert math.isnan(table.loc["unknown", "regret"])


def test_the_regret_of_a_loss_is_above_the_smallest(scores):
    wide = columns(scores)
    row = sk.selection_regret(scores, target="test_loss").set_index("measure").loc["m_sharpness"]
    picked = wide["test_loss"][wide["m_sharpness"].idxmin()]
    assert row["regret"] == pytest.approx(picked - wide["test_loss"].min(), abs=1e-12)


def test_the_regret_of_tied_models_is_their_mean():
    models = {f"net {k}": nn.Linear(4, 3) for k in range(4)}

    def constant(model, data, *, seed):
        return 1.0

    tied = sk.score_models(models, constant, DATA, TEST, progress=False)
    row = sk.selection_regret(tied).iloc[0]
    assert row["picked"] == "4 tied"
    assert row["regret"] == pytest.approx(row["random_regret"], abs=1e-12)
    assert 0 < row["p_value"] <= 1


def test_the_p_value_of_a_random_choice_is_uniform_or_larger():
    rng, n, found = np.random.default_rng(0), 20, []
    for _ in range(2000):
        losses = rng.normal(size=n)
        losses -= losses.min()
        found.append((losses <= losses[rng.integers(n)] + 1e-12).mean())
    # exactly k/20 with chance 1/20 each
    assert abs(np.mean(np.array(found) <= 0.05) - 0.05) <= 3 * math.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("f1", "target = 'f1': expected one of train_acc, test_acc"),
        ({"net 99": 1.0}, "models has no model 'net 99'"),
        ({"other": {"net 0": 1.0}}, "no task 'other', expected models"),
    ],
)
def test_a_target_that_is_not_there_is_refused(scores, target, message):
    with pytest.raises(ArgumentError, match=message):
        sk.evaluate(scores, target=target)


def test_accuracies_are_known_by_their_names():
    assert not larger_is_worse("test_acc") and not larger_is_worse("corrupted_accuracy")
    assert larger_is_worse("test_loss") and larger_is_worse("ece") and larger_is_worse({"0": 1.0})
