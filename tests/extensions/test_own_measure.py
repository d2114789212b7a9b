"""A measure from outside the package, scored over a zoo and over own models, and rated."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import sharpkit as sk
from sharpkit.contract.loading import load_examples
from sharpkit.measures import Estimate


@dataclass(frozen=True)
class Confidence:
    """The mean largest probability, at a temperature."""

    temperature: float = 1.0
    name: str = "confidence"

    @torch.no_grad()
    def __call__(self, model, data, *, seed):
        p = torch.softmax(model(load_examples(data).inputs) / self.temperature, 1).amax(1)
        return Estimate(p.mean().item(), (p.std() / len(p) ** 0.5).item())


def test_it_is_scored_over_a_zoo_and_rated():
    scores = sk.score_zoo(sk.embedded_zoo(), Confidence(2.0), n=100, progress=False)
    assert scores.failures.empty and len(scores.frame()) == 96
    (rating,) = sk.evaluate(scores, resamples=50).to_dict("records")
    assert rating["measure"] == "confidence" and -1 <= rating["kendall_tau"] <= 1


def test_it_is_scored_over_own_models():
    data = torch.eye(4), torch.arange(4)
    still = nn.Linear(4, 4)
    nn.init.zeros_(still.weight), nn.init.zeros_(still.bias)
    scores = sk.score_models({"still": still}, Confidence(), data, data, progress=False)
    assert scores.frame()["value"].tolist() == pytest.approx([0.25])
