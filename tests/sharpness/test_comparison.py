"""Two models compared over the same groups: hand values, the level of the test, the warnings."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sharpkit as sk
from sharpkit.errors import ArgumentError
from sharpkit.sharpness.comparison import paired_difference

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3
DATA = X.double(), Y


def network(seed: int, width: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()


def compare(a, b, data=DATA, **options):
    options = {"m": 1, "rho": 0.1, "progress": False} | options
    return sk.compare_models(a, b, data, **options)


# --- values ---------------------------------------------------------------------------------------


def test_the_difference_is_that_of_a_plain_loop_with_the_paired_t_test():
    a, b, rho = network(0), network(1), 0.1
    row = compare(a, b, m=1, rho=rho, seed=None).frame().iloc[0]

    def increases(model):
        found = []
        parameters = list(model.parameters())
        for x, y in zip(X.double(), Y, strict=True):
            loss = nn.functional.cross_entropy(model(x[None]), y[None])
            gradient = torch.autograd.grad(loss, parameters)
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradient))
            with torch.no_grad():
                for p, g in zip(parameters, gradient, strict=True):
                    p += rho / norm * g
                up = nn.functional.cross_entropy(model(x[None]), y[None])
                for p, g in zip(parameters, gradient, strict=True):
                    p -= rho / norm * g
            found.append(float(up - loss.detach()))
        return np.array(found)

    one, other = increases(a), increases(b)
    test = stats.ttest_rel(one, other)
    low, high = test.confidence_interval(0.95)
    # float64 rounding of losses of about 1, divided by differences of about 1e-3
    expected = [one.mean(), other.mean(), (one - other).mean(), low, high, test.pvalue]
    found = row[["a", "b", "difference", "low", "high", "p_value"]].tolist()
    assert found == pytest.approx(expected, rel=1e-9)
    assert row["groups"] == 24


def test_values_are_those_of_m_sharpness_bit_for_bit():
    a, b = network(0), network(1)
    grid = {"m": [1, 5], "rho": [0.05, 0.2]}
    found = compare(a, b, **grid, n=17, seed=3)
    for result, model in zip(found.results, (a, b), strict=True):
        alone = sk.m_sharpness(model, (X.double(), Y), **grid, n=17, seed=3, progress=False)
        for key, values in alone.group_values.items():
            assert np.array_equal(result.group_values[key], values)
    table = found.frame()
    assert table["groups"].tolist() == [17, 17, 4, 4]
    assert np.allclose(table["a"] - table["b"], table["difference"], rtol=0, atol=1e-15)


def test_groups_count_by_their_weight():
    d, w = np.array([1.0, 4.0, 7.0]), np.array([1.0, 1.0, 2.0])
    found = paired_difference(d, w)
    share = w / 4
    error = math.sqrt(1.5 * ((share * (d - 4.75)) ** 2).sum())
    freedom = 36 / 18 - 1  # squares add up to 6/16, fourth powers to 18/256
    assert found.value == 4.75 and found.std_error == pytest.approx(error)
    assert found.p_value == pytest.approx(2 * stats.t.sf(4.75 / error, freedom))
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, freedom) * error)
    with_empty = paired_difference(np.append(d, 99.0), np.append(w, 0.0))
    assert with_empty == found


def test_labels_that_are_ignored_weigh_nothing_in_the_difference():
    labels = Y.clone()
    labels[::3] = -100
    kept = labels >= 0
    options = {"m": 1, "seed": None}
    found = compare(network(0), network(1), (X.double(), labels), **options).frame()
    alone = compare(network(0), network(1), (X.double()[kept], labels[kept]), **options).frame()
    assert found["groups"].tolist() == [16]
    columns = ["difference", "std_error", "p_value"]
    assert np.allclose(found[columns], alone[columns], rtol=1e-9)


def test_a_model_does_not_differ_from_itself():
    row = compare(network(0), network(0)).frame().iloc[0]
    assert (row["difference"], row["low"], row["high"], row["p_value"]) == (0, 0, 0, 1)


def test_a_single_group_has_no_interval():
    row = compare(network(0), network(1), m=24).frame().iloc[0]
    assert row["groups"] == 1 and math.isfinite(row["difference"])
    assert np.isnan(row[["std_error", "low", "high", "p_value"]].astype(float)).all()


def test_data_of_every_form_give_the_same_groups():
    a, b = network(0), network(1)
    tensors = compare(a, b, m=[1, 4]).frame()
    loader = DataLoader(TensorDataset(X.double(), Y), batch_size=5, shuffle=True)
    assert compare(a, b, loader, m=[1, 4]).frame().equals(tensors)


# --- the level of the test ------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["equal", "tokens"])
@pytest.mark.parametrize(("kind", "least"), [("normal", 0.04), ("skewed", 0.02)])
def test_the_null_is_rejected_in_five_percent(weights, kind, least):
    rng = np.random.default_rng(0)
    trials, groups, rejected, covered = 4000, 30, 0, 0
    for _ in range(trials):
        d = rng.normal(size=groups)
        if kind == "skewed":  # increases as they are, alike in both models; conservative
            a, b = rng.lognormal(0.0, 0.5, (2, groups))
            d = rng.exponential(1.0, groups) * (a - b)
        w = np.ones(groups) if weights == "equal" else rng.integers(1, 20, groups).astype(float)
        found = paired_difference(d, w)
        rejected += found.p_value <= 0.05
        covered += found.low <= 0 <= found.high
    assert least <= rejected / trials <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)
    assert covered == trials - rejected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the training losses")
def test_two_models_that_are_alike_in_distribution_differ_in_five_percent_of_data_sets():
    torch.manual_seed(0)
    a = nn.Linear(4, 2).double()
    b = nn.Linear(4, 2).double()
    with torch.no_grad():  # b sees -x as a sees x, and -x is as likely
        b.weight.copy_(-a.weight)
        b.bias.copy_(a.bias)
    trials, rejected = 300, 0
    for seed in range(trials):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(48, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 2, (48,), generator=generator)
        found = compare(a, b, (x, y), m=2, rho=0.3, seed=None).frame()
        rejected += int(found["p_value"].item() <= 0.05)
    error = math.sqrt(0.05 * 0.95 / trials)
    assert abs(rejected / trials - 0.05) <= 2.6 * error  # 99 %


# --- warnings, errors, display --------------------------------------------------------------------


def test_models_of_other_training_losses_are_compared_with_a_warning():
    sharp = network(0)
    with torch.no_grad():
        sharp[2].weight.mul_(20)
    with pytest.warns(UserWarning, match=r"training losses of a and b differ much \(.* and 1\."):
        compare(sharp, network(0))


def test_models_of_other_architectures_are_compared_with_a_warning():
    with pytest.warns(UserWarning, match="SGD and SAM have different architectures: .* reverse"):
        compare(network(0), network(0, width=9), names=("SGD", "SAM"))


def test_an_order_that_reverses_in_the_grid_is_said():
    class Curved(nn.Module):
        """The loss increase is |x| (slope rho + bend rho²) at m = 1."""

        def __init__(self, slope, bend):
            super().__init__()
            self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))
            self.slope, self.bend = slope, bend

        def forward(self, x):
            return x.abs() * (1 + self.slope * self.w + self.bend * self.w**2)

    x = X.double()[:, :1]
    steep, bent = Curved(2.0, 0.0), Curved(1.0, 1.0)
    options = {"loss": lambda outputs, labels: outputs.mean(), "rho": [0.1, 10.0]}
    with pytest.warns(UserWarning, match="reverses within this grid"):
        found = compare(steep, bent, (x, Y), **options).frame()
    mean = float(x.abs().mean())
    # slope and bend: 2 rho against rho + rho²
    assert found["difference"].tolist() == pytest.approx([mean * 0.09, -mean * 90.0], rel=1e-9)


def test_alike_models_are_compared_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(network(0), network(1))


@pytest.mark.parametrize("names", ["ab", ("a", "a"), ("a", "b", "c"), ("m", "b")])
def test_names_that_cannot_stand_in_the_table_are_refused(names):
    with pytest.raises(ArgumentError, match="names"):
        compare(network(0), network(1), names=names)


def test_a_confidence_out_of_range_is_refused():
    with pytest.raises(ArgumentError, match="confidence = 95"):
        compare(network(0), network(1), confidence=95)


def test_it_prints_as_a_short_table():
    found = compare(network(0), network(1), m=[1, 4], names=("SGD", "SAM"))
    lines = repr(found).splitlines()
    assert lines[0].startswith("ModelComparison: SGD − SAM, n = 24") and len(lines) == 4
    assert "<table" in found._repr_html_()
