"""What is a mean over examples is the same number for a stream as for the same data in memory."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

import sharpkit as sk
from sharpkit.contract.loading import load_in_order
from sharpkit.contract.losses import resolve_loss
from sharpkit.contract.mean_loss import loss_of
from sharpkit.errors import ArgumentError, DataError
from sharpkit.measures import (
    average_sharpness,
    fisher_rao_norm,
    gradient_noise,
    jacobian_norm,
    pac_bayes,
    training_loss,
    worst_case_sharpness,
)
from sharpkit.runs.model_metrics import accuracy_and_loss
from sharpkit.sharpness import sweep_plan

CUTS = (0, 7, 8, 20, 37, 53)  # the last batch is smaller, and none has the size of another


class Tokens(nn.Module):
    """Tokens and a mask to a class for every position, with inputs by keyword."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids) * attention_mask.unsqueeze(-1)
        return self.out(torch.tanh(x.cumsum(1)))


def images():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(53, 1, 6, 6, generator=g)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 4)
    )
    return model, (x, torch.randint(4, (53,), generator=g)), "cross_entropy"


def weighted():
    model, data, _ = images()
    return model, data, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5, 2.0]).double())


def tokens():
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(11, (53, 5), generator=g)
    labels = torch.randint(11, (53, 5), generator=g)
    labels[torch.rand(53, 5, generator=g) < 0.3] = -100
    labels[7:8] = -100  # a batch of which nothing counts
    mask = (torch.rand(53, 5, generator=g) < 0.8).double()
    return Tokens(), ({"input_ids": ids, "attention_mask": mask}, labels), "cross_entropy"


def own_weights():
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(53, 4, generator=g), torch.randn(53, 2, generator=g)

    def loss(outputs, labels):
        weights = 1.0 + labels[:, :1].abs()
        return weights * (outputs - labels) ** 2, weights.expand_as(labels)

    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), (x, y), loss


MAKERS = {f.__name__: f for f in (images, weighted, tokens, own_weights)}


@dataclass
class Case:
    model: nn.Module
    data: tuple[Any, torch.Tensor]
    loss: Any

    def batches(self):
        inputs, labels = self.data
        for a, b in pairwise(CUTS):
            if isinstance(inputs, dict):
                yield {k: t[a:b] for k, t in inputs.items()} | {"labels": labels[a:b]}
            else:
                yield inputs[a:b], labels[a:b]


@pytest.fixture(params=MAKERS)
def case(request):
    return made(request.param)


def made(name: str) -> Case:
    torch.manual_seed(0)
    model, (inputs, labels), loss = MAKERS[name]()
    inputs = inputs if isinstance(inputs, dict) else inputs.double()
    labels = labels.double() if labels.is_floating_point() else labels
    return Case(model.double().eval(), (inputs, labels), loss)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


def operators(kind, case, budget):
    options = {"loss": case.loss, "memory_budget": budget, "chunk": 17, "progress": False}
    return kind(case.model, case.batches, **options), kind(case.model, case.data, **options)


def products(kind, case, budget):
    stream, whole = operators(kind, case, budget)
    assert (stream.n, stream.chunks) == (53, whole.chunks)
    assert stream.kept_chunks == (0 if budget == 0 else stream.chunks)
    vectors = torch.randn(whole.shape[0], 2, generator=torch.Generator().manual_seed(0))
    close(stream @ vectors.double(), whole @ vectors.double())
    close(stream.gradient, whole.gradient)
    close(stream.loss, whole.loss)


def test_products_with_the_hessian(case):
    products(sk.HessianOperator, case, 0)


@pytest.mark.parametrize("kind", [sk.GaussNewtonOperator, sk.FisherOperator])
@pytest.mark.parametrize("budget", [None, 0])
def test_products_with_other_matrices(kind, budget):
    products(kind, made("tokens"), budget)


def test_what_comes_of_products():
    quiet = {"seed": 0, "progress": False}
    pair = operators(sk.HessianOperator, made("own_weights"), 0)
    found, expected = (sk.trace(h, products=9, **quiet).value for h in pair)
    close(found, expected)
    found, expected = (sk.diagonal(h, products=8, **quiet).values for h in pair)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    found, expected = (sk.spectral_density(h, steps=6, probes=2, **quiet) for h in pair)
    np.testing.assert_allclose(found.nodes, expected.nodes, rtol=1e-10, atol=1e-12)
    found, expected = (sk.top_eigenvalues(h, 2, **quiet).values for h in pair)
    np.testing.assert_allclose(found, expected, rtol=1e-8)  # of the iteration's own tolerance


PGD, AVERAGE = {"ascent": "pgd", "steps": 2}, {"average": True, "steps": 2}


@pytest.mark.parametrize("m", [[1, 4, 20, 53], 53])
def test_groups_cross_batches_as_in_memory(case, m):
    groups(case, m)


@pytest.mark.parametrize("how", [PGD, AVERAGE, {"adaptive": True}, {"engine": "loop"}])
@pytest.mark.parametrize("m", [[2, 20, 53], 10, 53])
def test_groups_by_other_ways(m, how):
    groups(made("own_weights"), m, **how)


def test_gradients_in_factors_of_a_group_of_all():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(53, 300, generator=g).double(), torch.randint(3, (53,), generator=g)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 3)).double()
    groups(Case(model, (x, y), "cross_entropy"), [1, 7, 53], chunk="auto")


def groups(case, m, **how):
    options = {"m": m, "rho": [0.05, 0.3], "loss": case.loss, "progress": False, "chunk": 8} | how
    expected = sk.m_sharpness(case.model, case.data, seed=None, **options)
    found = sk.m_sharpness(case.model, case.batches, seed=None, **options)
    assert found.n == 53
    close(found.value, expected.value)
    for key, values in expected.group_values.items():
        close(found.group_values[key], values)
    for size in expected.m:
        assert np.array_equal(found.group_sizes[size], expected.group_sizes[size])
        close(found.group_weights[size], expected.group_weights[size])


def test_the_order_is_the_streams_own_whatever_the_seed_is(case):
    options = {"m": 10, "rho": 0.1, "loss": case.loss, "progress": False}
    first, second = (
        sk.m_sharpness(case.model, case.batches, seed=seed, n=30, **options) for seed in (0, None)
    )
    assert first.value == second.value
    assert first.n == 30


def test_losses_accuracies_and_measures_that_are_means(case):
    loss = resolve_loss(case.loss)
    stream, whole = load_in_order(case.batches), load_in_order(case.data)
    close(loss_of(case.model, stream, loss), loss_of(case.model, whole, loss))
    found, expected = (accuracy_and_loss(case.model, e, loss) for e in (stream, whole))
    assert found.keys() == expected.keys()
    close(list(found.values()), list(expected.values()))
    for measure in (training_loss, gradient_noise, fisher_rao_norm):
        found, expected = (measure(case.model, d, loss=case.loss) for d in (stream, case.data))
        close(np.array(found), np.array(expected))


def test_measures_of_classifiers():
    one = made("images")
    for measure in (worst_case_sharpness, average_sharpness, jacobian_norm):
        np.testing.assert_allclose(
            np.array(measure(one.model, one.batches)), np.array(measure(one.model, one.data)),
            rtol=1e-10,
        )  # fmt: skip
    sk.fit(one.model, one.data, epochs=60, lr=0.1, batch_size=16, progress=False)
    first = nn.Sequential(*images()[0]).double()
    found, expected = (
        pac_bayes(one.model, d, initial=first, seed=0) for d in (one.batches, one.data)
    )
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("batch_norm", ["stored", "recomputed"])
def test_landscape_and_barrier(batch_norm):
    one, other = made("images"), images()[0].eval().double()
    how = {"batch_norm": batch_norm, "progress": False, "seed": 0}
    found, expected = (sk.landscape(one.model, d, points=3, **how) for d in (one.batches, one.data))
    close(found.loss, expected.loss)
    close(found.accuracy, expected.accuracy)
    found, expected = (
        sk.barrier(one.model, other, d, points=3, resamples=10, **how)
        for d in (one.batches, one.data)
    )
    close(found.loss, expected.loss)
    close(found.value, expected.value)


def test_two_models_and_a_tracker():
    one, other = made("images"), images()[0].eval().double()
    found, expected = (
        sk.compare_models(one.model, other, d, m=10, rho=0.1, seed=None, progress=False).frame()
        for d in (one.batches, one.data)
    )
    close(found["difference"], expected["difference"])
    rows = [
        sk.Tracker(d, measures=["lambda_max", "loss"], every=1)(one.model, step=1)
        for d in (one.batches, one.data)
    ]
    assert rows[0]["lambda_max"] == pytest.approx(rows[1]["lambda_max"], rel=1e-8)


class Counted(IterableDataset):
    """Examples of a linear problem that say how many of them are alive at once."""

    def __init__(self, batches: int):
        self.batches, self.alive, self.most, self.passes = batches, 0, 0, 0

    def __iter__(self):
        self.passes += 1
        g = torch.Generator().manual_seed(0)
        for _ in range(self.batches):
            x = torch.randn(8, 3, generator=g)
            self.alive += 8
            self.most = max(self.most, self.alive)
            weakref.finalize(x, self._gone)
            yield x, torch.randint(2, (8,), generator=g)

    def _gone(self):
        self.alive -= 8


def hessian(model, data):
    with sk.HessianOperator(model, data, chunk=16, memory_budget=0, progress=False) as h:
        h @ torch.ones(h.shape[0])


USES = {
    "products": hessian,
    "groups": lambda model, data: sk.m_sharpness(
        model, data, m=[4, 24], rho=0.1, chunk=8, progress=False
    ),
    "a group of all": lambda model, data: sk.m_sharpness(
        model, data, m=data.batches * 8, rho=[0.1, 0.2], chunk=8, progress=False
    ),
    "a landscape": lambda model, data: sk.landscape(
        model, data, points=3, chunk=8, progress=False
    ),
    "accuracy": lambda model, data: accuracy_and_loss(
        model, load_in_order(data), resolve_loss("cross_entropy")
    ),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_what_is_held_does_not_grow_with_the_stream(use):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).eval()
    most = []
    for batches in (12, 48):
        data = Counted(batches)
        USES[use](model, data)
        most.append(data.most)
    assert most[0] == most[1] <= 9 * 8


def test_a_stream_is_read_as_often_as_it_says():
    torch.manual_seed(0)
    model, data = nn.Linear(3, 2).eval(), Counted(12)
    sk.m_sharpness(model, data, m=[1, 8], rho=0.1, progress=False)
    assert data.passes == 3  # to count and compare, to check labels, to measure


def test_a_stream_that_changes_is_refused_before_there_is_a_number():
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).eval(), torch.randn(40, 3), torch.arange(40) % 2

    def shuffled():
        order = torch.randperm(40)
        return ((x[order[i : i + 8]], y[order[i : i + 8]]) for i in range(0, 40, 8))

    for use in (
        lambda: sk.HessianOperator(model, shuffled, progress=False),
        lambda: sk.m_sharpness(model, shuffled, m=4, rho=0.1, progress=False),
        lambda: sk.landscape(model, shuffled, points=3, progress=False),
        lambda: training_loss(model, shuffled),
    ):
        with pytest.raises(DataError, match=r"batch 0 .* another than in the first pass"):
            use()


def test_a_label_that_fits_no_output_is_found_wherever_it_is():
    model = nn.Linear(3, 2).eval()
    batches = [(torch.randn(8, 3), torch.full((8,), k)) for k in (0, 1, 0, 5, 1)]
    with pytest.raises(DataError, match="5"):
        sk.m_sharpness(model, lambda: batches, m=1, rho=0.1, progress=False)


def test_what_needs_them_all_says_how():
    model = nn.Linear(3, 2).eval()
    for use in (
        lambda data: sk.measures.output_margin(model, data),
        lambda data: sk.fit(model, data, epochs=1, batch_size=8, progress=False),
    ):
        with pytest.raises(DataError, match=r"a stream of 96 examples.*list of their batches"):
            use(Counted(12))


def test_a_group_that_does_not_fit_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(sweep_plan, "available_memory", lambda device: 1000)
    model = nn.Linear(3, 2).eval()
    data = Counted(12)
    with pytest.raises(ArgumentError, match=r"held while it is measured: 72 of them .*m = n = 96"):
        sk.m_sharpness(model, data, m=64, rho=0.1, chunk=8, progress=False)
    assert data.passes == 2
    sk.m_sharpness(model, data, m=96, rho=0.1, chunk=8, progress=False)  # is read again
