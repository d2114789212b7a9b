"""The gradient of a group alone, in batches: the same as of all its examples at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.losses import resolve_loss
from sharpkit.groupwise.objective import plain_gradient


@pytest.mark.parametrize("gap", [0.0, 40.0])
@pytest.mark.parametrize("given", ["cross_entropy", nn.CrossEntropyLoss(label_smoothing=0.1)])
@pytest.mark.parametrize("labelled", [True, False])
def test_in_batches_of_any_size(gap, given, labelled):
    """Float64 throughout, so that all that may differ is the order of sums."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    with torch.no_grad():
        model.bias[0] += gap
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.zeros(7, dtype=torch.long)
    if not labelled:
        y[2] = -100
    loss = resolve_loss(given).where_all_count([y])
    examples, function = Examples(x, y), FunctionalModel(model)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    expected = loss(model(x), y)
    by_torch = torch.autograd.grad(expected, list(model.parameters()))
    for batch in (None, 7, 3, 1):
        found = plain_gradient(function, loss, weights, examples, batch=batch)
        torch.testing.assert_close(found.mean, expected.detach(), rtol=1e-12, atol=0)
        assert float(found.weight) == (7 if labelled else 6)
        for g, own in zip(found.gradient, by_torch, strict=True):
            torch.testing.assert_close(g * torch.exp2(-found.exponent), own, rtol=1e-9, atol=0)
