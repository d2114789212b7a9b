"""Models scored by other losses than the cross-entropy of classes, and measures with options."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import sharpkit as sk
from sharpkit.errors import ArgumentError, RunError
from sharpkit.measures.measure import describe


def network(seed, outputs=2):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs))


def regression(seed, n):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator)
    return x, x[:, :2] + 0.1 * torch.randn(n, 2, generator=generator)


TRAIN, TEST = regression(0, 70), regression(1, 131)  # several batches


def half_squared(model, data):
    return float(0.5 * (model(data[0]) - data[1]).detach().double().square().sum(1).mean())


def score(models, measures, train=TRAIN, test=TEST, **options):
    return sk.score_models(models, measures, train, test, progress=False, **options)


# --- regression and tokens ------------------------------------------------------------------------


def test_models_of_a_regression_are_scored_and_evaluated_by_their_losses():
    models = {f"net {k}": network(k) for k in range(5)}
    measure = sk.MSharpness(m=[1, 7], rho=0.1, loss="mse")
    scores = score(models, measure, loss="mse")
    metrics = scores.metrics().set_index("model")
    assert list(metrics.columns) == ["task", "train_loss", "test_loss", "loss_gap"]
    for name, model in models.items():
        train, test = half_squared(model, TRAIN), half_squared(model, TEST)
        row = metrics.loc[name]
        assert row["train_loss"] == pytest.approx(train, rel=1e-6)  # float32 outputs
        assert row["loss_gap"] == pytest.approx(test - train, abs=1e-6)
    frame = scores.frame()
    assert len(frame) == 10 and set(frame["measure"]) == {"m_sharpness_mse"}
    direct = sk.m_sharpness(models["net 3"], TRAIN, m=[1, 7], rho=0.1, loss="mse", progress=False)
    rows = frame[frame["model"] == "net 3"].set_index("m")["value"]
    assert rows.loc[[1, 7]].tolist() == direct.value.tolist()
    with pytest.warns(UserWarning, match="cmi_pgdl is not defined"):
        table = sk.evaluate(scores, resamples=10)
    from scipy import stats

    of_one = frame[frame["m"] == 1].set_index("model")["value"]
    gaps = metrics["loss_gap"].loc[of_one.index]
    expected = stats.kendalltau(of_one, gaps)[0]
    assert table["kendall_tau"].iloc[0] == pytest.approx(expected, abs=1e-12)


class Tokens(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, tokens):
        return self.out(self.embed(tokens))


def sentences(seed, n, length=6):
    tokens = torch.randint(0, 7, (n, length), generator=torch.Generator().manual_seed(seed))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    labels[::3, 2:] = -100
    return tokens, labels


def test_language_models_are_scored_by_the_loss_of_their_labelled_tokens():
    models, (train, test) = {"a": Tokens(0), "b": Tokens(1)}, (sentences(0, 30), sentences(1, 80))
    scores = score(models, sk.MSharpness(m=[1, 4], rho=0.1), train, test)
    assert scores.failures.empty and len(scores.frame()) == 4
    metrics = scores.metrics().set_index("model")
    assert "train_acc" not in metrics and "generalization_gap" not in metrics
    for name, model in models.items():
        logits = model(test[0]).double().flatten(0, 1)
        expected = nn.functional.cross_entropy(logits, test[1].flatten()).item()
        assert metrics.loc[name, "test_loss"] == pytest.approx(expected, rel=1e-6)


def test_batches_padded_to_different_lengths_are_scored():
    parts = [sentences(0, 8, 5), sentences(1, 8, 6)]
    scores = score({"a": Tokens(0)}, sk.MSharpness(m=2, rho=0.1), parts, parts)
    assert scores.failures.empty
    direct = sk.m_sharpness(Tokens(0), parts, m=2, rho=0.1, progress=False)
    assert scores.frame()["value"].item() == direct.value


def test_a_classification_keeps_its_accuracies_whatever_the_loss():
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    data = x, torch.arange(20) % 2
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))
    model = network(0)
    metrics = score({"a": model}, sk.MSharpness(m=1, rho=0.1), data, data, loss=loss).metrics()
    row = metrics.iloc[0]
    assert row["train_acc"] == (model(x).argmax(1) == data[1]).double().mean()
    assert row["train_loss"] == pytest.approx(loss(model(x), data[1]).item(), rel=1e-6)
    assert row["generalization_gap"] == 0


def test_a_model_that_fails_among_regressions_has_no_accuracies():
    models = {"a": network(0), "broken": lambda: 1, "b": network(1)}
    scores = score(models, sk.MSharpness(m=1, rho=0.1, loss="mse"), loss="mse")
    metrics = scores.metrics().set_index("model")
    assert "train_acc" not in metrics and math.isnan(metrics.loc["broken", "loss_gap"])


def test_the_loss_belongs_to_the_run(tmp_path):
    measure = sk.MSharpness(m=1, rho=0.1, loss="mse")
    score({"a": network(0)}, measure, loss="mse", out=tmp_path)
    with pytest.raises(RunError, match='loss: "mse" there'):
        score({"a": network(0)}, measure, loss=nn.L1Loss(), out=tmp_path)


# --- what fails -----------------------------------------------------------------------------------


def test_a_run_in_which_all_fails_says_with_what():
    with pytest.warns(UserWarning, match=r"nothing could be scored: all 2 .* integer labels"):
        scores = score({"a": network(0), "b": network(1)}, sk.MSharpness(m=1, rho=0.1), loss="mse")
    assert scores.frame().empty and len(scores.failures) == 2


# --- MSharpness -----------------------------------------------------------------------------------


def test_plain_and_adaptive_sharpness_are_scored_together():
    measures = [
        sk.MSharpness(m=1, rho=0.1, loss="mse"),
        sk.MSharpness(m=1, rho=0.5, loss="mse", adaptive=True),
        sk.MSharpness(m=1, rho=0.1, loss="mse", name="mine"),
    ]
    frame = score({"a": network(0)}, measures, loss="mse").frame().set_index("measure")
    assert set(frame.index) == {"m_sharpness_mse", "m_sharpness_mse_adaptive", "mine"}
    assert frame.loc["mine", "value"] == frame.loc["m_sharpness_mse", "value"]


OPTIONS = [
    ({"ascent": "pgd", "steps": 3}, "m_sharpness_pgd_steps3"),
    ({"ascent": "apgd", "restarts": 2}, "m_sharpness_apgd_restarts2"),
    ({"norm": math.inf}, "m_sharpness_norminf"),
    ({"adaptive": True}, "m_sharpness_adaptive"),
    ({"average": True, "steps": 4}, "m_sharpness_steps4_average"),
    ({"n": 12}, "m_sharpness_n12"),
    ({"seed": 5}, "m_sharpness_seed5"),
    ({"seed": None}, "m_sharpness_seedNone"),
    ({"parameters": ["0.weight", "2.*"]}, "m_sharpness_0.weight+2.*"),
    ({"tolerance": 0.5}, "m_sharpness_tolerance0.5"),
    ({"chunk": 8, "memory_budget": 2**30, "engine": "loop"}, "m_sharpness"),
    ({"loss": "mse"}, "m_sharpness_mse"),
    ({"loss": nn.HuberLoss()}, "m_sharpness_HuberLoss"),
]


@pytest.mark.parametrize(("options", "name"), OPTIONS)
def test_every_option_reaches_m_sharpness_and_the_name_and_the_configuration(options, name):
    measure = sk.MSharpness(m=2, rho=0.3, **{"loss": "mse"} | options)
    plain = sk.MSharpness(m=2, rho=0.3)
    assert sk.MSharpness(m=2, rho=0.3, **options).name == name
    assert describe(sk.MSharpness(m=2, rho=0.3, **options))[1] != describe(plain)[1]
    found = measure(network(0), TRAIN, seed=1)["m=2,rho=0.3"]
    wanted = {"loss": "mse", "seed": 1} | options
    direct = sk.m_sharpness(network(0), TRAIN, m=2, rho=0.3, progress=False, **wanted)
    assert found.value == direct.value


def test_a_plain_measure_is_described_as_it_always_was():
    config = describe(sk.MSharpness(m=[1, 4], rho=0.05))[1]
    assert json.loads(json.dumps(config)) == {
        "m": [1, 4],
        "rho": 0.05,
        "ascent": "one_step",
        "steps": 10,
        "norm": 2.0,
        "adaptive": False,
        "average": False,
        "restarts": 1,
        "name": "m_sharpness",
    }


def test_a_changed_copy_has_a_name_of_its_own_unless_one_was_given():
    plain = sk.MSharpness(m=1, rho=0.1)
    assert dataclasses.replace(plain, adaptive=True).name == "m_sharpness_adaptive"
    named = dataclasses.replace(plain, name="mine")
    assert dataclasses.replace(named, adaptive=True).name == "mine"


def test_losses_that_differ_have_configurations_that_differ():
    def factor(k):
        return lambda outputs, labels: k * (outputs - labels).square().mean()

    losses = [
        factor(1.0),
        factor(2.0),
        lambda outputs, labels: (outputs - labels).abs().mean(),
        nn.HuberLoss(delta=1.0),
        nn.HuberLoss(delta=2.0),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0])),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])),
    ]
    texts = [describe(sk.MSharpness(m=1, rho=0.1, loss=loss))[1]["loss"] for loss in losses]
    assert len(set(texts)) == len(losses)
    again = describe(sk.MSharpness(m=1, rho=0.1, loss=factor(2.0)))[1]["loss"]
    assert again == texts[1]
    json.dumps(texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 3, "m": 4}, "m = 4 is larger than n = 3"),
        ({"seed": "ran"}, 'expected a whole number, None or "run"'),
        ({"parameters": nn.Linear(1, 1)}, "found Linear, expected names or patterns"),
        ({"parameters": [nn.Linear(1, 1)]}, "found Linear, expected names or patterns"),
        ({"loss": "hinge"}, "unknown loss 'hinge'"),
    ],
)
def test_options_that_no_run_could_use_are_refused_early(options, message):
    with pytest.raises(ArgumentError, match=message):
        sk.MSharpness(**{"m": 1, "rho": 0.1} | options)


def test_two_measures_of_one_name_are_refused_with_the_remedy():
    with pytest.raises(ArgumentError, match=r"same name, 'm_sharpness'.*name='m_sharpness_2'"):
        score({"a": network(0)}, [sk.MSharpness(m=1, rho=r) for r in (0.1, 0.2)])


def test_a_loader_is_read_in_order():
    loader = DataLoader(list(zip(*TRAIN, strict=True)), batch_size=9, shuffle=True)
    measure = sk.MSharpness(m=1, rho=0.1, loss="mse")
    frames = [
        score({"a": network(0)}, measure, train=data, loss="mse").frame()
        for data in (TRAIN, loader)
    ]
    assert frames[0].equals(frames[1])
