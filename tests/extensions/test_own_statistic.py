"""A statistic from outside the package: one entry in the table, and everything has it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy.stats import weightedtau

import sharpkit as sk
from sharpkit.evaluation import bootstrap_interval, rate_measures
from sharpkit.evaluation.statistics import FISHER, TABLE, Statistic, one_by_one
from sharpkit.report.ranking import ranking_table
from sharpkit.runs.summary import summary


def top_weighted(values, grid, weights):  # type: ignore[no-untyped-def]
    """Vigna's tau (2015), in which the models of large values and gaps count more."""
    copies = np.repeat(np.arange(len(values)), weights)
    return weightedtau(values[copies], grid.gap[copies]).statistic


TOP = Statistic("top", "Vigna’s τ", one_by_one(top_weighted), scale=FISHER, no_relation=0.0)


def test_own_statistic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, "top", TOP)
    gaps = np.random.default_rng(0).permutation(24) / 100
    settings = [{"width": {"possible_values": [8, 16], "current_value": w}} for w in (8, 16)]
    configs = {
        str(k): {"hparams": settings[k % 2], "metrics": {"train_acc": 1.0, "test_acc": 1.0 - gap}}
        for k, gap in enumerate(gaps)
    }
    near = gaps + 0.05 * np.sin(np.arange(24))
    values = pd.DataFrame({"near": near, "far": gaps[::-1]}, index=list(configs))
    table = rate_measures(values, configs, resamples=30, permutations=99)
    expected = [weightedtau(values[name].to_numpy(), gaps).statistic for name in values]
    assert table["top"].tolist() == pytest.approx(expected)
    assert ((table["top_low"] < table["top"]) & (table["top"] < table["top_high"])).all()
    assert bootstrap_interval(values["near"], configs, statistic="top", resamples=30).p_value < 0.05
    shown = table.assign(label=values.columns, task="t", measure=values.columns)
    assert "Vigna’s τ" in dict(ranking_table(shown).columns)
    assert " top" in summary(shown)


@pytest.mark.filterwarnings("ignore:task:UserWarning", "ignore:conditioning sets:UserWarning")
def test_a_run_that_was_evaluated_before_has_it_too(monkeypatch, tmp_path):  # type: ignore[no-untyped-def]
    norm = sk.measures.make_measure("frobenius_norms")
    scores = sk.score_zoo(sk.embedded_zoo(), norm, out=tmp_path, n=8, limit=12, progress=False)
    assert "top" not in sk.evaluate(scores, resamples=10)
    monkeypatch.setitem(TABLE, "top", TOP)
    before = sk.evaluate(scores, resamples=10)["top"]
    assert before.notna().all()
    other = one_by_one(lambda *given: -top_weighted(*given))
    monkeypatch.setitem(TABLE, "top", dataclasses.replace(TOP, computation=other))
    assert (sk.evaluate(scores, resamples=10)["top"] == -before).all()
