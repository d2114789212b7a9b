"""Models that reach their weights by references of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sharpkit.contract.holding import frozen
from sharpkit.errors import ModelError
from sharpkit.measures import gradient_noise
from sharpkit.measures.passes import setup


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))
        self.held = [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.held[0]


DATA = torch.randn(32, 5), torch.arange(32) % 3


def test_perturbed_outputs_are_those_at_the_perturbed_weights() -> None:
    model = Listed()
    with frozen(model) as found:
        run = setup(model, DATA, found)
        moved = run.logits({"weight": torch.ones(5, 3)})
    assert torch.equal(moved, DATA[0] @ torch.ones(5, 3))


def test_gradients_of_examples_are_refused() -> None:
    with pytest.raises(ModelError, match="references of its own"):
        gradient_noise(Listed(), DATA)
