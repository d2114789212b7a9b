"""A mutual information conditions on quantile bins of continuous hyperparameters."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

import sharpkit as sk
from sharpkit.evaluation import cmi_null, kendall_tau, permutation_p_value, rate_measures
from sharpkit.evaluation.bins import quantile_bins
from sharpkit.evaluation.grid import read_configs
from sharpkit.zoo.grid import model_configs

N = 36  # so many models have √(36/6) = 2 bins


def zoo(settings, gaps):
    metrics = {k: {"train_acc": 1.0, "test_acc": 1.0 - gap} for k, gap in enumerate(gaps)}
    return model_configs(dict(enumerate(settings)), metrics)


def random_zoo(seed=0, n=N):
    rng = np.random.default_rng(seed)
    lrs, widths = 10 ** rng.uniform(-3, -1, n), rng.choice([8, 16], n)
    settings = [{"lr": float(a), "width": int(b)} for a, b in zip(lrs, widths, strict=True)]
    gaps = 0.2 + 0.03 * np.log10(lrs) + 0.02 * rng.normal(size=n)
    values = gaps + 0.02 * rng.normal(size=n)
    return settings, gaps, values


def information(bits):
    p = np.array([[bits.count((a, b)) for b in (0, 1)] for a in (0, 1)]) / len(bits)
    q, r = p.sum(1), p.sum(0)
    mutual = sum(
        p[a, b] * math.log2(p[a, b] / (q[a] * r[b]))
        for a, b in itertools.product((0, 1), repeat=2)
        if p[a, b] > 0
    )
    return mutual, -sum(x * math.log2(x) for x in r if x > 0)


def by_a_plain_loop(settings, values, gaps, *, pgdl):
    """Both definitions on tuples of discrete settings, pair by pair."""

    def score(chosen):
        cells = {}
        for i, j in itertools.product(range(len(gaps)), repeat=2):
            if i != j or pgdl:
                key = tuple(settings[k][h] for h in chosen for k in (i, j))
                cells.setdefault(key, []).append(
                    (int(values[i] > values[j]), int(gaps[i] > gaps[j]))
                )
        parts = np.array([information(bits) for bits in cells.values()])
        weights = [1 if pgdl else len(bits) for bits in cells.values()]
        mutual, entropy = np.average(parts, axis=0, weights=weights)
        return mutual / entropy

    return min(score(s) for s in ([(0, 1)] if pgdl else [(), (0,), (1,), (0, 1)]))


@pytest.mark.parametrize("definition", ["pgdl", "jiang"])
def test_the_score_is_that_of_halves_made_by_hand(definition):
    settings, gaps, values = random_zoo()
    half = sorted(s["lr"] for s in settings)[N // 2 - 1]  # the largest of the smaller half
    by_hand = [(int(s["lr"] > half), s["width"]) for s in settings]
    expected = by_a_plain_loop(by_hand, values, gaps, pgdl=definition == "pgdl")
    found = sk.conditional_mutual_information(
        dict(enumerate(values)), zoo(settings, gaps), definition
    )
    assert found.score == pytest.approx(expected, rel=1e-9)
    assert found.binned == {"lr": 2} and "with lr in 2 bins" in repr(found)
    # the null and the resamples see the same cells
    assert cmi_null(
        dict(enumerate(values)), zoo(settings, gaps), definition, shuffles=9
    ).value == pytest.approx(expected, rel=1e-6)


def bins_of(values):
    levels = list(dict.fromkeys(map(str, values)))
    codes = np.array([levels.index(str(v)) for v in values])
    return quantile_bins(codes, levels)


def test_what_counts_as_continuous():
    assert bins_of(range(11)).names == ("0 to 5", "6 to 10")
    assert bins_of(range(10)) is None  # ten values are taken as they are
    assert bins_of([k % 12 for k in range(48)]) is None  # four models share each
    assert bins_of([k % 13 for k in range(48)]) is not None
    assert bins_of([f"word {k}" for k in range(40)]) is None
    assert bins_of([*range(39), "adam"]) is None
    assert [len(bins_of(range(n)).names) for n in (12, 53, 54, 95, 96, 1000)] == [2, 2, 3, 3, 4, 4]


def test_bins_are_equal_shares_whatever_the_scale():
    rng = np.random.default_rng(1)
    x = rng.uniform(1e-4, 1, 96)
    bins = bins_of(x)
    assert np.bincount(bins.codes).tolist() == [24] * 4
    assert np.array_equal(bins.codes, np.argsort(np.argsort(x)) // 24)
    assert np.array_equal(bins.codes, bins_of(np.log(x)).codes)


def test_equal_values_share_a_bin_and_missing_ones_have_none():
    x = [0.0] * 60 + [1.0 + k for k in range(36)]
    bins = bins_of(x)
    assert len(set(bins.codes[:60])) == 1 and len(bins.names) == 3  # two quantiles are 0
    assert bins.names[0] == "0.0"
    some = bins_of([None, *range(23)])
    assert some.codes[0] == -1 and some.names == ("0 to 11", "12 to 22")


def test_a_discrete_grid_is_itself():
    grid = read_configs(sk.embedded_zoo()["fashion_mnist_14x14"])
    assert grid.binned == {} and grid.conditioned is grid
    settings = [{"width": w, "depth": d} for w in (4, 8, 16) for d in (1, 2)] * 4
    configs = zoo(settings, np.linspace(0.1, 0.3, 24))
    table = rate_measures(pd.DataFrame({"a": np.arange(24.0)}), configs, resamples=9)
    assert "binned" not in table


def test_only_what_conditions_is_binned_and_the_table_says_so():
    settings, gaps, values = random_zoo()
    configs = zoo(settings, gaps)
    table = rate_measures(pd.DataFrame({"a": values}), configs, resamples=20)
    assert table["binned"].item() == "lr in 2 bins"
    assert table["cmi_jiang"].notna().item() and table["cmi_jiang_null_mean"].notna().item()
    assert table["kendall_tau"].item() == pytest.approx(kendall_tau(values, gaps))
    pairs = [  # no two models share a learning rate: those of one width differ in it alone
        [k for k, s in enumerate(settings) if s["width"] == width] for width in (8, 16)
    ]
    expected = np.mean([kendall_tau(values[k], gaps[k]) for k in pairs])
    assert table["granulated_kendall"].item() == pytest.approx(expected)
    without = rate_measures(pd.DataFrame({"a": values}), configs, resamples=20, definitions=())
    assert without["kendall_tau_low"].equals(table["kendall_tau_low"])
    within = permutation_p_value(dict(enumerate(values)), configs, within=["lr"], permutations=99)
    assert within < 1.0  # within bins there is something to shuffle


def test_a_measure_that_is_a_hyperparameter_is_not_more_than_its_null():
    """Within a bin, it still tells of the gap what the hyperparameter tells."""
    found = []
    for seed in range(12):
        settings, gaps, _ = random_zoo(seed, 48)
        lrs = {k: s["lr"] for k, s in enumerate(settings)}
        found.append(cmi_null(lrs, zoo(settings, gaps), "jiang", shuffles=60, seed=seed).p_value)
    assert min(found) > 0.2
