"""How many workers `score_zoo` uses is never less than was asked for."""

from __future__ import annotations

import pytest
from zoos import write_small_zoo

import sharpkit as sk
from sharpkit.errors import ArgumentError


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return sk.load_zoo(write_small_zoo(tmp_path_factory.mktemp("zoo")))


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        ({}, sk.Workers(1, "inline")),
        ({"workers": 1}, sk.Workers(1, "inline")),
        ({"workers": 4}, sk.Workers(4, "processes")),
        ({"workers": sk.Workers(1, "processes")}, sk.Workers(1, "processes")),
    ],
)
def test_several_workers_are_processes(zoo, monkeypatch, asked, used):
    seen = []

    def run_items(function, items, workers, *, device):
        seen.append((workers.count, workers.place))
        yield from ()

    monkeypatch.setattr("sharpkit.runs.score.run_items", run_items)
    sk.score_zoo(zoo, sk.MSharpness(m=1, rho=0.1), progress=False, **asked)
    assert seen == [(used.count, used.place)]


def test_several_workers_in_one_process_are_refused(zoo):
    with pytest.raises(ArgumentError, match=r"workers = 4, but backend .inline. has only this"):
        sk.score_zoo(zoo, sk.MSharpness(m=1, rho=0.1), workers=sk.Workers(4, "inline"))


def test_a_zoo_of_which_nothing_can_be_scored_says_with_what(zoo):
    measure = sk.MSharpness(m=1, rho=0.1, loss="mse")
    with pytest.warns(UserWarning, match="nothing could be scored: all 2 attempts failed, the fir"):
        sk.score_zoo(zoo, measure, limit=2, progress=False)
