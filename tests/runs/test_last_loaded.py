"""A model is read once for measures that come one after the other, and each gets it as it is."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from zoos import write_small_zoo

import sharpkit as sk
from sharpkit.runs.items import LastLoaded
from sharpkit.zoo import PgdlModel, StackedModel

MEASURES = [
    sk.MSharpness(m=[1, 4], rho=0.1),
    sk.measures.make_measure("frobenius_norms"),
    sk.measures.make_measure("training_loss"),
]


def wrecks(model, data, *, seed):
    """What no measure may do."""
    model[0] = nn.Identity()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model.config.clear()
    return 0.0


@pytest.fixture(scope="module", params=["pgdl", "stacked"])
def zoo(request, tmp_path_factory):
    path = write_small_zoo(tmp_path_factory.mktemp("zoo"))
    if request.param == "stacked":
        sk.write_zoo(sk.load_zoo(path), path / "there", layout="stacked")
        path = path / "there"
    return sk.load_zoo(path)


def counted(monkeypatch):
    loads = []
    for kind in (PgdlModel, StackedModel):

        def load(entry, weights="final", load=kind.load):
            loads.append((entry.id, weights))
            return load(entry, weights)

        monkeypatch.setattr(kind, "load", load)
    return loads


def test_a_model_is_read_once_and_gives_the_same_numbers(zoo, monkeypatch):
    apart = {m.name: sk.score_zoo(zoo, m, n=16, progress=False).frame() for m in MEASURES}
    loads = counted(monkeypatch)
    measures = [MEASURES[0], wrecks, *MEASURES[1:]]
    together = sk.score_zoo(zoo, measures, n=16, progress=False)
    assert together.failures.empty
    assert loads == [(i, "final") for i in zoo["small"]]
    for name, frame in together.frame().groupby("measure"):
        if name != "wrecks":
            exact = ["model", "value", "std_error"]
            assert frame[exact].reset_index(drop=True).equals(apart[name][exact])


def test_a_changed_file_is_read_again(tmp_path):
    task = sk.load_zoo(write_small_zoo(tmp_path))["small"]
    found = []

    def first(model, data, *, seed):
        found.append(next(model.parameters()).detach().clone())
        if len(found) == 1:
            sk.zoo.write_weights(task["3"].load("initial"), task["3"].weights_path())
        return 0.0

    def second(model, data, *, seed):
        return first(model, data, seed=seed)

    scores = sk.score_zoo(task, [first, second], limit=1, progress=False)
    assert torch.equal(found[1], next(task["3"].load("initial").parameters()))
    hashes = scores.provenance().set_index("measure")["weights_hash"]
    assert hashes["first"] != hashes["second"]


def test_a_model_that_does_not_load_fails_by_itself(tmp_path):
    task = sk.load_zoo(write_small_zoo(tmp_path))["small"]
    task["5"].weights_path().write_bytes(b"damaged")
    scores = sk.score_zoo(task, MEASURES[1:], n=16, progress=False)
    assert set(scores.failures["model"]) == {"5"} and len(scores.failures) == 2
    assert scores.frame()["model"].nunique() == 7


def test_networks_of_ones_own_are_loaded_for_every_measure():
    """What `load` of another format gives may be anything: it is asked for again."""
    last, loads = LastLoaded(), []

    def load():
        loads.append(nn.Linear(2, 2))
        return loads[-1]

    assert [last.load(("t", "0", "s"), load) for _ in range(2)] == loads and len(loads) == 2


def test_workers_are_not_sent_a_model(zoo):
    last, entry = LastLoaded(), zoo["small"]["3"]
    empty = len(pickle.dumps(last))
    assert last.load(("small", "3", "s"), entry.load) is not last.load(
        ("small", "3", "s"), entry.load
    )
    assert len(pickle.dumps(last)) == empty
