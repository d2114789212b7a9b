"""Trainings with losses other than the cross-entropy of classes: regression, tokens, callables."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sharpkit import fit
from sharpkit.errors import ArgumentError, ModelError, RunError


def _regression(n=64):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5]])


@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_a_regression_is_trained_with_its_loss(optimizer):
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(3, 1), _regression()
    result = fit(
        model, (x, y), (x[:20], y[:20]), epochs=30, optimizer=optimizer, loss="mse",
        rho=0.01 if optimizer == "sam" else None, batch_size=16, lr=0.05, weight_decay=0.0,
        progress=False,
    )  # fmt: skip
    last = result.history.iloc[-1]
    expected = 0.5 * (model(x).double() - y.double()).square().mean()
    assert last["train_loss"] == pytest.approx(float(expected.detach()), rel=1e-6)  # float32
    assert last["train_loss"] < 0.01
    assert result.history[["train_accuracy", "test_accuracy"]].isna().all(axis=None)


def test_a_regression_takes_the_steps_of_a_plain_loop():
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(3, 1).double(), _regression(16)
    x, y = x.double(), y.double()
    plain = copy.deepcopy(model)
    options = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    fit(model, (x, y), epochs=3, loss="mse", batch_size=16, progress=False, **options)
    step = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):  # one batch has all examples: their order changes rounding only
        step.zero_grad()
        (0.5 * (plain(x) - y).square().sum(1).mean()).backward()
        step.step()
    assert torch.allclose(model.weight, plain.weight, rtol=1e-12, atol=1e-12)


class _Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 5)

    def forward(self, tokens):
        return self.out(self.embed(tokens))


def test_a_loss_of_tokens_counts_those_that_are_labelled():
    torch.manual_seed(0)
    tokens = torch.randint(0, 5, (24, 6), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    labels[::3, 2:] = -100
    model = _Tokens()
    history = fit(model, (tokens, labels), epochs=2, batch_size=8, progress=False).history
    logits = model(tokens).double()
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert history["train_loss"].iloc[-1] == pytest.approx(float(expected.detach()), rel=1e-6)
    assert history["train_accuracy"].isna().all()


def test_the_loss_belongs_to_what_a_training_goes_on_with(tmp_path):
    x, y = _regression()

    def train(loss, epochs=1):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        options = {"batch_size": 16, "out": tmp_path, "progress": False}
        return fit(model, (x, y), epochs=epochs, loss=loss, **options)

    train(nn.HuberLoss(delta=1.0))
    train(nn.HuberLoss(delta=1.0))
    with pytest.raises(RunError, match=r"another configuration .*HuberLoss"):
        train(nn.HuberLoss(delta=2.0))


def test_label_noise_is_refused_where_there_are_no_classes():
    with pytest.raises(ArgumentError, match="label_noise needs one class per example"):
        fit(nn.Linear(3, 1), _regression(), epochs=1, loss="mse", label_noise=0.1, batch_size=8)


def test_a_loss_that_is_a_sum_is_refused():
    def total(outputs, labels):
        return (outputs - labels).square().sum()

    with pytest.raises(ModelError, match="not a mean over examples"):
        fit(nn.Linear(3, 1), _regression(), epochs=1, loss=total, batch_size=8, progress=False)
