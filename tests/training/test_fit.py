"""What `fit` computes: against loops written out here, and its random choices one by one."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from fits import EVERYTHING, fit, images, network, same_weights
from sam_reference import gradient, m_sam_loop, sgd_momentum
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import sharpkit as sk
from sharpkit.errors import ArgumentError, DataError, ModelError
from sharpkit.training.streams import stream

PLAIN = {"batch_size": 16, "progress": False}


def mlp():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    for p in model.parameters():
        nn.init.normal_(p, 0, 0.2, generator=generator)
    return model


def trained_by_hand(gradient_of_batch, epochs, lr, schedule):
    """SGD with momentum 0.9 and weight decay 0.01 in float64, over the full batches of 16."""
    model, (x, y) = mlp(), images()
    x, velocity = x.double(), None
    for epoch in range(epochs):
        order = torch.randperm(70, generator=stream(5, "order", epoch + 1))
        for step in range(4):
            batch = order[16 * step : 16 * step + 16]
            g = gradient_of_batch(model, x[batch], y[batch])
            rate = lr * schedule((4 * epoch + step) / (4 * epochs))
            weights, velocity = sgd_momentum(
                [p.detach() for p in model.parameters()], g, velocity, lr=rate, momentum=0.9,
                decay=0.01,
            )  # fmt: skip
            for p, w in zip(model.parameters(), weights, strict=True):
                p.data.copy_(w)
    return model


RATES = {
    "constant": lambda t: 1.0,
    "cosine": lambda t: math.cos(math.pi * t / 2) ** 2,
    "linear": lambda t: 1 - t,
    "step": lambda t: 0.1 ** ((t >= 0.5) + (t >= 0.75)),
}


@pytest.mark.parametrize("schedule", RATES)
def test_sgd_equals_the_loop_written_out(schedule):
    def plain(model, x, y):
        return gradient(model, lambda net: cross_entropy(net(x), y))

    expected = trained_by_hand(plain, 4, 0.1, RATES[schedule])
    model = mlp()
    sk.fit(model, images(), epochs=4, weight_decay=0.01, schedule=schedule, seed=5, **PLAIN)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("m", "adaptive"), [(1, False), (4, False), (6, False), (None, False), (4, True)]
)
def test_sam_equals_algorithm_1_written_out(m, adaptive):
    def perturbed(model, x, y):
        return m_sam_loop(model, x, y, m or 16, 0.3, adaptive)

    expected = trained_by_hand(perturbed, 2, 0.1, RATES["cosine"])
    model = mlp()
    sk.fit(
        model, images(), epochs=2, optimizer="sam", m=m, rho=0.3, adaptive=adaptive,
        weight_decay=0.01, seed=5, **PLAIN,
    )  # fmt: skip
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_sam_without_a_radius_is_sgd():
    sgd, sam = mlp(), mlp()
    sk.fit(sgd, images(), epochs=2, **PLAIN)
    sk.fit(sam, images(), epochs=2, optimizer="sam", m=4, rho=0.0, **PLAIN)
    for p, q in zip(sgd.parameters(), sam.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_only_the_seed_decides_and_the_callers_random_state_stays(optimizer):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = fit(optimizer=optimizer)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same_weights(first.model, fit(optimizer=optimizer).model)
    assert not same_weights(first.model, fit(optimizer=optimizer, seed=1).model)


@pytest.mark.parametrize(
    "change", [{"augmentation": None}, {"label_noise": 0.0}, {"model": network(noisy=False)}]
)
def test_augmentation_label_noise_and_dropout_act(change):
    assert not same_weights(fit().model, fit(**change).model)


def test_orders_are_permutations_that_differ_between_epochs(monkeypatch):
    model, seen = mlp(), []
    x = torch.arange(70.0).reshape(70, 1).expand(70, 128)
    model.register_forward_pre_hook(
        lambda module, args: seen.extend(args[0][:, 0].tolist()) if module.training else None
    )
    sk.fit(model, (x, images()[1]), epochs=2, lr=1e-9, **PLAIN)
    first, second = seen[:64], seen[64:]
    assert len(set(first)) == len(set(second)) == 64
    assert first != second


def test_history_is_what_evaluation_by_hand_gives(tmp_path):
    result = fit(tmp_path / "run", label_noise=0.0)
    model, history = result.model, result.history
    assert not any(module.training for module in model.modules())
    assert history["epoch"].tolist() == [1, 2, 3, 4]
    for split, (x, y) in (("train", images()), ("test", images(30, seed=1))):
        logits = model(x).detach().double()
        last = history.iloc[-1]
        assert last[f"{split}_accuracy"] == (logits.argmax(1) == y).double().mean()
        np.testing.assert_allclose(last[f"{split}_loss"], cross_entropy(logits, y), rtol=1e-6)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "run" / "log.csv"), history)


def test_the_loss_of_an_epoch_is_the_mean_over_its_steps():
    x, y = images()
    model = mlp()
    expected = cross_entropy(model(x[:64].double()), y[:64]).item()
    result = sk.fit(model, (x[:64], y[:64]), epochs=1, lr=1e-12, **PLAIN)
    np.testing.assert_allclose(result.history["loss"], [expected], rtol=1e-9)


def test_training_stops_at_the_target_loss():
    whole = fit(epochs=8, schedule="constant")
    losses = whole.history["train_loss"].tolist()
    target = sorted(losses)[4]
    stop = next(i for i, loss in enumerate(losses) if loss <= target)
    part = fit(epochs=8, schedule="constant", stop_at_loss=target)
    assert part.history["train_loss"].tolist() == losses[: stop + 1]


def test_epochs_between_evaluations_are_not_evaluated():
    often, seldom = fit(), fit(evaluate_every=3)
    assert same_weights(often.model, seldom.model)
    assert seldom.history["test_loss"].isna().tolist() == [True, True, False, False]
    assert seldom.history["loss"].tolist() == often.history["loss"].tolist()


def test_batchnorm_statistics_move_once_per_step():
    for optimizer in ("sgd", "sam"):
        result = fit(optimizer=optimizer, epochs=2)
        assert int(result.model[1].num_batches_tracked) == 8


def test_dicts_and_tuples_of_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, a, b):
            return self.layer(a * b)

    x, y = torch.rand(20, 4), torch.arange(20) % 3
    data = {"b": x, "a": x}
    for inputs in (data, (x, x)):
        for optimizer in ("sgd", "sam"):
            result = sk.fit(
                Two(), (inputs, y), epochs=1, batch_size=10, optimizer=optimizer, progress=False
            )
            assert len(result.history) == 1


def test_loaders_that_shuffle_stand_for_their_data_sets(tmp_path):
    sets = [TensorDataset(*images()), TensorDataset(*images(30, seed=1))]
    loaders = [DataLoader(data, batch_size=7, shuffle=True) for data in sets]
    expected, found = fit(), sk.fit(network(), *loaders, out=tmp_path, **EVERYTHING)
    assert same_weights(found.model, expected.model)
    timeless = [result.history.drop(columns="seconds") for result in (expected, found)]
    pd.testing.assert_frame_equal(*timeless, check_exact=True)
    sk.fit(network(), *loaders, out=tmp_path, **EVERYTHING)  # the same data at the next start


def test_frozen_parameters_stay():
    model = network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    for optimizer in ("sgd", "sam"):
        fit(model=model, optimizer=optimizer, epochs=1)
        assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"optimizer": "adam"}, "optimizer is 'adam'"),
        ({"schedule": "zigzag"}, "schedule is 'zigzag'"),
        ({"augmentation": "mixup"}, "augmentation is 'mixup'"),
        ({"optimizer": "sam", "rho": -0.1}, "-0.1"),
        ({"optimizer": "sam", "m": 0}, "m is 0"),
        ({"m": 4}, "belong to SAM"),
        ({"rho": 0.1}, "rho = 0.1 belongs to SAM"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 2.0}, "epochs is 2.0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": "0.1"}, "lr is '0.1'"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"label_noise": 1.5}, "label_noise is 1.5"),
        ({"stop_at_loss": 0.0}, "stop_at_loss is 0.0"),
        ({"seed": -1}, "seed is -1"),
        ({"batch_size": 71}, "batch_size is 71, but there are 70"),
        ({"evaluate_every": 0}, "evaluate_every is 0"),
        ({"keep": [1]}, "give out="),
        ({"tensorboard": True}, "give out="),
        ({"keep": [5], "out": "x"}, "keep has epoch 5: expected 0 to 4"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
    ],
)
def test_bad_settings_are_refused(setting, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = network()
    with pytest.raises(ArgumentError, match=message):
        fit(model=model, **setting)
    assert same_weights(model, network())
    assert not list(tmp_path.iterdir())


def test_data_that_do_not_fit_are_refused():
    x, y = images()
    for data, message in [
        ((x, y + 1), "labels run from 1 to 3"),
        ((x, y.float()), "integer labels"),
        ((x[:, :1], y), r"does not take the training inputs.*\(1, 8, 8\)"),
        ((x * math.nan, y), "NaN"),
    ]:
        with pytest.raises(DataError, match=message):
            sk.fit(network(), data, **EVERYTHING)
    with pytest.raises(DataError, match="labels run from 5"):
        sk.fit(network(), images(), (images()[0], torch.full((70,), 5)), **EVERYTHING)
    flat = torch.randn(20, 4), torch.arange(20) % 3
    with pytest.raises(DataError, match="augmentation 'flip' needs images"):
        sk.fit(nn.Linear(4, 3), flat, epochs=1, batch_size=4, augmentation="flip")


def test_models_that_cannot_be_trained_are_refused():
    with pytest.raises(ModelError, match="no parameters"):
        fit(model=nn.Flatten())
    model = network()
    with torch.no_grad():
        model[0].weight[0] = math.inf
    with pytest.raises(ModelError, match=r"'0.weight' has 18"):
        fit(model=model)
